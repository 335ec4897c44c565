"""Text pairs and token batches: what training and retrieval are fed.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, Tq and Tp tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gclib.data.corpus import SPLITS, load_corpus
from gclib.support.validation import one_of, positive_int, refuse

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = 500  # characters that get a token of their own; rarer ones become [UNK]


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query, the passage that answers it, and K passages that look right and are not."""

    query: str
    passage: str
    negatives: tuple[str, ...] = ()


def load_pairs(split: str = "train", *, limit: int | None = None, progress: bool = True) -> list[TextPair]:
    """(docstring's first paragraph, function source without it) pairs of the installed packages.

    split: "train" or "test"; no file gave pairs to both. limit: the first so many; the order is as good as random
    and always the same, so they are a sample of all packages. progress: show a bar while the corpus is mined, which
    happens once for each set of package versions; later starts read the cache (see data/README.md).

    Raises ValueError for an unknown split or a limit below 1.
    """
    one_of("split", split, SPLITS)
    if limit is not None:
        positive_int("limit", limit)
    rows = load_corpus(progress=progress).split(split)
    return [TextPair(row.query, row.passage) for row in rows[:limit]]


def pairs_from_dataset(
    name_or_folder: str,
    *,
    query: str = "query",
    passage: str = "answer",
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[TextPair]:
    """Pairs out of a public retrieval set, or a local folder of its files, through the `datasets` library.

    name_or_folder: a name on the Hugging Face hub, such as "sentence-transformers/natural-questions" (needs a
    network), a folder of CSV, JSON or Parquet files, or one that `save_to_disk` wrote. query, passage: the names of
    the two text columns. config: which of the set's configurations. Rows without text in either are left out.

    Raises ValueError where `datasets` is not installed, the set can't be had, or a column or split is missing.
    """
    if limit is not None:
        positive_int("limit", limit)
    rows = _dataset(str(name_or_folder), config, split)
    for argument, column in (("query", query), ("passage", passage)):
        if column not in rows.column_names:
            raise refuse(argument, f"must be one of the columns {', '.join(rows.column_names)}", column)
    pairs = []
    for row in rows:
        if _has_text(row[query]) and _has_text(row[passage]):
            pairs.append(TextPair(row[query], row[passage]))
        if len(pairs) == limit:
            break
    return pairs


def train_tokenizer(pairs: Sequence[TextPair], *, vocab_size: int = 8_000) -> Any:
    """A lower-case BPE tokenizer trained on the pairs' texts, as a transformers PreTrainedTokenizerFast.

    White space, punctuation (the underscore too) and the humps of camelCase separate words, so that a name in code and
    the same word in a sentence share their tokens; layout is lost. At most `vocab_size` tokens, [PAD] (id 0), [UNK],
    [CLS], [SEP] and [MASK] among them. The same pairs give the same tokenizer.

    Source: byte-pair encoding, Sennrich et al. 2016 (arXiv 1508.07909). Raises ValueError for no pairs, or a vocabulary
    below 64.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    check_pairs(pairs)
    texts = texts_of(pairs)
    if positive_int("vocab_size", vocab_size) < 64:
        raise refuse("vocab_size", "must be at least 64", vocab_size)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    humps = normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), humps, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = most_common_letters(texts, tokenizer.normalizer, min(LETTERS, vocab_size - len(SPECIAL_TOKENS)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def most_common_letters(texts: Sequence[str], normalizer: Any, most: int) -> list[str]:
    """The commonest characters of the normalized texts, of equally common ones the first in Unicode's order.

    Chosen here because the trainer's own cut takes equally common ones in another order in each process.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    ranked = sorted((letter for letter in counts if not letter.isspace()), key=lambda letter: (-counts[letter], letter))
    return ranked[:most]


def tokenize_pairs(
    pairs: Sequence[TextPair], tokenizer: Any, *, query_length: int = 64, passage_length: int = 256
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batch's queries (B, Tq) and passages (N, Tp): dicts of int64 `input_ids` and `attention_mask`.

    Passages stand query-major: the positive of query i in row i * (1 + K), its K negatives after it. Texts are cut to
    `query_length` and `passage_length` tokens, special ones included; Tq and Tp are those of the longest row of this
    batch, shorter rows are padded with attention_mask 0.

    Raises ValueError for no pairs, pairs of different K, a tokenizer without a padding token, or a length that
    leaves no room for text.
    """
    check_pairs(pairs)
    passages = [text for pair in pairs for text in (pair.passage, *pair.negatives)]
    queries = [pair.query for pair in pairs]
    return (
        tokenize_texts(queries, tokenizer, query_length, "query_length"),
        tokenize_texts(passages, tokenizer, passage_length, "passage_length"),
    )


def tokenize_texts(texts: Sequence[str], tokenizer: Any, length: int, argument: str = "length") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 (rows, T), cut to `length` tokens and padded to the longest row."""
    check_tokenizer(tokenizer, length, argument)
    batch = tokenizer(list(texts), truncation=True, max_length=int(length), padding="longest", return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def texts_of(pairs: Sequence[TextPair]) -> list[str]:
    """Every text of the pairs: query, passage, negatives, pair by pair."""
    return [text for pair in pairs for text in (pair.query, pair.passage, *pair.negatives)]


def check_pairs(pairs: Any, argument: str = "pairs") -> None:
    """A sequence of at least one TextPair, all with the same number of hard negatives; ValueError otherwise."""
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or len(pairs) == 0:
        got = "none" if isinstance(pairs, Sequence) and not isinstance(pairs, str) else type(pairs).__name__
        raise refuse(argument, "must be a list of at least one TextPair", got)
    for number, pair in enumerate(pairs):
        if not isinstance(pair, TextPair):
            raise refuse(f"{argument}[{number}]", "must be a TextPair", type(pair).__name__)
        if len(pair.negatives) != len(pairs[0].negatives):
            rule = f"must have as many negatives as {argument}[0], {len(pairs[0].negatives)}"
            raise refuse(f"{argument}[{number}]", rule, len(pair.negatives))


def check_tokenizer(tokenizer: Any, length: Any, argument: str) -> None:
    """A tokenizer that can pad, and a length with room for at least one token of text; ValueError otherwise."""
    if getattr(tokenizer, "pad_token_id", None) is None or not callable(tokenizer):
        rule = "must be a transformers tokenizer with a padding token"
        raise refuse("tokenizer", rule, type(tokenizer).__name__)
    special = tokenizer.num_special_tokens_to_add()
    if positive_int(argument, length) <= special:
        raise refuse(argument, f"must leave room beside the tokenizer's {special} special tokens", length)


def _dataset(name_or_folder: str, config: str | None, split: str) -> Any:
    """One split of the set as `datasets` gives it."""
    try:
        import datasets
    except ImportError as error:
        rule = "needs the datasets library (pip install datasets)"
        raise refuse("name_or_folder", rule, f"{name_or_folder!r} and no such library") from error
    try:
        if _was_saved_to_disk(name_or_folder):
            found = datasets.load_from_disk(name_or_folder)
        else:
            found = datasets.load_dataset(name_or_folder, config)
    except (OSError, ValueError) as error:
        raise refuse("name_or_folder", f"must be a retrieval set that can be read ({error})", name_or_folder) from error
    if not isinstance(found, dict):
        return found
    return found[one_of("split", split, tuple(found))]


def _was_saved_to_disk(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder: a set, or a dictionary of splits."""
    from pathlib import Path

    return any(Path(folder, name).is_file() for name in ("state.json", "dataset_dict.json"))


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
