"""The rows of the experiment: a setting that all share, and a recipe (step, batch, learning rate) for each.

Learning rates grow with the square root of the batch, so that no row is tuned by hand.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gclib.data.pairs import TextPair
from gclib.losses.module import ContrastiveLoss
from gclib.steps import STEPS, naive_step
from gclib.support.validation import positive_int, positive_number, refuse

LARGEST = 512  # every batch size divides it, and every row sees a multiple of it


@dataclass(frozen=True)
class TableSetting:
    """Everything but the row: the data, the model, the length of training.

    train_pairs, test_pairs: None for all that there are; layers: None for as many as `size` has.
    """

    train_pairs: int | None = 2_048
    test_pairs: int | None = 500
    epochs: int = 1
    size: str = "mini"
    layers: int | None = 1
    vocab_size: int = 2_000
    query_length: int = 16
    passage_length: int = 32
    temperature: float = 0.05
    warmup_share: float = 0.1

    def lengths(self) -> dict[str, int]:
        """Both towers' lengths, as `train` and `retrieval_metrics` take them."""
        return {"query_length": self.query_length, "passage_length": self.passage_length}


@dataclass(frozen=True)
class Recipe:
    """One row: how many queries an update sees, how the gradient is made, and the schedule's highest learning rate."""

    name: str
    step: str
    batch_size: int
    chunk_size: int | None
    learning_rate: float

    @property
    def chance_loss(self) -> float:
        """The loss of an encoder that knows nothing, in nats: the log of the passages in one softmax.

        Accumulation's softmax holds a chunk's passages, not the batch's: chance is log C there, log B elsewhere.
        """
        return math.log(self.chunk_size if self.step == "accumulation" else self.batch_size)

    def step_function(self) -> Callable[..., Tensor]:
        """The step with its chunk size settled, as `train` takes it."""
        if self.step == "naive":
            return naive_step
        return functools.partial(STEPS[self.step], chunk_size=self.chunk_size)

    def updates(self, pairs: int, setting: Setting) -> int:
        """The optimizer steps of its training."""
        return steps_for(pairs, setting.epochs, self.batch_size)

    def towers(self, encoder: nn.Module) -> list[nn.Module]:
        """What encodes queries and passages: the encoder that is trained, for both."""
        return [encoder, encoder]

    def loss_fn(self, setting: Setting) -> nn.Module:
        """A new loss, with whatever it keeps from step to step."""
        return ContrastiveLoss(setting.temperature)

    def training_pairs(self, pairs: Sequence[TextPair]) -> Sequence[TextPair]:
        """The pairs that it is trained on, out of those of the setting."""
        return pairs

    def after_update(self, towers: Sequence[nn.Module]) -> None:
        """What follows each optimizer step: here nothing."""


def scaled_rate(batch_size: int, *, at_128: float = 2e-3) -> float:
    """The learning rate that grows with the square root of the batch: at_128 * sqrt(B / 128)."""
    return positive_number("at_128", at_128) * math.sqrt(positive_int("batch_size", batch_size) / 128)


def batch_recipe(batch_size: int, *, learning_rate: float | None = None) -> Recipe:
    """The whole batch in one softmax: the naive step up to 32 queries, above it the gradient cache in chunks of 32.

    learning_rate: by default the scaled one. Raises ValueError for a batch that does not divide 512.
    """
    if LARGEST % positive_int("batch_size", batch_size):
        raise refuse("batch_size", f"must divide {LARGEST}", batch_size)
    rate = scaled_rate(batch_size) if learning_rate is None else positive_number("learning_rate", learning_rate)
    cached = batch_size > 32
    name = {8: "sequential, B=8"}.get(batch_size, f"{'gradient cache' if cached else 'one batch'}, B={batch_size}")
    name = name if learning_rate is None else f"{name}, rate {learning_rate:g}"
    return Recipe(name, "grad_cache" if cached else "naive", batch_size, 32 if cached else None, rate)


def steps_for(pairs: int, epochs: int, batch_size: int) -> int:
    """Updates that see `epochs` times the pairs, rounded down to whole batches of the biggest row, 512.

    So every row sees the same number of examples.
    """
    examples = epochs * (pairs // LARGEST) * LARGEST
    if examples == 0 or examples % batch_size:
        raise refuse("batch_size", f"must divide {LARGEST}, with at least {LARGEST} pairs to train on", batch_size)
    return examples // batch_size


QUICK = TableSetting()
WHOLE = TableSetting(8_192, 2_000, epochs=2, vocab_size=6_000, query_length=24, passage_length=64)
RECIPES = (
    batch_recipe(8),
    Recipe("accumulation, 16 x 8", "accumulation", 128, 8, scaled_rate(128)),
    batch_recipe(128),
    batch_recipe(512),
)
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
# Two rates at two batch sizes: each its own, and the other's.
RATES = (
    batch_recipe(32),
    batch_recipe(32, learning_rate=scaled_rate(512)),
    batch_recipe(512, learning_rate=scaled_rate(32)),
    batch_recipe(512),
)
