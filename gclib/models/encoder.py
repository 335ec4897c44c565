"""Tokens or pictures to representations: any Hugging Face encoder, pooled to one unit vector a row (or one a token)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.models.layers import POOLINGS, Pooling, check_pooling, pool, words_of
from gclib.models.presets import PRESETS, build_model, config_of
from gclib.models.pretrained import described_folder, load_model
from gclib.models.sentence_folder import TextRules, check_head
from gclib.support.validation import one_of, positive_int, refuse

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
    "max_tokens", "mean_sqrt" or "weighted_mean" (see `gclib.models.layers`), several of these in a tuple (their vectors
    behind one another), "own" (what the model itself gives for a row: a projected embedding, or its pooler's output) or
    "tokens" (no pooling: (rows, T, D), for losses that compare tokens). head: layers behind the pooling, as `Dense`.
    normalize: divide each representation by its length, so that a dot product is a cosine. A pooler that the model
    brings but pooling does not use is dropped: its parameters would never get a gradient. A key-value cache, which only
    generation needs, is switched off. rules: what is known of length and prompts (kept for `save_model_folder`).

    ValueError for a model with a decoder behind its encoder, and for an nn.Sequential, as a SentenceTransformer is.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        head: Sequence[nn.Module] = (),
        rules: TextRules | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module) or isinstance(model, (nn.Sequential, Encoder)):
            rule = "must be a torch module that takes input_ids (of a SentenceTransformer: from_pretrained(its folder))"
            raise refuse("model", rule, type(model).__name__)
        config = getattr(model, "config", None)
        decoding = any("decoder" in name.split(".") for name, _ in model.named_modules())
        if getattr(config, "is_encoder_decoder", False) and decoding:
            raise refuse("model", "must be an encoder without a decoder (T5EncoderModel for T5)", type(model).__name__)
        self.pooling = check_pooling(pooling)
        self.normalize = normalize
        self.rules = rules or TextRules()
        if pooling != "own" and getattr(model, "pooler", None) is not None:
            model.pooler = None
        if getattr(config, "use_cache", False):
            config.use_cache = False
        self.model = model
        self.head = check_head(head)

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
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> "Encoder":
        """The encoder that a folder or a Hugging Face name holds: the vectors that sentence-transformers gives of it.

        pooling, normalize: None for what the folder says (a folder of sentence-transformers says it in modules.json,
        with layers behind the pooling, which are read too); else the mean, normalized (sentence-transformers leaves its
        length), or "own" for a model with a projection. dtype: what the weights become, whatever they are kept in:
        small updates are lost in bfloat16; None leaves the model as it is, and layers behind the pooling follow it.
        `gclib.models.pretrained.load_tokenizer` loads the tokenizer beside it.

        ValueError where there is no model to be had, or one that can't be read whole.
        """
        place, argument = str(name_or_folder), "name_or_folder"
        sentence = described_folder(place, argument)
        if pooling is not None and (pooling := check_pooling(pooling)) != sentence.pooling and sentence.head:
            rule = f"must be {sentence.pooling!r}, as layers of the folder stand behind it, or be left out"
            raise refuse("pooling", rule, pooling)
        model, projected, fresh_pooler = load_model(place, sentence.weights, dtype, argument)
        pooling = pooling or sentence.pooling or ("own" if projected else "mean")
        if pooling == "own" and fresh_pooler:
            raise refuse("pooling", "may be 'own' only where the pooler's weights are kept", "a folder without them")
        normalize = sentence.normalize if normalize is None else normalize
        encoder = cls(model, pooling=pooling, normalize=normalize, head=sentence.head, rules=sentence.rules)
        if encoder.head is not None:
            encoder.head.to(dtype or next(model.parameters()).dtype)
        return encoder

    def in_words(self) -> str:
        """Pooling, layers, normalization, length and prompts, and the dtype of the weights, in one line."""
        names = self.pooling if isinstance(self.pooling, str) else " + ".join(self.pooling)
        parts = [f"pooling {names}", *words_of(self.head or ()), "normalized" if self.normalize else "not normalized"]
        parts += [f"at most {self.rules.max_length} tokens"] * (self.rules.max_length is not None)
        parts += [f"prompt {name} {text!r}" for name, text in self.rules.prompts.items() if text]
        return ", ".join([*parts, f"weights in {str(next(self.parameters()).dtype).removeprefix('torch.')}"])

    @property
    def reads_pictures(self) -> bool:
        """Whether `forward` takes pixel_values (rows, channels, height, width) and not token ids."""
        return getattr(self.model, "main_input_name", "input_ids") == "pixel_values"

    def checkpoint_activations(self, *, reentrant: bool = False) -> "Encoder":
        """From now on keep each layer's input alone, and compute the rest again in the backward; returns the encoder.

        Chen et al. 2016 (arXiv 1604.06174). reentrant: by the older of torch's two ways, which needs inputs
        that ask for a gradient: token vectors do from now on. ValueError for a model that can't be checkpointed.
        """
        # The names of newer transformers, and of older ones
        names = {f"{kind}_checkpointing_enable": f"{kind}_checkpointing_kwargs" for kind in ("activation", "gradient")}
        enable = next((name for name in names if getattr(self.model, name, None) is not None), None)
        if enable is None or not getattr(self.model, "supports_gradient_checkpointing", True):
            rule = "must be one that transformers can checkpoint (supports_gradient_checkpointing)"
            raise refuse("model", rule, type(self.model).__name__)
        getattr(self.model, enable)(**{names[enable]: {"use_reentrant": reentrant}})
        return self

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **model_inputs: Tensor
    ) -> Tensor:
        """input_ids (rows, T), attention_mask (rows, T) with 1 for a token and 0 for padding -> (rows, D).

        A model for pictures is given pixel_values in place of both. With pooling "tokens": (rows, T, D), zero at
        padding, so that rows can be trimmed. A loss over them needs the mask: of negative similarities zero is largest.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **model_inputs}
        output = self.model(**{name: value for name, value in given.items() if value is not None})
        reps = self._represent(output, attention_mask)
        for layer in self.head or ():
            reps = layer(reps)
        if self.head and self.pooling == "tokens":  # a bias would come in at padding
            reps = _without_padding(reps, attention_mask)
        return F.normalize(reps, dim=-1) if self.normalize else reps

    def _represent(self, output: Any, attention_mask: Tensor | None) -> Tensor:
        if self.pooling == "own":
            return _own_output(output)
        tokens = output.last_hidden_state
        if self.pooling == "tokens":
            return _without_padding(tokens, attention_mask)
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if attention_mask is None else attention_mask
        if mask.shape != tokens.shape[:2]:
            rule = f"must give one vector a token to be pooled, {tuple(mask.shape)}"
            raise refuse("model", rule, str(tuple(tokens.shape[:2])))
        return pool(tokens, mask, self.pooling)


def _without_padding(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Token vectors (rows, T, D) with zeros at padding, whatever stood there; as they are where no mask fits them."""
    if mask is None or mask.shape != tokens.shape[:2]:
        return tokens
    return tokens.masked_fill((mask == 0).unsqueeze(-1), 0)


def _own_output(output: Any) -> Tensor:
    """What the model itself gives for a row."""
    outputs = [value for name in OWN_OUTPUTS if (value := getattr(output, name, None)) is not None]
    if not outputs:
        rule = f"may be 'own' only for a model that gives one of {', '.join(OWN_OUTPUTS)}"
        raise refuse("pooling", rule, ", ".join(output.keys()))
    return outputs[0]


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
