"""Forecasts of frozen weights and of LoRA against the ledger of the step really run: equal to the byte."""

import pytest
import torch
import transformers

from gclib import ContrastiveLoss, Encoder, forecast_step
from gclib.models.adapters import LoRA, add_lora
from tests.memory.test_forecast import SHAPES, built, really_run

pytest.importorskip("peft")
ONE_LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
DECODER = {**ONE_LAYER, "num_key_value_heads": 2, "vocab_size": 500}
SMALL = {
    "tiny": ("tiny", "mean"),
    "bert": (transformers.BertConfig(**ONE_LAYER, vocab_size=500), "mean"),
    "qwen3": (transformers.Qwen3Config(**{**DECODER, "num_hidden_layers": 2}, head_dim=8), "last"),
    "mistral": (transformers.MistralConfig(**DECODER, sliding_window=64), "last"),
}
CACHED = {"step": "grad_cache", "chunk_size": 4}
# name -> (model, LoRA, what else the step has)
CASES = {
    "rank 16, dropout": ("tiny", LoRA(16, dropout=0.1), CACHED),
    "all linear layers": ("bert", LoRA(4, targets="all-linear"), CACHED),
    "named targets, untied": ("bert", LoRA(8, targets=("key", "dense")), {"tied": False, **CACHED}),
    "retained": ("bert", LoRA(4, dropout=0.1), {"retain_chunks": 2, **CACHED}),
    "naive": ("bert", LoRA(4), {"step": "naive"}),
    "accumulation": ("bert", LoRA(4), {"step": "accumulation", "chunk_size": 4}),
    "autocast": ("bert", LoRA(4), {"autocast": torch.bfloat16, **CACHED}),
    "float32 pairs beside bfloat16": ("bert", LoRA(4), {"dtype": torch.bfloat16, **CACHED}),
    "a decoder": ("qwen3", LoRA(4), CACHED),
    "a decoder, all linear layers": ("qwen3", LoRA(2, dropout=0.1, targets="all-linear"), CACHED),
    "a sliding window": ("mistral", LoRA(4), {"retain_chunks": 1, **CACHED}),
    "a decoder in bfloat16, untied": ("mistral", LoRA(4), {"dtype": torch.bfloat16, "tied": False, **CACHED}),
}
QUICK = {("rank 16, dropout", True), ("a sliding window", "reentrant")}
KEPT = {(name, True) for name in ("accumulation", "a decoder, all linear layers", "float32 pairs beside bfloat16")}
DEEP = ((), (pytest.mark.deep,))  # all others but every fourth one
BOTH = [(name, kind) for name in CASES for kind in (True, "reentrant")]
BOTH += [(name, False) for name in ("rank 16, dropout", "naive", "a decoder", "float32 pairs beside bfloat16")]


def adapted(model, lora, checkpointing, dtype):
    """A real encoder, made by the functions that a forecast makes its own by."""
    size, pooling = SMALL[model]
    encoder = add_lora(Encoder.from_config(size, pooling=pooling).to(dtype).train(), lora)
    return encoder.checkpoint_activations(reentrant=checkpointing == "reentrant") if checkpointing else encoder


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(*c, marks=() if c in QUICK else (pytest.mark.slow, *DEEP[place % 4 > 0 and c not in KEPT]))
        for place, c in enumerate(BOTH)
    ],
)
def test_equal_to_the_byte(name, checkpointing):
    model, lora, options = CASES[name]
    size, pooling = SMALL[model]
    told = forecast_step(
        config=size,
        pooling=pooling,
        lora=lora,
        gradient_checkpointing=checkpointing,
        batch_size=6,
        negatives=1,
        **SHAPES,
        **options,
    )
    dtype, autocast = options.get("dtype", torch.float32), options.get("autocast")
    towers = [adapted(model, lora, checkpointing, dtype) for _ in range(1 if options.get("tied", True) else 2)]
    run = {name: value for name, value in options.items() if name in ("chunk_size", "retain_chunks")}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        ledger = really_run(options["step"], [towers[0], towers[-1]], (6, 12), ContrastiveLoss(), **run)
    no_law = name == "autocast"  # with checkpointing: the whole step is run with fake tensors
    assert told.exact_law != no_law
    assert (told.peak_bytes, told.at_peak()) == (ledger.peak_bytes, ledger.at_peak())


@pytest.mark.slow
def test_frozen_weights_have_neither_gradients_nor_states():
    lora = LoRA(4, targets=("query", "value"))
    towers = [add_lora(encoder, lora) for encoder in built("tiny", tied=True)[:1]] * 2
    trained = [p for p in towers[0].parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 2 * 2 * 4 * 32
    optimizer, loss = torch.optim.AdamW(trained), ContrastiveLoss()
    really_run("naive", towers, (4, 4), loss)
    optimizer.step()
    optimizer.zero_grad()
    ledger = really_run("grad_cache", towers, (6, 6), loss, optimizer=optimizer, chunk_size=2)
    same = {"batch_size": 6, "chunk_size": 2, "optimizer": "adamw", **SHAPES}
    told = forecast_step("grad_cache", config="tiny", lora=lora, **same)
    assert told.at_peak() == ledger.at_peak()
    assert told.at_peak()["optimizer"] == sum(8 * p.numel() + 4 for p in trained)
    assert forecast_step("grad_cache", encoders=towers, **same).at_peak() == ledger.at_peak()
    whole = forecast_step("grad_cache", config="tiny", **same).at_peak()
    assert whole["optimizer"] > 10 * told.at_peak()["optimizer"]


@pytest.mark.slow
def test_a_frozen_tower_and_a_frozen_base_of_ones_own():
    """A frozen tower is encoded once and never replayed; of the other one only the last layer is trained."""
    encoders, loss = built("tiny", tied=False), ContrastiveLoss()
    encoders[1].requires_grad_(False)
    encoders[0].requires_grad_(False)
    encoders[0].model.encoder.layer[1].requires_grad_(True)
    ledger = really_run("grad_cache", encoders, (6, 6), loss, chunk_size=2, retain_chunks=1)
    told = forecast_step("grad_cache", encoders=encoders, batch_size=6, chunk_size=2, retain_chunks=1, **SHAPES)
    assert told.at_peak() == ledger.at_peak()
    assert {segment.tower for segment in told.timeline if segment.phase == "replay"} <= {0, None}


@pytest.mark.slow
def test_7b_with_lora_and_seven_hard_negatives_on_one_card_of_80_gb():
    """In bfloat16, 512 tokens: 16 rows fit and 32 do not; with checkpointing far more do. Nothing is allocated."""
    same = {"config": "e5-mistral-7b", "dtype": torch.bfloat16, "lora": LoRA(16), "optimizer": "adamw"}
    same |= {"query_length": 512, "passage_length": 512, "negatives": 7, "batch_size": 128, "device": "cuda"}
    card = 80 * 10**9
    peaks = {rows: forecast_step("grad_cache", chunk_size=rows, **same) for rows in (16, 32)}
    assert peaks[16].peak_bytes < card < peaks[32].peak_bytes
    kinds = peaks[16].at_peak()
    trained = 32 * 16 * (4096 + 4096 + 4096 + 1024)  # of the queries' layer and the values', each twice
    frequencies = 4 * 64  # of positions, a buffer in float32
    assert kinds["parameters"] == 2 * 7_110_660_096 + 4 * trained + frequencies
    assert (kinds["gradients"], kinds["optimizer"]) == (4 * trained, 8 * trained + 4 * 2 * 2 * 32)
    kept = forecast_step("grad_cache", chunk_size=32, gradient_checkpointing=True, **same)
    assert kept.peak_bytes < card / 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": 16}, "lora must be a gclib.models.adapters.LoRA, or None, got 16"),
        ({"lora": LoRA(4, targets="q_proj")}, "targets must be some of this model's linear layers"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing must be one of False, True, 'reentrant'"),
        ({"config": None, "encoders": [torch.nn.Linear(1, 1)] * 2, "lora": LoRA(4)}, "lora and dtype must be left"),
    ],
)
def test_bad_input_is_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        forecast_step(**{"step": "naive", "config": "tiny", "batch_size": 4, **SHAPES, **change})
