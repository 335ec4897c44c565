"""What a folder of sentence-transformers says beside a model's weights: pooling, layers behind it, length, prompts.

Read whole, or refused by the name of what can't be read: a layer that is left out gives other vectors without a word.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from gclib.models.layers import Dense, Norm, Pooling, UnitLength
from gclib.support.validation import positive_int, refuse

MODULES = "sentence_transformers.models"  # where every version since 2 finds its modules
# Ours -> theirs: the name of newer versions; before them a flag pooling_mode_..., in the order in which several are put
POOLING_NAMES = {
    "cls": ("cls", "cls_token"),
    "max_tokens": ("max", "max_tokens"),
    "mean": ("mean", "mean_tokens"),
    "mean_sqrt": ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    "weighted_mean": ("weightedmean", "weightedmean_tokens"),
    "last": ("lasttoken", "lasttoken"),
}
TRANSFORMER_FILES = ["sentence_bert_config.json"] + [
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
MODEL_OPTIONS = ("dtype", "torch_dtype", "attn_implementation")  # of how weights are kept and attention is computed
TEXT_AS_IT_IS = {"method": "forward", "method_output_name": "last_hidden_state"}


@dataclass(frozen=True)
class TextRules:
    """How texts become an encoder's tokens, as far as a folder of sentence-transformers says it.

    max_length: tokens that a text is cut to, None where nothing is said. prompts: name -> text that is put before
    others ("query", "document"), default_prompt: the name of the one that is put before all. similarity: how its
    vectors are compared.
    """

    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"


@dataclass(frozen=True)
class SentenceFolder:
    """Where the weights lie, how token vectors are pooled, what stands behind, and how texts are prepared."""

    weights: str
    pooling: Pooling
    head: tuple[nn.Module, ...]
    normalize: bool
    rules: TextRules


def read_sentence_folder(place: str) -> SentenceFolder | None:
    """What the folder (or name on the hub) says; None where it has no modules.json. ValueError for what we have not."""
    modules = _read_json(place, "modules.json")
    if modules is None:
        return None
    kinds = [_kind(module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise _refused("must list a Transformer, a Pooling and layers behind them", ", ".join(kinds))
    paths = [str(module["path"]) for module in modules]
    layers = [_layer(place, path, kind) for kind, path in zip(kinds[2:], paths[2:], strict=True)]
    normalize = bool(layers) and isinstance(layers[-1], UnitLength)
    rules = _text_rules(place, paths[0])
    pooling = _pooling(_read_json(place, f"{paths[1]}/config.json") or {}, rules)
    return SentenceFolder(paths[0], pooling, tuple(layers[:-1] if normalize else layers), normalize, rules)


def write_sentence_folder(folder: Path, encoder: Any, max_length: int) -> None:
    """The files that sentence-transformers reads, as versions since 2 know them, of an encoder that pools tokens."""
    layers = [*(encoder.head or ()), *[UnitLength()] * encoder.normalize]
    kinds = ["Transformer", "Pooling", *(_KINDS[type(layer)] for layer in layers)]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{MODULES}.{kind}"}
        for number, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    _write_json(folder / "modules.json", modules)
    width = encoder.model.config.get_text_config().hidden_size
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(encoder.pooling, width))
    for path, layer in zip(paths[2:], layers, strict=True):
        _write_layer(folder / path, layer)
    rules = encoder.rules
    words = {"max_seq_length": max_length, "do_lower_case": rules.lower_case}
    _write_json(folder / "sentence_bert_config.json", words)
    about = {"similarity_fn_name": rules.similarity}
    if rules.prompts:
        about |= {"prompts": dict(rules.prompts), "default_prompt_name": rules.default_prompt}
    _write_json(folder / "config_sentence_transformers.json", about)


def find_file(place: str, name: str) -> Path | None:
    """A file of a folder, or of a name on the hub; None where it has none. OSError where that can't be known."""
    if Path(place).exists():
        return path if (path := Path(place) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(place, name))
    except LocalEntryNotFoundError as error:
        raise OSError(f"{name} of {place} is not here and can't be downloaded") from error
    except EntryNotFoundError:
        return None
    except ValueError as error:
        raise OSError(f"there is no such folder, and no such name: {error}") from error


def _refused(rule: str, got: object) -> ValueError:
    return refuse("modules.json", rule, got)


def _kind(module: Any) -> str:
    """The last word of a module's type: Transformer, Pooling, Dense."""
    if not isinstance(module, Mapping) or not {"type", "path"} <= set(module):
        raise _refused("must list modules with type and path", str(module))
    package, _, kind = str(module["type"]).rpartition(".")
    if package.partition(".")[0] != "sentence_transformers" or kind not in ("Transformer", "Pooling", *_KINDS.values()):
        rule = f"must list modules of Transformer, Pooling, {', '.join(_KINDS.values())} and no others"
        raise _refused(rule, str(module["type"]))
    if Path(module["path"]).is_absolute() or ".." in Path(module["path"]).parts:
        raise _refused("must keep its modules inside the folder", module["path"])
    return kind


def _text_rules(place: str, path: str) -> TextRules:
    """Length, case, prompts and similarity; ValueError for a rule that we do not follow."""
    files = (_read_json(place, f"{path}/{name}" if path else name) for name in TRANSFORMER_FILES)
    settings = dict(next((content for content in files if content), {}))
    max_length, lower_case = settings.pop("max_seq_length", None), bool(settings.pop("do_lower_case", False))
    if max_length is not None:
        positive_int("sentence_bert_config.json: max_seq_length", max_length)
    else:
        max_length = _length_of_weights(place, path)
    for name in ("model_args", "model_kwargs"):
        settings[name] = {key: value for key, value in settings.get(name, {}).items() if key not in MODEL_OPTIONS}
    known = {
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "unpad_inputs": settings.get("unpad_inputs"),
        "modality_config": {**settings.get("modality_config", {}), "text": TEXT_AS_IT_IS},
    }
    for name, value in settings.items():
        if value and value != known.get(name):
            raise refuse(f"sentence_bert_config.json: {name}", f"must be {known.get(name) or 'left out'}", str(value))
    about = _read_json(place, "config_sentence_transformers.json") or {}
    if about.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise refuse(
            "config_sentence_transformers.json: model_type", "must be SentenceTransformer", about["model_type"]
        )
    prompts = {name: text for name, text in (about.get("prompts") or {}).items() if text is not None}
    similarity = about.get("similarity_fn_name") or "cosine"
    return TextRules(max_length, lower_case, prompts, about.get("default_prompt_name"), similarity)


def _length_of_weights(place: str, path: str) -> int | None:
    """The length where sentence-transformers says none: the tokenizer's, or the model's where that is less."""
    names = {"tokenizer_config.json": "model_max_length", "config.json": "max_position_embeddings"}
    contents = {name: _read_json(place, f"{path}/{name}" if path else name) or {} for name in names}
    lengths = [contents[name].get(key) for name, key in names.items()]
    return min((length for length in lengths if isinstance(length, int) and length > 0), default=None)


def _pooling(config: Mapping[str, Any], rules: TextRules) -> Pooling:
    """Our name for what 1_Pooling/config.json says, a tuple where several are put behind one another."""
    modes = config.get("pooling_mode")
    if modes is None:
        known = {f"pooling_mode_{flag}": ours for ours, (_, flag) in POOLING_NAMES.items()}
        flags = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
        ours = [name for flag, name in known.items() if flag in flags] or ["mean"]
    else:
        known = {theirs: name for name, (theirs, _) in POOLING_NAMES.items()}
        flags = [modes] if isinstance(modes, str) else list(modes)
        ours = [known.get(mode, "") for mode in flags]
    if unknown := [flag for flag in flags if flag not in known]:
        raise refuse("1_Pooling/config.json", f"must pool by some of {', '.join(known)}", ", ".join(map(str, unknown)))
    if not config.get("include_prompt", True) and any(rules.prompts.values()):
        raise refuse("1_Pooling/config.json: include_prompt", "must be true: prompts are pooled with the text", "false")
    return ours[0] if len(ours) == 1 else tuple(ours)


def _pooling_config(pooling: Pooling, width: int) -> dict[str, Any]:
    """1_Pooling/config.json: flags, which every version knows, and the order of several where it is not theirs."""
    names = [pooling] if isinstance(pooling, str) else list(pooling)
    config: dict[str, Any] = {"word_embedding_dimension": width}
    for ours, (_, flag) in POOLING_NAMES.items():
        config[f"pooling_mode_{flag}"] = ours in names
    if names != [ours for ours in POOLING_NAMES if ours in names]:
        config["pooling_mode"] = [POOLING_NAMES[name][0] for name in names]
    return config


def _layer(place: str, path: str, kind: str) -> nn.Module:
    """A layer behind the pooling, with its weights."""
    config = dict(_read_json(place, f"{path}/config.json") or {})
    for name in ("module_input_name", "module_output_name"):
        if config.pop(name, None) not in (None, "sentence_embedding"):
            raise refuse(f"{path}/config.json: {name}", "must be sentence_embedding", "something else")
    if kind in ("Normalize", "Dropout"):
        return UnitLength() if kind == "Normalize" else nn.Dropout(config.get("dropout", 0.2))
    try:
        layer = _dense(config) if kind == "Dense" else Norm(config.pop("dimension"))
    except (KeyError, TypeError) as error:
        raise refuse(
            f"{path}/config.json", f"must describe a {kind} as sentence-transformers does", str(error)
        ) from error
    if unknown := [name for name, value in config.items() if value]:
        raise refuse(f"{path}/config.json", "must not say more than we can follow", ", ".join(unknown))
    weights = find_file(place, f"{path}/model.safetensors")
    if weights is None:
        raise refuse(f"{path}", "must hold its weights as model.safetensors (others may be pickled)", "none")
    try:
        layer.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise refuse(f"{path}/model.safetensors", f"must hold the weights of its {kind}", str(error)) from error
    return layer


def _dense(config: dict[str, Any]) -> Dense:
    """Takes what it reads out of the config."""
    name = config.pop("activation_function", "torch.nn.modules.activation.Tanh")
    activation = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise refuse("activation_function", "must be one of torch.nn", name)
    sizes = config.pop("in_features"), config.pop("out_features")
    options = {"bias": config.pop("bias", True), "residual": config.pop("use_residual", False)}
    return Dense(*sizes, activation=activation(), **options)


def _write_layer(folder: Path, layer: nn.Module) -> None:
    """A layer's config and weights as sentence-transformers keeps them."""
    config: dict[str, Any] = {}
    if isinstance(layer, Dense):
        kind, linear = type(layer.activation_function), layer.linear
        config = {"in_features": linear.in_features, "out_features": linear.out_features}
        config |= {"bias": linear.bias is not None, "activation_function": f"{kind.__module__}.{kind.__name__}"}
        config |= {"use_residual": True} if layer.adds_input else {}
    elif isinstance(layer, Norm):
        config = {"dimension": layer.norm.normalized_shape[0]}
    elif isinstance(layer, nn.Dropout):
        config = {"dropout": layer.p}
    _write_json(folder / "config.json", config)
    if state := layer.state_dict():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
        )


def _read_json(place: str, name: str) -> Any:
    """A file's content, None where there is none; ValueError where it can't be read."""
    path = find_file(place, name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise refuse(name, "must be a JSON file in UTF-8", str(error)) from error


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


_KINDS: dict[type, str] = {Dense: "Dense", Norm: "LayerNorm", UnitLength: "Normalize", nn.Dropout: "Dropout"}


def _is_kept_by_name(activation: nn.Module) -> bool:
    """Whether the class's name says all of an activation but how its output is stored."""
    with suppress(TypeError):  # a class that wants arguments
        same = re.sub(r"(, )?inplace=True", "", repr(activation)) == repr(type(activation)())
        return same and getattr(nn, type(activation).__name__, None) is type(activation)
    return False


def check_head(head: Sequence[nn.Module]) -> nn.ModuleList | None:
    """The layers behind a pooling, if each is one that a folder can keep; None for none. ValueError."""
    for layer in head:
        if type(layer) not in _KINDS:
            raise refuse(
                "head", f"must hold layers of {', '.join(kind.__name__ for kind in _KINDS)}", type(layer).__name__
            )
        if isinstance(layer, Dense) and not _is_kept_by_name(layer.activation_function):
            rule = "must hold activations of torch.nn with their defaults: a folder keeps an activation's name alone"
            raise refuse("head", rule, repr(layer.activation_function))
    return nn.ModuleList(head) if head else None
