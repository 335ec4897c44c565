"""The public implementations that gclib is held against in tests and benchmarks, and what a careful caller adds.

The steps themselves are `gclib.course.wild.rivals`; they need their packages (the `dev` extra).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.course.wild.rivals import Embedder, official_grad_cache, official_step, sentence_transformers_step

__all__ = [
    "Counted",
    "Embedder",
    "flops_of",
    "official_grad_cache",
    "official_step",
    "open_clip_loss",
    "sentence_transformers_step",
    "sentence_transformers_strips",
    "sort_and_trim",
    "sorted_loss",
    "split_trimmed",
]


def open_clip_loss(queries: Tensor, passages: Tensor, temperature: float | Tensor) -> Tensor:
    """The dense symmetric loss as open_clip's ClipLoss computes it alone: a product a direction, vectors scaled."""
    labels = torch.arange(len(queries), device=queries.device)
    losses = [F.cross_entropy(a / temperature @ b.T, labels) for a, b in ((queries, passages), (passages, queries))]
    return (losses[0] + losses[1]) / 2


def sentence_transformers_strips(queries: Tensor, passages: Tensor, *, rows: int, temperature: float) -> Tensor:
    """CachedMultipleNegativesRankingLoss's loss, symmetric, with its backward pass: `rows` rows of logits at a time."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss_fn = CachedMultipleNegativesRankingLoss(
        SentenceTransformer(modules=[Embedder(nn.Linear(1, 1))], device=str(queries.device)),
        scale=1 / temperature,
        similarity_fct=lambda a, b: a @ b.T,
        mini_batch_size=rows,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return loss_fn.calculate_loss([[queries], [passages]], with_backward=True)


def sort_and_trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows from long to short: what a careful caller of another library can do before the step."""
    order = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    return {key: value[order] for key, value in batch.items()}


def split_trimmed(batch: dict[str, Tensor], chunk_size: int) -> list[dict[str, Tensor]]:
    """Chunks cut to their own longest row: a `split_input_fn` for the official code."""
    chunks = [
        dict(zip(batch, parts, strict=True))
        for parts in zip(*(v.split(chunk_size) for v in batch.values()), strict=True)
    ]
    widths = [int(chunk["attention_mask"].sum(dim=1).max()) for chunk in chunks]
    return [{k: v[:, :width] for k, v in chunk.items()} for chunk, width in zip(chunks, widths, strict=True)]


def sorted_loss(queries: dict[str, Tensor], passages: dict[str, Tensor], loss_fn: Callable[..., Tensor]) -> Callable:
    """`loss_fn` on representations whose towers were each sorted by length: the pairs are put back together."""
    back = [
        batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True).argsort()
        for batch in (queries, passages)
    ]

    def loss(query_reps: Tensor, passage_reps: Tensor) -> Tensor:
        return loss_fn(query_reps[back[0]], passage_reps[back[1]])

    return loss


def flops_of(run: Callable[[], Any]) -> int:
    """Floating point operations of matrix products and attention, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Counted(nn.Module):
    """An encoder that counts the rows and padded tokens which it is given, and the tokens that got a graph."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.rows = self.tokens = self.with_graph = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.rows += input_ids.shape[0]
        self.tokens += input_ids.numel()
        self.with_graph += input_ids.numel() * torch.is_grad_enabled()
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask)
