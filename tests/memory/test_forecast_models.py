"""The forecast against the ledger of the real step, byte for byte, for each architecture of the presets, made small."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers
from helpers.shares import a_share

from gclib import ContrastiveLoss, Encoder, forecast_step, record_memory
from gclib.memory.fake_modules import picture_shape
from gclib.models.presets import PRESETS, config_of
from gclib.steps import STEPS
from tests.memory.test_ledger import batch

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
}
CLIP = SMALL | {"projection_dim": 16}
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 16, "layer_types": None}
SPECIAL_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
NARROWED = {
    "bert-base-uncased": SMALL,
    "distilbert-base": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "vocab_size": 512},
    "xlm-roberta-base": SMALL,
    "mpnet-base": SMALL,
    "modernbert-base": SMALL | {"num_hidden_layers": 4, "layer_types": None, "local_attention": 6, **SPECIAL_TOKENS},
    "embeddinggemma-300m": DECODER | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "clip-vit-b-32-text": CLIP | {"max_position_embeddings": 16},
    "clip-vit-b-32-vision": CLIP | {"image_size": 16, "patch_size": 4},
    "qwen3-0.6b": DECODER,
}


def small(name, **changed):
    """The preset's config with fewer and narrower layers."""
    described = config_of(name).to_dict() | NARROWED[name] | changed
    return type(config_of(name))(**{key: value for key, value in described.items() if value is not None})


def fed(encoder, rows, width):
    """A padded batch with a masked column, so that the real step keeps the mask; or pictures."""
    if width is None:
        return {"pixel_values": torch.rand(rows, *picture_shape(encoder))}
    return batch(rows, width)


def both(step, name, *, batch_size, negatives=0, lengths=(8, 12), tied=True, loss=None, autocast=None, **options):
    """(forecast, ledger) of one configuration."""
    changed = {"num_hidden_layers": options.pop("layers")} if "layers" in options else {}
    configs = [small(each, **changed) for each in (name if isinstance(name, tuple) else (name,))]
    pooling = options.pop("pooling", PRESETS[name if isinstance(name, str) else name[0]].pooling)
    made = configs if tied or len(configs) == 2 else configs * 2
    encoders = [Encoder.from_config(copy.deepcopy(config), pooling=pooling) for config in made]
    for encoder in encoders:
        encoder.train().to(options.get("dtype", torch.float32))
        if options.get("gradient_checkpointing"):
            encoder.checkpoint_activations()
    encoders = [encoders[0], encoders[-1]]
    loss = loss or ContrastiveLoss()
    rows = (batch_size, batch_size * (1 + negatives))
    inputs = [fed(*given) for given in zip(encoders, rows, lengths, strict=True)]
    told = {key: options[key] for key in ("chunk_size", "chunk_tokens", "retain_chunks") if key in options}
    told |= {"verify": "never"} if step == "grad_cache" else {}
    modules = [module for module in (*encoders, loss) if isinstance(module, torch.nn.Module)]
    with torch.autocast("cpu", autocast) if autocast else nullcontext(), record_memory(*modules) as ledger:
        STEPS[step](encoders, inputs, loss, on_phase=ledger.on_phase, **told)
    forecast = forecast_step(
        step,
        config=configs[0] if len(configs) == 1 else configs,
        pooling=pooling,
        loss=loss,
        tied=tied,
        batch_size=batch_size,
        negatives=negatives,
        query_length=lengths[0],
        passage_length=lengths[1],
        autocast=autocast,
        **options,
    )
    return forecast, ledger


def assert_equal(forecast, ledger, by_law=True):
    """Equal to the byte, kind by kind, and by a law."""
    assert (forecast.peak_bytes, forecast.at_peak()) == (ledger.peak_bytes, ledger.at_peak())
    assert forecast.exact_law == by_law


CASES = [
    ("naive", {"batch_size": 5}),
    ("accumulation", {"batch_size": 7, "chunk_size": 3}),
    ("grad_cache", {"batch_size": 7, "chunk_size": 3, "negatives": 1}),
    ("grad_cache", {"batch_size": 9, "chunk_size": 4, "retain_chunks": 2}),
    ("grad_cache", {"batch_size": 4, "chunk_size": 1, "tied": False}),
]


@pytest.mark.slow
@a_share(("name", "step", "options"), NARROWED, CASES, one_in=5)
def test_equal_to_the_byte(step, options, name):
    lengths = (None, None) if name.endswith("vision") else (8, 12)
    assert_equal(*both(step, name, lengths=lengths, **options))


BEHIND_A_LAYER = {
    "RoFormer, accumulation": ("RoFormerConfig", "accumulation", {"chunk_size": 2, "negatives": 1}),
    "RoFormer, gradient cache, one row": ("RoFormerConfig", "grad_cache", {"chunk_size": 1}),
    "RoFormer, gradient cache": ("RoFormerConfig", "grad_cache", {"chunk_size": 4, "retain_chunks": 1}),
    "ELECTRA, naive": ("ElectraConfig", "naive", {}),
    "ELECTRA, naive, one query": ("ElectraConfig", "naive", {"batch_size": 1, "negatives": 2}),
    "ELECTRA, gradient cache": ("ElectraConfig", "grad_cache", {"chunk_size": 4, "tied": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=(pytest.mark.deep,) * (place % 2)) for place, c in enumerate(BEHIND_A_LAYER)]
)
def test_normalizations_of_bfloat16_with_weights_of_float32(case):
    """Embeddings behind a linear layer are in bfloat16 under autocast, and so is what every layer normalizes."""
    name, step, options = BEHIND_A_LAYER[case]
    config = getattr(transformers, name)(**SMALL | {"num_hidden_layers": 1, "embedding_size": 16})
    options = {"batch_size": 5, "query_length": 3, "passage_length": 12, **options}
    loss, autocast = ContrastiveLoss(0.1, learnable=True, tile_size=4), torch.bfloat16
    forecast = forecast_step(step, config=copy.deepcopy(config), loss=loss, autocast=autocast, **options)
    made = [Encoder.from_config(copy.deepcopy(config)).train() for _ in range(1 if options.pop("tied", True) else 2)]
    rows, negatives = options.pop("batch_size"), options.pop("negatives", 0)
    lengths = options.pop("query_length"), options.pop("passage_length")
    inputs = [batch(count, width) for count, width in zip((rows, rows * (1 + negatives)), lengths, strict=True)]
    options |= {"verify": "never"} if step == "grad_cache" else {}
    with torch.autocast("cpu", autocast), record_memory(*made, loss) as ledger:
        STEPS[step]([made[0], made[-1]], inputs, loss, on_phase=ledger.on_phase, **options)
    assert (forecast.peak_bytes, forecast.at_peak()) == (ledger.peak_bytes, ledger.at_peak())


def late_interaction(query_reps, passage_reps):
    """ColBERT's score (Khattab and Zaharia 2020) in a softmax over the batch: token representations (rows, T, D)."""
    scores = torch.einsum("btd,nsd->bnts", query_reps, passage_reps).amax(dim=3).sum(dim=2)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


CACHED = {"batch_size": 7, "chunk_size": 3}
OPTIONS = {
    "bf16 autocast": {"autocast": torch.bfloat16, **CACHED},
    "bf16 autocast, retained": {"autocast": torch.bfloat16, "retain_chunks": 2, **CACHED},
    "pure bf16": {"dtype": torch.bfloat16, **CACHED},
    "checkpointing": {"gradient_checkpointing": True, **CACHED},
    "checkpointing, retained": {"gradient_checkpointing": True, "retain_chunks": 3, **CACHED},
    "checkpointing and autocast": {"gradient_checkpointing": True, "autocast": torch.bfloat16, **CACHED},
    "hard negatives, R": {"negatives": 2, "retain_chunks": 4, **CACHED},
    "tokens a chunk": {"batch_size": 9, "chunk_tokens": 40, "negatives": 1},
    "tokens a chunk, one a tower": {"batch_size": 9, "chunk_tokens": (16, 50), "retain_chunks": 1},
    "mean": {"pooling": "mean", **CACHED},
    "cls": {"pooling": "cls", **CACHED},
    "last": {"pooling": "last", **CACHED},
    "untied": {"tied": False, "negatives": 1, **CACHED},
    "tiles": {"loss": ContrastiveLoss(tile_size=3), **CACHED},
    "tiles, symmetric, learned": {"loss": ContrastiveLoss(0.1, learnable=True, symmetric=True, tile_size=2), **CACHED},
    "tokens' representations": {"pooling": "tokens", "loss": late_interaction, **CACHED},
    "tokens' representations, retained": {"pooling": "tokens", "loss": late_interaction, "retain_chunks": 2, **CACHED},
}


@pytest.mark.slow
@a_share(
    ("name", "option"),
    ["modernbert-base", "qwen3-0.6b"],
    OPTIONS,
    one_in=6,
    kept=("checkpointing", "tokens a chunk, one a tower", "tokens' representations"),
)
def test_every_option_of_gradient_caching(option, name):
    """Two layers are one of each kind; ModernBERT's pattern of four is in `test_equal_to_the_byte`."""
    by_law = option != "checkpointing and autocast"  # copies that a recomputation makes outlive its chunk: no law holds
    assert_equal(*both("grad_cache", name, layers=2, **OPTIONS[option]), by_law)


@pytest.mark.slow
@a_share(
    ("step", "option"),
    ["naive", "accumulation"],
    ["bf16 autocast", "pure bf16", "checkpointing", "tokens' representations", "untied"],
    one_in=2,
)
def test_options_of_the_other_steps(option, step):
    options = {key: value for key, value in OPTIONS[option].items() if step != "naive" or key != "chunk_size"}
    assert_equal(*both(step, "bert-base-uncased", **options))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_tower_for_texts_and_one_for_pictures(step):
    options = {"batch_size": 6} | ({} if step == "naive" else {"chunk_size": 4})
    options |= {"retain_chunks": 2} if step == "grad_cache" else {}
    loss = ContrastiveLoss(learnable=True, symmetric=True)
    names = ("clip-vit-b-32-text", "clip-vit-b-32-vision")
    assert_equal(*both(step, names, lengths=(8, None), loss=loss, **options))


@pytest.mark.parametrize("step", STEPS)
def test_a_model_that_reads_values_is_refused_in_words(step):
    """Longformer asks its mask for values; CANINE's mask of groups hides nothing where that of characters does."""
    sizes = SMALL | {"vocab_size": 128, "num_hidden_layers": 1}
    same = {"batch_size": 4, "query_length": 8, "passage_length": 8} | ({} if step == "naive" else {"chunk_size": 2})
    longformer = transformers.LongformerConfig(**sizes, attention_window=[4], pad_token_id=1)
    with pytest.raises(ValueError, match="must run on fake tensors"):
        forecast_step(step, config=longformer, **same)
    with pytest.raises(ValueError, match="a mask of their own making"):
        forecast_step(step, config=transformers.CanineConfig(**sizes, num_hash_buckets=64), **same)
