"""Transformers configs of well-known encoders: sizes to forecast with, without weights and without a network.

Each preset builds what its source's config.json describes. `config_of` also reads a config.json of your own.
"""

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from gclib.support.validation import refuse


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    config: name of a transformers config class; settings: its arguments where they are not the class's defaults.
    pooling: how the source turns tokens into representations. parameters: numbers in `Encoder.from_config(name)`,
    which leaves out a pooler that pooling does not use. source: whose config.json this is, on huggingface.co.
    """

    config: str
    pooling: str
    parameters: int
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


QWEN3_LARGE = {  # what the larger ones have in common
    "vocab_size": 151_665,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
PRESETS: dict[str, Preset] = {
    "bert-base-uncased": Preset(
        "BertConfig", "cls", 108_891_648, "google-bert/bert-base-uncased, the encoder of DPR (Karpukhin et al. 2020)"
    ),
    "minilm-l6": Preset(
        "BertConfig",
        "mean",
        22_565_376,
        "sentence-transformers/all-MiniLM-L6-v2",
        {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    ),
    "distilbert-base": Preset("DistilBertConfig", "mean", 66_362_880, "distilbert/distilbert-base-uncased"),
    "xlm-roberta-base": Preset(
        "XLMRobertaConfig",
        "mean",
        277_453_056,
        "intfloat/multilingual-e5-base",
        {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "mpnet-base": Preset(
        "MPNetConfig",
        "mean",
        108_895_872,
        "sentence-transformers/all-mpnet-base-v2",
        {"max_position_embeddings": 514, "layer_norm_eps": 1e-5},
    ),
    "modernbert-base": Preset("ModernBertConfig", "mean", 149_014_272, "answerdotai/ModernBERT-base"),
    "embeddinggemma-300m": Preset(
        "Gemma3TextConfig",
        "mean",
        302_863_104,
        "google/embeddinggemma-300m, without the two dense layers behind its pooling",
        {
            "vocab_size": 262_144,
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 2048,
            "sliding_window": 512,
            "use_bidirectional_attention": True,
        },
    ),
    "bge-large": Preset(
        "BertConfig",
        "cls",
        334_092_288,
        "BAAI/bge-large-en-v1.5",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "clip-vit-b-32-text": Preset(
        "CLIPTextConfig",
        "own",
        63_428_096,
        "openai/clip-vit-base-patch32, text tower with its projection",
        {"architectures": ["CLIPTextModelWithProjection"]},
    ),
    "clip-vit-b-32-vision": Preset(
        "CLIPVisionConfig",
        "own",
        87_849_216,
        "openai/clip-vit-base-patch32, vision tower with its projection",
        {"architectures": ["CLIPVisionModelWithProjection"]},
    ),
    "clip-vit-l-14-text": Preset(
        "CLIPTextConfig",
        "own",
        123_650_304,
        "openai/clip-vit-large-patch14, text tower with its projection",
        {
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
    ),
    "clip-vit-l-14-vision": Preset(
        "CLIPVisionConfig",
        "own",
        303_966_208,
        "openai/clip-vit-large-patch14, vision tower with its projection",
        {
            "architectures": ["CLIPVisionModelWithProjection"],
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 768,
        },
    ),
    "qwen3-0.6b": Preset(
        "Qwen3Config",
        "last",
        595_776_512,
        "Qwen/Qwen3-Embedding-0.6B",
        {
            "vocab_size": 151_669,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": Preset(
        "Qwen3Config",
        "last",
        4_021_774_336,
        "Qwen/Qwen3-Embedding-4B",
        QWEN3_LARGE | {"hidden_size": 2560, "intermediate_size": 9728},
    ),
    "qwen3-8b": Preset(
        "Qwen3Config",
        "last",
        7_567_295_488,
        "Qwen/Qwen3-Embedding-8B",
        QWEN3_LARGE | {"hidden_size": 4096, "intermediate_size": 12_288},
    ),
    "e5-mistral-7b": Preset(
        "MistralConfig",
        "last",
        7_110_660_096,
        "intfloat/e5-mistral-7b-instruct",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 32_768,
        },
    ),
}


def config_of(name_or_path: str | Path) -> Any:
    """The transformers config of a preset, of a config.json, or of the folder that one lies in.

    Nothing is downloaded. ValueError for a name that is no preset and no file, for a file that describes no model that
    transformers knows, and for one that describes two towers at once.
    """
    import transformers

    preset = PRESETS.get(str(name_or_path))
    if preset is not None:
        return getattr(transformers, preset.config)(**preset.settings)
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(PRESETS)
        raise refuse("config", f"must be one of {known}, or the path of a config.json", str(name_or_path))
    return _read_config(path)


def _read_config(path: Path) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        written = json.loads(path.read_text("utf-8"))
        kind = written.get("model_type")
    except (ValueError, AttributeError) as error:
        raise refuse("config", "must be a config.json that transformers wrote", str(path)) from error
    if kind not in CONFIG_MAPPING:
        raise refuse("config", "must name a model_type that transformers knows", f"{kind!r} in {path}")
    config = CONFIG_MAPPING[kind].from_dict(written)
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        raise refuse("config", "must describe one tower: give its text_config or vision_config", str(path))
    return config


def positions_of(config: Any) -> int | None:
    """The longest row that the positions of a config's model hold; None where the config names no limit.

    RoBERTa and its kin count from the padding token's number + 1, so that of 514 positions 512 are for tokens.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    return limit - (config.pad_token_id or 0) - 1 if _counts_from_padding(type(config)) else limit


@lru_cache(maxsize=64)
def _counts_from_padding(kind: type) -> bool:
    """Whether the source of a config's model makes positions of the token ids, as fairseq's models do."""
    import transformers

    models = transformers.MODEL_MAPPING
    source = inspect.getsourcefile(models[kind]) if kind in models else None
    return source is not None and "create_position_ids_from_input" in Path(source).read_text("utf-8")


def build_model(config: Any) -> Any:
    """The transformers model of a config, with fresh weights, of the class that `model_class` chooses."""
    kind, config = model_class(config), copy.deepcopy(config)
    return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def model_class(config: Any) -> Any:
    """The transformers class of a config: with its projection, or an encoder alone, where the config says so.

    Of a model with encoder and decoder the encoder, where transformers has it by itself (T5 and its kin); ValueError
    otherwise: such a model (BART) would represent what its decoder makes of a text.
    """
    import transformers

    architecture = next(iter(config.architectures or ()), "")
    if architecture.endswith(("WithProjection", "EncoderModel")) and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    if not getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModel
    kind = getattr(transformers, type(config).__name__.removesuffix("Config") + "EncoderModel", None)
    if kind is None:
        rule = "must be of an encoder: this model has a decoder too, and transformers has no encoder of it by itself"
        raise refuse("config", rule, type(config).__name__)
    return kind
