"""`ContrastiveLoss`: the contrastive loss with its settings, as a module that every step takes for its `loss_fn`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gclib.losses.directions import Directions
from gclib.losses.gathered import gathered_contrastive_loss, local_loss
from gclib.losses.masks import Rule
from gclib.losses.ring import ring_contrastive_loss
from gclib.losses.tiled import check_tile_size
from gclib.support.validation import one_of, positive_number, refuse

LOSSES = {"none": local_loss, "gather": gathered_contrastive_loss, "ring": ring_contrastive_loss}


class BatchLoss(nn.Module):
    """What losses of a batch share: a temperature, fixed or learnable, tiles, and what of several processes they see.

    Raises ValueError for a setting that can't be, or a ring without tile_size.
    """

    def __init__(self, temperature: float, learnable: bool, tile_size: int | str | None, across: str):
        super().__init__()
        start = positive_number("temperature", temperature)
        self.across = one_of("across", across, tuple(LOSSES))
        if across == "ring" and tile_size is None:
            raise refuse("tile_size", 'must be an int or "auto" for a ring, which has no dense form', None)
        self.tile_size = None if tile_size is None else check_tile_size(tile_size)
        self.fixed_temperature = None if learnable else start
        self.log_temperature = nn.Parameter(torch.tensor(start).log()) if learnable else None

    @property
    def temperature(self) -> float | Tensor:
        """The number itself, or exp(log_temperature) where it is learnable."""
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    @property
    def needs_whole_batch(self) -> bool:
        """Whether every rank must take this loss of all its rows at once, as a step in chunks of their own can't."""
        return self.across != "none"


class ContrastiveLoss(BatchLoss):
    """InfoNCE (`contrastive_loss`) with its settings, for any step's `loss_fn`.

    temperature: a number above 0. learnable: then the module owns one parameter, `log_temperature` (the logarithm keeps
    the temperature above 0), whose gradient a step gives exactly once. tile_size: None computes the dense loss; an int
    computes it tile by tile (`gclib.losses.tiled`), "auto" in tiles that fit the processor's cache, of 4,096 on a GPU.
    across: over several processes "none" is the loss of each one's own rows; "gather" that of the whole batch, passages
    gathered (`gathered_contrastive_loss`); "ring" the same with passages that travel (`ring_contrastive_loss`), which
    needs a tile_size. The last two want `average_gradients` after the step, and are the plain loss in a process alone.
    directions, partition: what is contrasted with what, under one softmax or each under its own
    (`gclib.losses.directions`); None is query to passage, and symmetric=True the mean of both ways.

    Called with mask=: a rule of `gclib.losses.masks`, or, with across="none", a (B, N) bool tensor.

    Raises ValueError for a setting that can't be, or a ring without tile_size.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learnable: bool = False,
        symmetric: bool = False,
        directions: Sequence[str] | None = None,
        partition: str = "joint",
        tile_size: int | str | None = None,
        across: str = "none",
    ):
        super().__init__(temperature, learnable, tile_size, across)
        Directions.of(symmetric, directions, partition)
        self.symmetric, self.directions, self.partition = symmetric, directions, partition

    def forward(self, query_reps: Tensor, passage_reps: Tensor, mask: Tensor | Rule | None = None) -> Tensor:
        """query_reps (B, D), passage_reps (N, D), mask a rule or (B, N) or None -> scalar."""
        settings = {"temperature": self.temperature, "symmetric": self.symmetric, "mask": mask}
        settings |= {"directions": self.directions, "partition": self.partition, "tile_size": self.tile_size}
        return LOSSES[self.across](query_reps, passage_reps, **settings)

    def extra_repr(self) -> str:
        """The settings, for print(loss)."""
        temperature = "learnable" if self.fixed_temperature is None else f"{self.fixed_temperature:g}"
        ranks = f", across={self.across}" if self.needs_whole_batch else ""
        ways = f"symmetric={self.symmetric}"
        if self.directions is not None:
            ways = f"directions={tuple(self.directions)}, partition={self.partition}"
        return f"temperature={temperature}, {ways}, tile_size={self.tile_size}{ranks}"
