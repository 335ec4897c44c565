"""Tokens to representations: any Hugging Face encoder, pooled to one unit vector a row."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.shapes import shape_checked
from gclib.validation import one_of, positive_int, refuse

POOLINGS = ("mean", "cls", "last")

# size -> (layers, hidden width, attention heads); the feed-forward is 4 times as wide (Devlin et al. 2019, section 3)
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (2, 32, 2),
    "mini": (2, 128, 2),
    "small": (4, 256, 4),
    "medium": (6, 384, 6),
    "bert-base": (12, 768, 12),
}


class Encoder(nn.Module):
    """A Hugging Face model with pooling: token ids (rows, T) -> representations (rows, D).

    pooling: "mean" over the unmasked tokens, "cls" (the first unmasked token) or "last" (the last
    unmasked token). normalize: divide each representation by its length, so that a dot product is a
    cosine. A pooler that the model brings but pooling does not use is dropped: its parameters would never get
    a gradient.
    """

    def __init__(self, model: nn.Module, *, pooling: str = "mean", normalize: bool = True):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise refuse("model", "must be a torch module", type(model).__name__)
        self.pooling = one_of("pooling", pooling, POOLINGS)
        self.normalize = normalize
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        self.model = model

    @classmethod
    def from_config(
        cls,
        size: Any = "mini",
        *,
        vocab_size: int = 8_000,
        dropout: float = 0.1,
        pooling: str = "mean",
        normalize: bool = True,
    ) -> "Encoder":
        """A BERT of a named size with fresh weights, or the model of a transformers config (used as it is).

        size: one of `SIZES`, from "tiny" (for tests) to "bert-base" (110 M parameters at its own vocabulary).
        """
        from transformers import AutoModel, PretrainedConfig

        config = size if isinstance(size, PretrainedConfig) else bert_config(size, vocab_size, dropout)
        return cls(AutoModel.from_config(config), pooling=pooling, normalize=normalize)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, pooling: str = "mean", normalize: bool = True) -> "Encoder":
        """The encoder that a folder or a Hugging Face name holds. ValueError where there is none to be had."""
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(str(name_or_folder))
        except (OSError, ValueError) as error:
            rule = "must be a folder that save_pretrained wrote, or a name that can be downloaded"
            raise refuse("name_or_folder", rule, str(name_or_folder)) from error
        return cls(model, pooling=pooling, normalize=normalize)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **model_inputs: Tensor) -> Tensor:
        """input_ids (rows, T), attention_mask (rows, T) with 1 for a token and 0 for padding -> (rows, D)."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **model_inputs)
        tokens = output.last_hidden_state
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if attention_mask is None else attention_mask
        reps = _pool(tokens, mask, self.pooling)
        return F.normalize(reps, dim=-1) if self.normalize else reps


def bert_config(size: str, vocab_size: int = 8_000, dropout: float = 0.1) -> Any:
    """The transformers BertConfig of a named size. ValueError for a size, vocabulary or dropout that cannot be."""
    from transformers import BertConfig

    layers, width, heads = SIZES[one_of("size", size, tuple(SIZES))]
    positive_int("vocab_size", vocab_size)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise refuse("dropout", "must be a number from 0 to below 1", dropout)
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


@shape_checked
def _pool(tokens: Float[Tensor, "rows T D"], mask: Shaped[Tensor, "rows T"], pooling: str) -> Float[Tensor, "rows D"]:
    """One vector a row. Reads no value, so that it runs under fake tensors too."""
    if pooling == "mean":
        weights = mask.to(tokens.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return (weights.unsqueeze(1) @ tokens).squeeze(1)
    present = (mask != 0).to(torch.int64)
    from_the_end = mask.shape[1] - 1 - present.flip(1).argmax(dim=1)
    position = present.argmax(dim=1) if pooling == "cls" else from_the_end
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), position]
