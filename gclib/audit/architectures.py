"""Architectures of transformers, made small: what `gclib.audit.zoo` tries the steps on. Fresh weights, no network.

Encoders and decoders of texts (decoders padded on either side), of pictures, of sound, and pairs of a text's and a
picture's. Sizes are tiny; everything that an architecture does to tokens, windows, blocks and positions is its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.models.encoder import Encoder, load_transformers

KINDS = ("texts", "texts without a mask", "pictures", "waves", "spectrograms")


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo: how a small encoder is built, and what it is given.

    config: name of a transformers config class; settings: its arguments. model: name of the model class, None for the
    one that AutoModel takes, "encoder" for the encoder half of it. kind: one of `KINDS`. pooling: as `Encoder`'s,
    "frames" (the mean over time) or "flat" (the pooler's output in one row). padding: the side, for texts.
    """

    name: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    kind: str = "texts"
    pooling: str = "mean"
    padding: str = "right"

    def build(self, dropout: bool = False) -> nn.Module:
        """The encoder in training mode. dropout: as the config has it; else none.

        Its weights are wider than fresh ones: of those all representations are nearly one, their gradient is a SMALL
        difference, and attention is nearly even, so that mistakes are small too.
        """
        import transformers

        load_transformers()
        config = getattr(transformers, self.config)(**self.settings)
        if not dropout:
            no_dropout(config)
        config._experts_implementation = "eager"  # grouped products are not to be had in float64
        if self.model in (None, "encoder"):
            model = transformers.AutoModel.from_config(config)
            model = model.get_encoder() if self.model else model
        else:
            model = getattr(transformers, self.model)(config)
        wrappers = {"frames": Frames, "flat": Flat}
        encoder = wrappers[self.pooling](model) if self.pooling in wrappers else Encoder(model, pooling=self.pooling)
        with torch.no_grad():
            for weight in (p for p in encoder.parameters() if p.ndim > 1):
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        return encoder.train()


class Frames(nn.Module):
    """A model of sound: the mean over the frames that stand for something -> unit vectors (rows, D)."""

    main_input_name = "input_values"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, attention_mask: Tensor | None = None, **sound: Tensor) -> Tensor:
        """input_values (rows, samples) or input_features (rows, ...) -> (rows, D)."""
        if attention_mask is not None:
            sound["attention_mask"] = attention_mask
        frames = self.model(**sound).last_hidden_state
        if attention_mask is None:
            return F.normalize(frames.mean(1), dim=-1)
        if frames.shape[1] == attention_mask.shape[1]:
            mask = attention_mask
        else:
            mask = self.model._get_feature_vector_attention_mask(frames.shape[1], attention_mask)
        weights = mask.to(frames.dtype).unsqueeze(-1)
        return F.normalize((frames * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


class Flat(nn.Module):
    """A model of pictures: its pooler's output (rows, D, 1, 1) -> unit vectors (rows, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (rows, channels, height, width) -> (rows, D)."""
        return F.normalize(self.model(pixel_values).pooler_output.flatten(1), dim=-1)


def no_dropout(config: Any) -> None:
    """Every rate of dropout, of dropped paths and of dropped layers in a config set to 0."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            no_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
GROUPED = SIZE | {"num_key_value_heads": 1, "head_dim": 16}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
BART = {"d_model": 32, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0} | {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
PICTURE = {k: v for k, v in SIZE.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
WAVE = SIZE | {
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (6, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 4,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
}
QUIET = {"apply_spec_augment": False}


SMALL = {"embedding_size": 32}
ENCODERS = [
    Architecture("BERT", "BertConfig", SIZE),
    Architecture("BERT, cls", "BertConfig", SIZE, pooling="cls"),
    Architecture("BERT, pooler", "BertConfig", SIZE, pooling="own"),
    Architecture("BERT, left", "BertConfig", SIZE, padding="left"),
    Architecture("RoBERTa", "RobertaConfig", SIZE | {"pad_token_id": 0}),
    Architecture("XLM-R", "XLMRobertaConfig", SIZE | {"pad_token_id": 0}, pooling="cls"),
    Architecture("CamemBERT", "CamembertConfig", SIZE | {"pad_token_id": 0}),
    Architecture("ALBERT", "AlbertConfig", SIZE | {"embedding_size": 16}),
    Architecture("DistilBERT", "DistilBertConfig", SIZE | {"hidden_dim": 48}),
    Architecture("ELECTRA", "ElectraConfig", SIZE | {"embedding_size": 16}),
    Architecture("MPNet", "MPNetConfig", SIZE | {"pad_token_id": 0}),
    Architecture("DeBERTa", "DebertaConfig", SIZE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Architecture("DeBERTa-v2, convolution", "DebertaV2Config", SIZE | {"conv_kernel_size": 3, "conv_act": "gelu"}),
    Architecture(
        "DeBERTa-v3",
        "DebertaV2Config",
        SIZE
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "share_att_key": True,
        },
    ),
    Architecture("ModernBERT", "ModernBertConfig", SIZE | SPECIAL | {"local_attention": 6}),
    Architecture("RoFormer", "RoFormerConfig", SIZE | SMALL),
    Architecture("FNet", "FNetConfig", SIZE),
    Architecture("ConvBERT", "ConvBertConfig", SIZE | SMALL),
    Architecture(
        "Funnel",
        "FunnelConfig",
        {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48, "block_sizes": [1, 1], "vocab_size": 64},
        "FunnelModel",
    ),
    Architecture("BigBird, full", "BigBirdConfig", SIZE | {"attention_type": "original_full"}),
    Architecture("BigBird, sparse", "BigBirdConfig", SIZE | {"block_size": 2, "num_random_blocks": 1}),
    Architecture("Longformer", "LongformerConfig", SIZE | {"attention_window": [4, 4], "pad_token_id": 0}),
    Architecture("XLNet", "XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "vocab_size": 64}),
    Architecture(
        "MobileBERT",
        "MobileBertConfig",
        SIZE | SMALL | {"true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    ),
    Architecture(
        "SqueezeBERT",
        "SqueezeBertConfig",
        SIZE | SMALL | {f"{part}_groups": 1 for part in ("q", "k", "v", "intermediate", "output", "post_attention")},
        pooling="own",
    ),
    Architecture("Nomic", "NomicBertConfig", SIZE),
    Architecture("EuroBERT", "EuroBertConfig", GROUPED | SPECIAL),
    Architecture("Jina v3", "JinaEmbeddingsV3Config", SIZE | {"pad_token_id": 0}),
    Architecture("RemBERT", "RemBertConfig", SIZE | {"input_embedding_size": 16}),
    Architecture("MegatronBERT", "MegatronBertConfig", SIZE),
    Architecture(
        "ESM", "EsmConfig", SIZE | {"pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary"}
    ),
    Architecture("I-BERT", "IBertConfig", SIZE | {"pad_token_id": 0}),
    Architecture("LayoutLM", "LayoutLMConfig", SIZE, pooling="own"),
    Architecture(
        "CANINE",
        "CanineConfig",
        SIZE | {"num_hash_buckets": 64, "local_transformer_stride": 4, "downsampling_rate": 4},
    ),
    Architecture("YOSO", "YosoConfig", SIZE | {"use_expectation": True}),
    Architecture("XLM", "XLMConfig", {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64}),
    Architecture("T5 encoder", "T5Config", T5, "T5EncoderModel"),
    Architecture("mT5 encoder", "MT5Config", T5, "MT5EncoderModel"),
    Architecture("LongT5 encoder", "LongT5Config", T5 | {"local_radius": 2}, "LongT5EncoderModel"),
    Architecture(
        "Switch encoder",
        "SwitchTransformersConfig",
        T5 | {"num_experts": 2, "expert_capacity": 2, "num_sparse_encoder_layers": 1},
        "SwitchTransformersEncoderModel",
    ),
    Architecture("BART encoder", "BartConfig", BART, "encoder"),
    Architecture("M2M-100 encoder", "M2M100Config", BART, "encoder"),
]


LANGUAGE_MODELS = [
    ("GPT-2", "GPT2Config", GPT),
    (
        "GPT-Neo",
        "GPTNeoConfig",
        SIZE | {"intermediate_size": None, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    ("GPT-J", "GPTJConfig", GPT | {"rotary_dim": 8}),
    ("GPT-NeoX", "GPTNeoXConfig", SIZE),
    ("OPT", "OPTConfig", SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("BLOOM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    ("LLaMA", "LlamaConfig", GROUPED),
    ("Mistral", "MistralConfig", GROUPED | {"sliding_window": 4}),
    ("Qwen2", "Qwen2Config", SIZE | {"num_key_value_heads": 1}),
    ("Qwen3", "Qwen3Config", GROUPED),
    ("Gemma", "GemmaConfig", GROUPED),
    ("Gemma 2", "Gemma2Config", GROUPED | {"sliding_window": 6}),
    (
        "Gemma 3",
        "Gemma3TextConfig",
        GROUPED | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    ("Phi-3", "Phi3Config", SIZE | {"num_key_value_heads": 1, "pad_token_id": 0}),
    ("Mixtral", "MixtralConfig", GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    (
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    ("Mamba", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4}),
]
DECODERS = [
    *(
        Architecture(f"{name}, {side}", config, settings, pooling="last", padding=side)
        for name, config, settings in LANGUAGE_MODELS
        for side in ("right", "left")
    ),
    Architecture(
        "EmbeddingGemma",
        "Gemma3TextConfig",
        GROUPED
        | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
        | {"use_bidirectional_attention": True},
    ),
]


STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CONVNEXT = STAGES | {"num_stages": 2, "image_size": 32}
PICTURE_MODELS = [
    ("ViT", "ViTConfig", PICTURE, "cls"),
    ("DeiT", "DeiTConfig", PICTURE, "cls"),
    ("BEiT", "BeitConfig", PICTURE, "own"),
    (
        "Swin",
        "SwinConfig",
        {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 2, "image_size": 16, "patch_size": 2},
        "own",
    ),
    ("ConvNeXt", "ConvNextConfig", CONVNEXT, "own"),
    ("ConvNeXt V2", "ConvNextV2Config", CONVNEXT, "own"),
    ("ResNet", "ResNetConfig", STAGES | {"embedding_size": 8}, "flat"),
    ("DINOv2", "Dinov2Config", PICTURE, "own"),
    ("DINOv3", "DINOv3ViTConfig", PICTURE | {"num_register_tokens": 2}, "own"),
    ("ViT-MAE, random masks", "ViTMAEConfig", PICTURE, "cls"),
]
SOUND_MODELS = [
    ("Wav2Vec2", "Wav2Vec2Config", QUIET),
    ("Wav2Vec2, SpecAugment", "Wav2Vec2Config", {"mask_time_length": 2, "mask_time_prob": 0.3}),
    (
        "Wav2Vec2, layer norm",
        "Wav2Vec2Config",
        QUIET | {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
    ("HuBERT", "HubertConfig", QUIET),
    ("WavLM", "WavLMConfig", QUIET),
]
CLIP = {"projection_dim": 16}
CLIP_TEXT, CLIP_PICTURE = SIZE | CLIP | {"max_position_embeddings": 20, "eos_token_id": 2}, PICTURE | CLIP
SIGLIP_TEXT = SIZE | {"max_position_embeddings": 20, "projection_size": 32}
OTHERS = [
    *(
        Architecture(name, config, settings, kind="pictures", pooling=pooling)
        for name, config, settings, pooling in PICTURE_MODELS
    ),
    *(
        Architecture(name, config, WAVE | settings, kind="waves", pooling="frames")
        for name, config, settings in SOUND_MODELS
    ),
    Architecture(
        "Whisper encoder",
        "WhisperConfig",
        BART | {"num_mel_bins": 8, "max_source_positions": 8},
        "encoder",
        kind="spectrograms",
        pooling="frames",
    ),
    Architecture(
        "AST", "ASTConfig", PICTURE | {"num_mel_bins": 16, "max_length": 16}, kind="spectrograms", pooling="own"
    ),
    Architecture("CLIP text", "CLIPTextConfig", CLIP_TEXT, "CLIPTextModelWithProjection", pooling="own"),
    Architecture(
        "CLIP vision",
        "CLIPVisionConfig",
        CLIP_PICTURE,
        "CLIPVisionModelWithProjection",
        kind="pictures",
        pooling="own",
    ),
    Architecture(
        "SigLIP text",
        "SiglipTextConfig",
        SIGLIP_TEXT,
        "SiglipTextModel",
        kind="texts without a mask",
        pooling="own",
    ),
    Architecture("SigLIP text, masked", "SiglipTextConfig", SIGLIP_TEXT, "SiglipTextModel", pooling="own"),
    Architecture("SigLIP vision", "SiglipVisionConfig", PICTURE, kind="pictures", pooling="own"),
]


ARCHITECTURES = {entry.name: entry for entry in (*ENCODERS, *DECODERS, *OTHERS)}
# A text's encoder beside a picture's: the rows of the zoo with two towers.
PAIRS = {
    "CLIP": ("CLIP text", "CLIP vision"),
    "SigLIP": ("SigLIP text", "SigLIP vision"),
    "BERT and ViT": ("BERT, cls", "ViT"),
}
