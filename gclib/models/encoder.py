"""Tokens or pictures to representations: any Hugging Face encoder, pooled to one unit vector a row (or one a token)."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.models.presets import PRESETS, build_model, config_of
from gclib.support.shapes import shape_checked
from gclib.support.validation import one_of, positive_int, refuse

POOLINGS = ("mean", "cls", "last", "own", "tokens")
OWN_OUTPUTS = ("text_embeds", "image_embeds", "pooler_output")

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

    pooling: "mean" over the unmasked tokens, "cls" (the first unmasked token), "last" (the last unmasked token),
    "own" (what the model itself gives for a row: a projected embedding, or its pooler's output) or "tokens" (no
    pooling: (rows, T, D), for losses that compare tokens). normalize: divide each representation by its length, so
    that a dot product is a cosine. A pooler that the model brings but pooling does not use is dropped: its parameters
    would never get a gradient. A key-value cache, which only generation needs, is switched off.
    """

    def __init__(self, model: nn.Module, *, pooling: str = "mean", normalize: bool = True):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise refuse("model", "must be a torch module", type(model).__name__)
        self.pooling = one_of("pooling", pooling, POOLINGS)
        self.normalize = normalize
        if pooling != "own" and getattr(model, "pooler", None) is not None:
            model.pooler = None
        if getattr(getattr(model, "config", None), "use_cache", False):
            model.config.use_cache = False
        self.model = model

    @classmethod
    def from_config(
        cls,
        size: Any = "mini",
        *,
        vocab_size: int = 8_000,
        dropout: float = 0.1,
        pooling: str | None = None,
        normalize: bool = True,
    ) -> "Encoder":
        """An encoder with fresh weights, from the size of a BERT, a preset, a config or a config.json.

        size: one of `SIZES`, from "tiny" (for tests) to "bert-base", with `vocab_size` tokens and this `dropout`; or
        a name of `gclib.models.presets.PRESETS`, a transformers config, or the path of a config.json, all used as they
        are. pooling: None for the preset's own, "mean" where there is none.
        """
        model = build_model(config_for(size, vocab_size, dropout))
        return cls(model, pooling=pooling_for(size, pooling), normalize=normalize)

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

    @property
    def reads_pictures(self) -> bool:
        """Whether `forward` takes pixel_values (rows, channels, height, width) and not token ids."""
        return getattr(self.model, "main_input_name", "input_ids") == "pixel_values"

    def checkpoint_activations(self) -> "Encoder":
        """From now on keep each layer's input alone, and compute the rest again in the backward; returns the encoder.

        Chen et al. 2016 (arXiv 1604.06174). ValueError for a model that transformers can't checkpoint.
        """
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # newer transformers, older ones
        enable = next((method for name in names if (method := getattr(self.model, name, None)) is not None), None)
        if enable is None or not getattr(self.model, "supports_gradient_checkpointing", True):
            rule = "must be one that transformers can checkpoint (supports_gradient_checkpointing)"
            raise refuse("model", rule, type(self.model).__name__)
        enable()
        return self

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **model_inputs: Tensor
    ) -> Tensor:
        """input_ids (rows, T), attention_mask (rows, T) with 1 for a token and 0 for padding -> (rows, D).

        A model for pictures is given pixel_values in place of both. With pooling "tokens": (rows, T, D).
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **model_inputs}
        output = self.model(**{name: value for name, value in given.items() if value is not None})
        reps = self._represent(output, attention_mask)
        return F.normalize(reps, dim=-1) if self.normalize else reps

    def _represent(self, output: Any, attention_mask: Tensor | None) -> Tensor:
        if self.pooling == "own":
            return _own_output(output)
        tokens = output.last_hidden_state
        if self.pooling == "tokens":
            return tokens
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if attention_mask is None else attention_mask
        return _pool(tokens, mask, self.pooling)


def _own_output(output: Any) -> Tensor:
    """What the model itself gives for a row."""
    found = [value for name in OWN_OUTPUTS if (value := getattr(output, name, None)) is not None]
    if not found:
        rule = f"may be 'own' only for a model that gives one of {', '.join(OWN_OUTPUTS)}"
        raise refuse("pooling", rule, ", ".join(output.keys()))
    return found[0]


def pooling_for(size: Any, pooling: str | None = None) -> str:
    """The pooling asked for, or the preset's own, or "mean" where neither is known."""
    if pooling is not None:
        return one_of("pooling", pooling, POOLINGS)
    return PRESETS[size].pooling if isinstance(size, str) and size in PRESETS else "mean"


def load_transformers() -> None:
    """Import what encoders are built of, in the thread that calls. Before a thread that builds some: transformers loads
    its parts when they are first asked for, and two threads that ask at the same moment can find half of one.
    """
    from transformers import AutoModel, BertConfig, PretrainedConfig  # noqa: F401
    from transformers.models.bert import modeling_bert  # noqa: F401


def config_for(size: Any, vocab_size: int = 8_000, dropout: float = 0.1) -> Any:
    """The transformers config that `Encoder.from_config` builds its model of. Arguments and errors as there."""
    from transformers import PretrainedConfig

    if isinstance(size, PretrainedConfig):
        return size
    named = isinstance(size, (str, Path))
    if named and (size in PRESETS or (size not in SIZES and Path(size).exists())):
        return config_of(size)
    if not named or size not in SIZES:
        known = ", ".join([*SIZES, *PRESETS])
        raise refuse("size", f"must be one of {known}, a transformers config or the path of a config.json", size)
    return bert_config(size, vocab_size, dropout)


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
