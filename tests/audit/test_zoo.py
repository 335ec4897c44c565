"""Small transformers of every kind: the cached step is the naive one, refuses in words, or warns; it is never wrong."""

import re
import warnings

import pytest
import torch
from torch import nn

from gclib import ContrastiveLoss, grad_cache_step
from gclib.__main__ import main
from gclib.audit import zoo
from gclib.audit.architectures import ARCHITECTURES, DECODERS, PAIRS, no_dropout
from gclib.chunks import Chunk, plan_chunks

QUICK = ("BERT, cls", "RoBERTa", "FNet", "OPT, right", "OPT, left", "ViT", "ResNet", "HuBERT", "CLIP")
# Left untrimmed because padding changes their rows; the others are not, in float64 without casts to float32.
PADDED = {"FNet", "ConvBERT", "Funnel", "BigBird, sparse", "MobileBERT", "CANINE", "YOSO", "SigLIP text, masked"}
REFUSED = {"ResNet": "BatchNorm in training mode", "Wav2Vec2, SpecAugment": "each row by itself"}
FLOAT32_INSIDE = {"GPT-Neo, right", "GPT-J, right", "XLM"}  # rounding of 1e-8 in float64: taken for padding's


def marks(name):
    """Beside the quick ones and those with a word of their own, every other architecture is tried by default."""
    told = name in QUICK or name in PADDED | FLOAT32_INSIDE | set(REFUSED)
    return () if name in QUICK else (pytest.mark.slow, *[pytest.mark.deep][: not told and zoo.names().index(name) % 2])


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in zoo.names()])
def test_right_or_refused_in_words(name):
    row = zoo.try_architecture(name, forecast=False)
    assert row.right, row
    if name in REFUSED:
        assert row.error is None and REFUSED[name] in row.verification
    else:
        assert row.error is not None and ("untrimmed" in row.verification) == (name in PADDED | FLOAT32_INSIDE)


def test_the_zoo_holds_what_people_have():
    assert len(zoo.names()) >= 100
    assert {entry.padding for entry in DECODERS} == {"left", "right"}
    assert {entry.kind for entry in ARCHITECTURES.values()} == {
        "texts",
        "texts without a mask",
        "pictures",
        "waves",
        "spectrograms",
    }
    assert PADDED | FLOAT32_INSIDE | set(REFUSED) <= set(ARCHITECTURES)


DRAWING = (
    "BERT",
    "RoBERTa",
    "GPT-2, right",
    "OPT, left",
    "FNet",
    "ModernBERT",
    "Swin",
    "Wav2Vec2",
    "T5 encoder",
)


@pytest.mark.parametrize(
    "name", [name if name in ("BERT", "FNet") else pytest.param(name, marks=pytest.mark.slow) for name in DRAWING]
)
def test_with_dropout_it_is_the_step_that_keeps_every_graph(name):
    tower = ARCHITECTURES[name]
    torch.manual_seed(0)
    encoder = tower.build(dropout=True).double()
    if name in ("Swin", "ModernBERT"):  # whose configs have none
        encoder = nn.Sequential(Called(encoder), nn.Dropout(0.2)).train()
    inputs = zoo.batches([tower, tower], 1)
    if isinstance(encoder, nn.Sequential):
        encoder = Unpacked(encoder)
    result = zoo.compare_step([encoder, encoder], inputs)
    assert result.error <= zoo.BOUND and "random" in str(result)


class Called(nn.Module):
    """A module that is given its keywords as one mapping."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**batch)


class Unpacked(Called):
    """The way back: keywords as one mapping."""

    def forward(self, **batch):
        return self.model(batch)


@pytest.mark.parametrize("rows", [[0, 3], [1, 2]])
def test_the_oracle_of_every_graph_is_told_from_another_order(rows):
    """Chunks in another order draw other numbers: the oracle must be able to say so."""
    tower = ARCHITECTURES["BERT"]
    torch.manual_seed(0)
    encoder = tower.build(dropout=True).double()
    inputs = zoo.batches([tower, tower], 0)
    plan = plan_chunks([zoo.WIDTH] * zoo.ROWS, chunk_size=zoo.CHUNK, sort=False)
    order = list(range(zoo.ROWS))
    order[rows[0]], order[rows[1]] = order[rows[1]], order[rows[0]]
    moved = [Chunk(tuple(order[row] for row in chunk.rows), chunk.width) for chunk in plan]
    result = zoo.compare_step([encoder] * 2, inputs, chunk_size=None, plan=[moved, moved])
    assert result.error > 1e-3


class Adapter(nn.Module):
    """LoRA (Hu et al. 2021): a frozen layer and a trained product of rank 2."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("checkpointing", [None, "not reentrant", "reentrant, inputs with gradients"])
def test_adapters_over_a_frozen_model(checkpointing):
    tower = ARCHITECTURES["BERT"]
    torch.manual_seed(0)
    encoder = tower.build().requires_grad_(False)
    for layer in encoder.model.encoder.layer:
        layer.attention.self.query = Adapter(layer.attention.self.query)
        layer.attention.self.value = Adapter(layer.attention.self.value)
    if checkpointing:
        encoder.model.gradient_checkpointing_enable({"use_reentrant": checkpointing != "not reentrant"})
        encoder.model.enable_input_require_grads()
    encoder = encoder.double()
    assert len([p for p in encoder.parameters() if p.requires_grad]) == 8
    assert zoo.compare_step([encoder] * 2, zoo.batches([tower, tower], 1)).error <= zoo.BOUND


# --- what looking at an encoder must leave as it was -------------------------------------------------------------


class Switching(nn.Module):
    """Another layer for good, once it met a short batch: as BigBird takes full attention."""

    def __init__(self):
        super().__init__()
        self.table, self.kind = nn.Embedding(64, 6), "sparse"
        self.layer = nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask):
        if input_ids.shape[1] < zoo.WIDTH and self.kind == "sparse":
            self.kind, full = "full", nn.Tanh()
            full.shared, self.layer = self.layer, full
        tokens = self.table(input_ids)
        tokens = self.layer.shared(tokens).tanh() if self.kind == "full" else self.layer(tokens)
        return (tokens * attention_mask.unsqueeze(-1)).mean(1)


def test_an_encoder_that_changes_its_parts_is_found_as_it_was():
    encoder = Switching().double()
    result = zoo.compare_step([encoder] * 2, zoo.batches([ARCHITECTURES["BERT"]] * 2, 0))
    assert result.error <= zoo.BOUND and result.words.startswith("left untrimmed")
    assert encoder.kind == "sparse" and isinstance(encoder.layer, nn.Linear)


class Strided(nn.Module):
    """Neighbours are averaged, a last odd one is with a zero: rows move where the width is odd, and only there."""

    def __init__(self, stride):
        super().__init__()
        self.table, self.stride = nn.Embedding(64, 6), stride

    def forward(self, input_ids, attention_mask):
        tokens = self.table(input_ids)
        missing = -tokens.shape[1] % self.stride
        tokens = nn.functional.pad(tokens, (0, 0, 0, missing)).unflatten(1, (-1, self.stride)).mean(2)
        mask = nn.functional.pad(attention_mask, (0, missing))[:, :: self.stride]
        return (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("stride", [2, 4])
def test_strides_that_divide_the_narrowest_chunk_too_are_seen(stride):
    encoder = Strided(stride).double()
    mask = (torch.arange(12) < torch.tensor([[12], [11], [9], [7], [5], [4], [4], [4]])).long()
    inputs = [{"input_ids": torch.randint(1, 64, mask.shape), "attention_mask": mask} for _ in range(2)]
    result = zoo.compare_step([encoder] * 2, inputs, chunk_size=2)
    assert result.error <= zoo.BOUND and result.words.startswith("left untrimmed")


class Least(nn.Module):
    """A pooling that no row of fewer than four tokens can be given, as CANINE's."""

    def __init__(self, least=4):
        super().__init__()
        self.table, self.least = nn.Embedding(64, 6), least

    def forward(self, input_ids, attention_mask):
        tokens = (self.table(input_ids) * attention_mask.unsqueeze(-1)).transpose(1, 2)
        return nn.functional.max_pool1d(tokens, self.least, stride=1).mean(2)


def test_an_encoder_that_has_a_least_width_is_left_untrimmed():
    encoder, inputs = Least(6).double(), zoo.batches([ARCHITECTURES["BERT"]] * 2, 0)
    with pytest.raises(RuntimeError):
        grad_cache_step([encoder] * 2, inputs, ContrastiveLoss(), chunk_size=2, verify="never")
    with pytest.warns(UserWarning, match="can't be encoded alike once trimmed"):
        grad_cache_step([encoder] * 2, inputs, ContrastiveLoss(), chunk_size=2)


# --- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["BERT", "Gemma 3, right", "LLaMA, right", "Mamba, right", "ConvBERT", "FNet", "BART encoder"]
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_rounding_is_told_from_padding(name, kind):
    if (name, kind) == ("FNet", "bfloat16"):
        pytest.skip("PyTorch has no Fourier transform in bfloat16")
    tower = ARCHITECTURES[name]
    torch.manual_seed(0)
    encoder = tower.build().to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    with (
        warnings.catch_warnings(record=True) as caught,
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
    ):
        warnings.simplefilter("always")
        grad_cache_step([encoder] * 2, zoo.batches([tower] * 2, 0), ContrastiveLoss(), chunk_size=4, verify="always")
    assert any("sort_by_length=False" in str(warning.message) for warning in caught) == (name in PADDED)


# --- the table ---------------------------------------------------------------------------------------------------


def test_a_wrong_step_makes_a_wrong_row(monkeypatch):
    def half(encoders, inputs, loss_fn, **options):
        loss = grad_cache_step(encoders, inputs, loss_fn, **options)
        for parameter in encoders[0].parameters():
            parameter.grad *= 0.5
        return loss

    monkeypatch.setattr(zoo, "grad_cache_step", half)
    row = zoo.try_architecture("OPT, right", forecast=False, seeds=(0,))
    assert not row.right and row.error > 0.1


@pytest.mark.slow
def test_forecasts_stand_beside_the_ledger(monkeypatch):
    assert zoo.try_architecture("OPT, right", seeds=(0,)).forecast == "equal"
    assert zoo.try_architecture("HuBERT", seeds=(0,)).forecast.startswith("no forecast")
    whole = zoo.forecast_step
    monkeypatch.setattr(zoo, "forecast_step", lambda *given, **told: whole(*given, **told | {"chunk_size": 5}))
    assert " against " in zoo.try_architecture("OPT, right", seeds=(0,)).forecast


def test_the_command_prints_the_table(capsys):
    assert main(["zoo", "ResNet", "OPT, left", "--no-forecast", "--processes", "1"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"ResNet .*refused: .*BatchNorm", table) and re.search(
        r"OPT, left +[\d,]+ +left +\d\.\de-1[2-9]", table
    )
    with pytest.raises(SystemExit):
        main(["zoo", "Dodo"])
    assert "must be one of" in capsys.readouterr().err


def test_dropout_is_taken_out_of_every_part_of_a_config():
    from transformers import CLIPConfig

    config = CLIPConfig(text_config={"attention_dropout": 0.3}, vision_config={"attention_dropout": 0.2})
    no_dropout(config)
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0
    assert all(part in ARCHITECTURES for pair in PAIRS.values() for part in pair)
