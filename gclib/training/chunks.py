"""The chunks of a run that leaves them to the machine (`--chunk-size auto`): planned once, for the longest texts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gclib.data.pairs import TextPair
from gclib.distributed import Rank, numbers_of_ranks
from gclib.memory.plan import StepPlan
from gclib.memory.step_plan import default_budget, plan_alike
from gclib.support.modules import training_mode
from gclib.support.validation import refuse
from gclib.training.settings import Settings


def planned_chunks(
    settings: Settings,
    pairs: Sequence[TextPair],
    encoder: nn.Module,
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: Rank,
) -> dict[str, int | None]:
    """The settings of the chunks: as many tokens a chunk, and retained chunks, as the device has room for.

    Of a batch whose every text is as long as texts are cut to: no other batch of the run takes more, but for the copies
    of sorted rows (some 0.1 %). Where that fits as a whole, the rows of a batch, all of them retained: each is encoded
    once, and trimmed. Several processes take the least of their budgets, so that all have the same chunks. Raises
    ValueError where nothing fits.
    """
    queries = -(-settings.batch_size // rank.world_size)
    rows = {"query_length": queries, "passage_length": queries * (1 + len(pairs[0].negatives))}
    inputs = [_full(count, getattr(settings, name), rank.device) for name, count in rows.items()]
    towers, autocast = [encoder, encoder], settings.autocast == "bf16"
    with (
        training_mode([encoder, loss_fn], True),
        torch.autocast(rank.device.type, dtype=torch.bfloat16, enabled=autocast),
    ):
        budget = default_budget(towers, inputs, loss_fn, optimizer) // _sharing(rank)
        budget = min(least for [least] in numbers_of_ranks([budget], rank.device))
        plan = plan_alike(towers, inputs, loss_fn, budget_bytes=budget, optimizer=optimizer)
    if plan.tile_size != settings.tile_size:
        rule = "must be given: the logits leave no room for a chunk; there is with"
        raise refuse("--tile-size", rule, f"{settings.tile_size}; {plan.tile_size} would do")
    return _as_settings(plan, list(rows.values()))


def _as_settings(plan: StepPlan, rows: Sequence[int]) -> dict[str, int | None]:
    if plan.step == "naive":
        return {"chunk_size": max(rows), "chunk_tokens": None, "retain_chunks": sum(rows)}
    return {"chunk_size": plan.chunk_size, "chunk_tokens": plan.chunk_tokens, "retain_chunks": plan.retain_chunks}


def _full(rows: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """Texts of this many tokens each."""
    shape = (rows, width)
    return {name: torch.ones(shape, dtype=torch.long, device=device) for name in ("input_ids", "attention_mask")}


def _sharing(rank: Rank) -> int:
    """The processes that share this one's memory: on processors all of them, at worst."""
    return rank.world_size if rank.device.type == "cpu" else 1
