"""A step's workload: the model, the batch, and all else that decides how much memory the step takes.

One frozen value goes from a widget or a caller to the forecast; a search changes one field of it at a time.

Letters: B queries, K hard negatives, N = B * (1 + K) passages, C rows of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gclib.chunks import Chunk, plan_chunks, price_of_a_call
from gclib.losses.module import ContrastiveLoss
from gclib.memory.devices import DEVICES
from gclib.models.adapters import LoRA
from gclib.models.encoder import config_for, pooling_for
from gclib.models.presets import positions_of
from gclib.steps import STEPS
from gclib.support.validation import int_at_least, one_of, positive_int, refuse

OPTIMIZERS = (None, "sgd", "adamw")
PARALLEL = ("average", "ddp")
LENGTHS = ("query_length", "passage_length")
CHECKPOINTING = (False, True, "reentrant")
CUTS = {"naive": (), "accumulation": ("chunk_size",), "grad_cache": ("chunk_size", "chunk_tokens")}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step works on, and how: the keywords of `gclib.memory.forecast.forecast_step`, which explains each.

    Raises ValueError for fields that do not fit.
    """

    step: str
    config: Any = None
    encoders: Sequence[nn.Module] | None = None
    loss: Any = None
    batch_size: int
    negatives: int = 0
    chunk_size: int | Sequence[int] | None = None
    chunk_tokens: int | Sequence[int] | None = None
    retain_chunks: int = 0
    query_length: int | Sequence[int] | None
    passage_length: int | Sequence[int] | None
    tied: bool = True
    pooling: str | None = None
    gradient_checkpointing: bool | str = False
    lora: LoRA | None = None
    optimizer: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    ranks: int = 1
    parallel: str = "average"

    def __post_init__(self) -> None:
        one_of("step", self.step, tuple(STEPS))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        positive_int("ranks", self.ranks)
        if one_of("parallel", self.parallel, PARALLEL) == "ddp" and self.ranks == 1:
            raise refuse("parallel", "must be 'average' for one rank", self.parallel)
        positive_int("batch_size", self.batch_size)
        int_at_least("negatives", self.negatives, 0)
        int_at_least("retain_chunks", self.retain_chunks, 0)
        if self.retain_chunks and self.step != "grad_cache":
            raise refuse("retain_chunks", "must be 0 unless step is 'grad_cache'", self.retain_chunks)
        one_of("gradient_checkpointing", self.gradient_checkpointing, CHECKPOINTING)
        if self.lora is not None and not isinstance(self.lora, LoRA):
            raise refuse("lora", "must be a gclib.models.adapters.LoRA, or None", self.lora)
        one_of("device", self.device, DEVICES)
        for name in ("dtype",) if self.autocast is None else ("dtype", "autocast"):
            value = getattr(self, name)
            if not (isinstance(value, torch.dtype) and value.is_floating_point):
                raise refuse(name, "must be a floating point torch.dtype", value)
        if self.loss is None:
            object.__setattr__(self, "loss", ContrastiveLoss())
        if not callable(self.loss):
            raise refuse("loss", "must be callable", type(self.loss).__name__)
        self._check_model()
        self._check_positions()
        _ = self.lengths, self.cut

    def _check_model(self) -> None:
        """A config or encoders, and two of them."""
        if (self.config is None) == (self.encoders is None):
            raise refuse("config", "or encoders: exactly one of them must be given", f"config={self.config!r}")
        if self.encoders is None:
            if isinstance(self.config, (list, tuple)) and len(self.config) != 2:
                raise refuse("config", "must be one config, or one for each of the two towers", self.config)
            return
        made = {name: getattr(self, name) for name in ("pooling", "gradient_checkpointing", "lora")}
        made["dtype"] = self.dtype if self.dtype != torch.float32 else None
        if any(made.values()):
            rule = "gradient_checkpointing, lora and dtype must be left alone beside encoders, which have their own"
            raise refuse("pooling,", rule, ", ".join(f"{name}={value!r}" for name, value in made.items()))
        if len(self.encoders) != 2 or not all(isinstance(encoder, nn.Module) for encoder in self.encoders):
            raise refuse("encoders", "must be two modules, the same one twice where tied", self.encoders)

    def _check_positions(self) -> None:
        """ValueError for rows that are longer than a model's positions: it would not run."""
        if self.encoders is None:
            configs = [config for config, _ in self.configs]
        else:
            configs = [getattr(getattr(encoder, "model", encoder), "config", None) for encoder in self.encoders]
        for name, width, config in zip(LENGTHS, self.widths, (configs[0], configs[-1]), strict=True):
            room = positions_of(config)
            if room is not None and width is not None and width > room:
                raise refuse(name, f"must be at most the model's {room} tokens", width)

    @property
    def rows(self) -> tuple[int, int]:
        """(B, N): the rows of each tower."""
        return self.batch_size, self.batch_size * (1 + self.negatives)

    @cached_property
    def configs(self) -> list[tuple[Any, str]]:
        """(config, pooling) of each encoder to be made: one for tied towers, else one for each."""
        separate = isinstance(self.config, (list, tuple))
        sizes = self.config if separate else [self.config] * (1 if self.tied else 2)
        return [(config_for(size), pooling_for(size, self.pooling)) for size in sizes]

    @cached_property
    def lengths(self) -> tuple[Any, Any]:
        """Each tower's tokens a row: an int for a padded batch, a list with one int a row, None for pictures."""
        lengths: list[Any] = []
        for name, count in zip(LENGTHS, self.rows, strict=True):
            length = getattr(self, name)
            if isinstance(length, Sequence) and not isinstance(length, str):
                if len(length) != count:
                    raise refuse(name, f"must be one int or one for each of the {count} rows", f"{len(length)} values")
                lengths.append([positive_int(name, value) for value in length])
            else:
                lengths.append(None if length is None else positive_int(name, length))
        return lengths[0], lengths[1]

    @property
    def widths(self) -> tuple[int | None, int | None]:
        """Each tower's tokens a row of the padded batch; None for pictures."""
        first, second = (max(length) if isinstance(length, list) else length for length in self.lengths)
        return first, second

    @property
    def padded(self) -> bool:
        """Whether all rows of a tower have one length."""
        return not any(isinstance(length, list) for length in self.lengths)

    @cached_property
    def cut(self) -> tuple[str, tuple[int, ...]]:
        """How towers are cut into chunks: by "chunk_size" or "chunk_tokens", and its value for each (none: uncut)."""
        sizes = {"chunk_size": self.chunk_size, "chunk_tokens": self.chunk_tokens}
        for name, value in sizes.items():
            if value is not None and name not in CUTS[self.step]:
                raise refuse(name, f"must be None for step {self.step!r}", value)
        if self.step == "naive":
            return "chunk_size", ()
        if None not in sizes.values():
            raise refuse("chunk_size", "and chunk_tokens: exactly one of them must be given", sizes)
        name = "chunk_size" if self.chunk_tokens is None else "chunk_tokens"
        value = sizes[name]
        several = isinstance(value, (list, tuple))
        if several and (self.step == "accumulation" or len(value) != 2):
            raise refuse(name, "must be one int, or for gradient caching one a tower", value)
        return name, tuple(positive_int(name, each) for each in (value if several else (value, value)))

    @property
    def chunk_rows(self) -> tuple[int, ...]:
        """C of each tower of a padded batch: the rows of its full chunks; empty for the naive step."""
        name, values = self.cut
        if name == "chunk_size":
            return values
        return tuple(max(1, value // (width or 1)) for value, width in zip(values, self.widths, strict=True))

    @property
    def chunk_count(self) -> int:
        """Chunks of both towers."""
        if self.padded:
            return sum(-(-count // size) for count, size in zip(self.rows, self.chunk_rows, strict=True))
        return sum(map(len, self.chunks()))

    def chunks(self) -> list[list[Chunk]]:
        """Each tower's chunks for gradient caching, as the step plans them on the device."""
        name, values = self.cut
        call_tokens, chunks = price_of_a_call(self.device) if self.ranks == 1 else None, []
        for length, count, value in zip(self.lengths, self.rows, values, strict=True):
            lengths = length if isinstance(length, list) else [length or 1] * count
            chunks.append(plan_chunks(lengths, call_tokens=call_tokens, **{name: value}))
        return chunks

    def keywords(self) -> dict[str, Any]:
        """The fields beside the step that are not at their default: what a call of `forecast_step` has to say."""
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(self)[1:]}
        return {name: value for name, (value, default) in values.items() if value is not default and value != default}
