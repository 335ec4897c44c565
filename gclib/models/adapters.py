"""LoRA: a frozen encoder with small trained matrices beside some of its own, by PEFT.

Hu et al. 2021 (arXiv 2106.09685): W x becomes W x + (alpha / rank) * B A dropout(x) with A (rank, inputs) and B
(outputs, rank); W is frozen, B starts at zero. What is saved is the small matrices (`save_model_folder` of the encoder)
or the model that they add up to (of `merged(encoder)`). PEFT is an optional extra: `pip install gclib[lora]`.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from gclib.support.validation import positive_int, positive_number, refuse

PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# What the projections of queries and values are called, or the one layer that makes them: adapted where none are named
# (Hu et al. 2021, section 7.1). The first line of which a model has all names is taken.
ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("Wqkv",),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("in_proj",),
)


@dataclass(frozen=True)
class LoRA:
    """What is trained beside a frozen encoder.

    rank: of each pair of matrices. alpha: the pair's product counts alpha / rank; None: alpha = 2 * rank. dropout: of
    what goes into the pairs, in training mode. targets: names of the layers that get a pair, as the last part of their
    path ("q_proj"), "all-linear" for every linear layer; None: those of queries and values in the attention. Raises
    ValueError.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        positive_int("rank", self.rank)
        if self.alpha is not None:
            positive_number("alpha", self.alpha)
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise refuse("dropout", "must be a number from 0 to below 1", self.dropout)
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        if names is None:
            return
        if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
            raise refuse("targets", "must be names of linear layers, or 'all-linear'", self.targets)
        object.__setattr__(self, "targets", "all-linear" if list(names) == ["all-linear"] else tuple(names))

    @property
    def scale(self) -> float:
        """alpha."""
        return 2 * self.rank if self.alpha is None else self.alpha


def add_lora(encoder: Any, lora: LoRA | None = None) -> Any:
    """Freeze all of an `Encoder` and put a trained pair beside each target; the encoder itself is returned.

    Before the first step its vectors are what they were. Pairs are float32 where the weights are bfloat16 or float16,
    as PEFT makes them, for small updates would be lost; else of the weights' dtype. Layers behind the pooling are
    frozen too. ValueError where PEFT is missing, for a model that has adapters or is none of transformers', and for
    targets that it has not.
    """
    check_peft("add_lora")
    from peft import LoraConfig

    lora, model = lora or LoRA(), encoder.model
    if not hasattr(model, "add_adapter"):
        raise refuse("encoder", "must hold a model of transformers, without adapters", type(model).__name__)
    if is_adapted(encoder):
        raise refuse("encoder", "must have no adapters yet: merge them first (gclib.models.adapters.merged)", "some")
    targets = targets_of(model, lora.targets)
    encoder.requires_grad_(False)
    names = targets if isinstance(targets, str) else list(targets)
    model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.scale, lora_dropout=lora.dropout, target_modules=names))
    _settle(model)
    return encoder


def _settle(model: nn.Module) -> None:
    """Fresh pairs in float32 where weights are halves, and in the mode of the layer that they stand beside."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    cast_adapter_dtype(model, "default")
    for _, layer in _adapted(model):
        if hasattr(layer, "get_base_layer"):
            layer.train(layer.get_base_layer().training)


def targets_of(model: nn.Module, targets: str | Sequence[str] | None = None) -> str | tuple[str, ...]:
    """The names of a model's layers that get a pair. ValueError, naming its linear layers, for names it has not."""
    if targets == "all-linear":
        return targets
    names = {path.rpartition(".")[2] for path, part in model.named_modules() if _is_linear(part)}
    if targets is None:
        targets = next((line for line in ATTENTION if names.issuperset(line)), None)
    if targets is None or (missing := [name for name in targets if name.rpartition(".")[2] not in names]):
        rule = f"must be some of this model's linear layers: {', '.join(sorted(names))}"
        raise refuse("targets", rule, ", ".join(missing) if targets else None)
    return tuple(targets)


def _is_linear(part: nn.Module) -> bool:
    """nn.Linear, or the layer of GPT-2's time that is one with its weight the other way round."""
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def is_adapted(encoder: nn.Module) -> bool:
    """Whether an encoder has adapters of PEFT in it."""
    return next(_adapted(encoder), None) is not None


def _adapted(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of each layer with an adapter, and of each part that is kept whole beside the frozen one."""
    if find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = BaseTunerLayer, ModulesToSaveWrapper
    yield from ((path, part) for path, part in encoder.named_modules() if isinstance(part, kinds))


def merged(encoder: Any) -> Any:
    """An encoder without adapters that gives the same vectors: W + (alpha / rank) * B A in place of each pair.

    The encoder that is given stays as it is. Weights that have no pair are shared with it, so that only those of the
    targets take memory; all of them can be trained again. ValueError for one without adapters.
    """
    if not is_adapted(encoder):
        raise refuse("encoder", "must have adapters", "one without")
    tensors = (*encoder.parameters(), *encoder.buffers())
    twin = copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors})
    layers = dict(_adapted(twin))
    with torch.no_grad():
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, _merged_layer(layer))
    if hasattr(twin.model, "get_base_model"):
        twin.model = twin.model.get_base_model()
    if getattr(twin.model, "_hf_peft_config_loaded", False):
        twin.model._hf_peft_config_loaded = False
        del twin.model.peft_config
    fresh: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in twin.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                setattr(module, name, fresh.setdefault(parameter, nn.Parameter(parameter.detach())))
    return twin


def _merged_layer(layer: Any) -> nn.Module:
    """The plain layer; its weight and bias are its own, for PEFT adds to them in place."""
    if not hasattr(layer, "merge"):
        return layer.modules_to_save[layer.active_adapters[0]]
    base = layer.get_base_layer()
    for name, parameter in list(base._parameters.items()):
        if parameter is not None:
            setattr(base, name, nn.Parameter(parameter.detach().clone()))
    layer.merge()
    return base


def load_adapter(model: nn.Module, folder: Path) -> list[str]:
    """Put the adapter of a folder into its base model; it is trained, the base is frozen. Returns the names of weights
    that the folder has not.
    """
    from peft import set_peft_model_state_dict

    model.requires_grad_(False)
    about = model.load_adapter(str(folder), is_trainable=True)
    _settle(model)
    state = load_file(folder / "adapter_model.safetensors")  # again, for beside bfloat16 it was rounded
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): value for name, value in state.items()})
    return sorted(about.missing_keys)


def base_of(config_file: Path, argument: str) -> str:
    """The model that an adapter_config.json was trained beside: a folder, or a name on the hub. ValueError for none."""
    check_peft(argument)
    try:
        base = json.loads(config_file.read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(argument, "must hold an adapter_config.json that PEFT wrote", str(config_file)) from error
    if not base:
        raise refuse(argument, "must hold an adapter that names its base model (base_model_name_or_path)", "none")
    return base


def check_peft(argument: str) -> None:
    """ValueError where PEFT is not installed."""
    if find_spec("peft") is None:
        raise refuse(argument, "needs PEFT, which is an extra: pip install 'gclib[lora]' (or peft)", "no PEFT")


def name_base(encoder: Any) -> None:
    """Write into the adapters where their base is, so that a saved adapter can be loaded again.

    A folder by its whole path. ValueError for a base with fresh weights, which no folder holds.
    """
    for config in encoder.model.peft_config.values():
        base = config.base_model_name_or_path or getattr(encoder.model, "name_or_path", "")
        if not base:
            rule = "must have a base that is kept somewhere: save the encoder, load it from there, then add the adapter"
            raise refuse("encoder", rule, "a base with fresh weights")
        config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base


def numbers_trained(encoder: nn.Module) -> int:
    """How many numbers of an encoder are trained."""
    return sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
