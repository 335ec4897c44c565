"""Public implementations beside gclib's own, called as their documentation says: steps with one signature.

`official_step` is GradCache of Gao et al. 2021 (PyPI `gradcache`), `sentence_transformers_step` the cached loss of
sentence-transformers. Both add to `.grad` and return the loss, as gclib's steps do. Neither package is needed by gclib:
they are loaded when a step is first called, and `missing_packages` says which are not there.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

PACKAGES = {"gradcache": "gradcache==0.0.1", "sentence_transformers": "sentence-transformers"}


def missing_packages() -> list[str]:
    """What `pip install` must be given so that both steps of this module run; an empty list where all is there."""
    return [requirement for name, requirement in PACKAGES.items() if find_spec(name) is None]


def official_grad_cache() -> type:
    """The class GradCache. Its package imports itself under another name than PyPI's, so it is given that name."""
    import gradcache

    sys.modules.setdefault("grad_cache", gradcache)
    from gradcache.grad_cache import GradCache

    return GradCache


def official_step(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int | list[int],
    split_input_fn: Callable | None = None,
) -> Tensor:
    """One `cache_step` of the official code."""
    cache = official_grad_cache()(list(encoders), chunk_size, loss_fn, split_input_fn=split_input_fn)
    return cache.cache_step(*inputs)


class Embedder(nn.Module):
    """An encoder as a sentence-transformers module: a dictionary in, the same with `sentence_embedding` out."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """input_ids and attention_mask -> the same and sentence_embedding, (rows, D)."""
        reps = self.encoder(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
        return features | {"sentence_embedding": reps}


def sentence_transformers_step(
    encoder: nn.Module,
    inputs: Sequence[dict[str, Tensor]],
    *,
    chunk_size: int,
    temperature: float = 0.05,
    symmetric: bool = False,
) -> Tensor:
    """CachedMultipleNegativesRankingLoss, forward and backward. Tied weights only: it holds one model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(modules=[Embedder(encoder)], device=str(next(encoder.parameters()).device))
    model.train(encoder.training)
    both = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    loss_fn = CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / temperature,
        mini_batch_size=chunk_size,
        directions=both,
        partition_mode="per_direction" if symmetric else "joint",
    )
    loss = loss_fn([dict(features) for features in inputs], None)
    loss.backward()
    return loss.detach()
