"""What is read off few layers, against the whole encoder read layer by layer."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gclib import ContrastiveLoss, forecast_step, record_memory
from gclib.memory.batch_laws import BatchStep, Entries, _Subject
from gclib.memory.depth import _first_layers, layers_of
from gclib.memory.fake_steps import FakeStep
from gclib.memory.flops import encoder_cost
from gclib.memory.laws import FEW, MANY
from gclib.memory.workload import Workload
from gclib.models.adapters import LoRA
from gclib.models.encoder import config_for
from gclib.models.presets import PRESETS
from gclib.steps import STEPS

OPTIONS = {
    "float32": {},
    "autocast": {"autocast": torch.bfloat16},
    "card": {"device": "cuda", "dtype": torch.bfloat16},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing on a card": {"gradient_checkpointing": True, "device": "cuda", "dtype": torch.bfloat16},
    "LoRA": {"lora": LoRA(rank=4)},
}
QUICK = [("bert-base-uncased", "autocast"), ("clip-vit-b-32-text", "LoRA")]
EIGHT = [
    *QUICK,
    ("bert-base-uncased", "float32"),
    ("clip-vit-b-32-vision", "card"),
    ("qwen3-0.6b", "checkpointing on a card"),
]
IN_LONG_TURNS = ("modernbert-base", "embeddinggemma-300m")  # two turns and three are most of their layers: read whole
SHALLOW = ("minilm-l6", "distilbert-base")  # these are read whole
EVERY = [(name, options) for name in PRESETS if name not in SHALLOW for options in OPTIONS]
EVERY = [each for each in EVERY if each[0] != "mpnet-base" or "checkpointing" not in each[1]]  # its class has none
DEEP = pytest.mark.deep
CASES = [pytest.param(*each, 8, marks=() if each in QUICK else DEEP) for each in EIGHT]
CASES += [pytest.param(*each, None, marks=DEEP) for each in EVERY]


def fake_step(name: str, options: str, layers: int | None) -> tuple[FakeStep, int | None]:
    width = None if "vision" in name else 16
    config = config_for(name)
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    same = {"batch_size": 8, "chunk_size": 4, "query_length": width, "passage_length": width}
    return FakeStep(Workload(step="grad_cache", config=config, pooling="mean", **same, **OPTIONS[options])), width


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "layers"), CASES)
def test_few_layers_give_every_event_of_all(name, options, layers):
    fake, width = fake_step(name, options, layers)
    shallow = 1 if name in IN_LONG_TURNS else 2
    for sizes, retained in (((FEW, MANY), False), ((FEW, MANY), True), ((1, 1), False)):
        before = fake.runs
        few = fake._chunk_run(0, width, sizes, retained)
        assert fake.runs == before + shallow, "the whole encoder was read where few layers do, or these in vain"
        whole = fake._read_chunks(0, width, sizes, retained, "")
        assert few.keys() == whole.keys()
        for key, piece in few.items():
            assert np.array_equal(piece.kind_bytes, whole[key].kind_bytes), key
            assert (piece.room_at, piece.encoded_at) == (whole[key].room_at, whole[key].encoded_at)
    for step in ("naive", "accumulation"):
        few, whole = (read(step, 3, 1, (width, width)) for read in (fake._whole_run, fake._read_whole))
        assert [segment.phase for segment, _ in few] == [segment.phase for segment, _ in whole]
        assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(few, whole, strict=True))


class Layers(nn.Module):
    """An encoder of eight layers, and what it does between them."""

    def __init__(self, layers: list[nn.Module], between=lambda hidden, kept: hidden):
        super().__init__()
        self.layers, self.between = nn.ModuleList(layers), between

    def forward(self, input_ids, attention_mask):
        hidden, kept = attention_mask[..., None] * torch.ones(16), []
        for layer in self.layers:
            hidden = self.between(layer(hidden), kept)
            kept.append(hidden)
        return hidden.mean(dim=1)


class Layer(nn.Module):
    """A residual layer of many operations."""

    def __init__(self, wide: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, wide), nn.Linear(wide, 16)

    def forward(self, hidden):
        for _ in range(3):
            hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        return hidden


def alike(count: int = 8, wide: int = 32) -> list[nn.Module]:
    return [Layer(wide) for _ in range(count)]


def shared() -> Layers:
    encoder = Layers(alike())
    encoder.layers[5].up.weight = encoder.layers[2].up.weight
    return encoder


ENTRIES = (("input_ids", (), torch.int64, True), ("attention_mask", (), torch.int64, True))
ODD = {
    "alike": (lambda: Layers(alike()), (2, 1)),
    "with its layers' mean": (lambda: Layers(alike(), lambda hidden, kept: sum([hidden, *kept]) / 2), (2, 1)),
    "otherwise from the sixth on": (lambda: Layers(alike(), lambda h, kept: h if len(kept) < 5 else h * 2), (2, 1)),
    "in turns": (lambda: Layers([layer for _ in range(5) for layer in (*alike(1), *alike(1, 64))]), (4, 2)),
    "one wider": (lambda: Layers([*alike(3), *alike(1, 64), *alike(9)]), (6, 1)),
    "some frozen": (lambda: Layers([*(layer.requires_grad_(False) for layer in alike(2)), *alike(9)]), (4, 1)),
    "shared weights": (shared, None),
    "one layer again and again": (lambda: Layers(alike(1) * 8), None),
    "too small to tell": (lambda: Layers([nn.Linear(16, 16) for _ in range(8)]), (2, 1)),
}


def same(few, whole) -> bool:
    """Whether two laws are the same but for the functions in them."""
    both = ((getattr(few, field.name), getattr(whole, field.name)) for field in fields(few) if field.name != "alone")
    return all(
        same(one, other) if hasattr(one, "events") or hasattr(one, "first_net") else np.array_equal(one, other)
        for one, other in both
    )


DEEP_ODD = ("with its layers' mean", "one wider", "some frozen", "one layer again and again")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=(DEEP,) * (kind in DEEP_ODD)) for kind in ODD])
def test_layers_that_are_not_alike_are_seen_and_those_that_only_look_so_too(kind):
    make, expected = ODD[kind]
    encoder = make()
    found = _first_layers(encoder, layers_of(encoder))
    assert found == (expected or (len(encoder.layers), 1))
    whole = BatchStep(_Subject([encoder], None, "cpu"), [Entries("mapping", ENTRIES)])
    whole._unlike.add(0)
    few = BatchStep(_Subject([encoder], None, "cpu"), [Entries("mapping", ENTRIES)])
    assert same(few.chunk_laws(0, 16), whole.chunk_laws(0, 16))
    assert few._unlike == ({0} if kind == "otherwise from the sixth on" else set())


def checkpointed(hidden, kept):
    """What a model's own forward may do: from the sixth layer on, activations are computed again."""
    if len(kept) < 5 or not torch.is_grad_enabled():
        return hidden
    return checkpoint(lambda x: torch.tanh(x * 2) + x, hidden, use_reentrant=False)


class WithoutGraph(Layers):
    """Its lower half is frozen by its code, not by its weights."""

    def forward(self, input_ids, attention_mask):
        hidden = attention_mask[..., None] * torch.ones(16)
        for number, layer in enumerate(self.layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= 4):
                hidden = layer(hidden)
        return hidden.mean(dim=1)


class Beside(Layers):
    """Norms in a list of their own, of which the later ones are frozen; layers by number."""

    def __init__(self, layers):
        super().__init__(layers)
        self.norms = nn.ParameterList(torch.ones(16) for _ in layers)
        for norm in self.norms[4:]:
            norm.requires_grad_(False)

    def forward(self, input_ids, attention_mask):
        hidden = attention_mask[..., None] * torch.ones(16)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            hidden = layer(hidden) * norm
        return hidden.mean(dim=1)


class ByNumber(Layers):
    """It counts on the number of its layers."""

    def forward(self, input_ids, attention_mask):
        hidden = attention_mask[..., None] * torch.ones(16)
        for number in range(8):
            hidden = self.layers[number](hidden)
        return hidden.mean(dim=1)


UNLIKE = {
    "checkpointed": lambda: Layers(alike(), checkpointed),
    "without a graph": lambda: WithoutGraph(alike()),
    "a list beside": lambda: Beside(alike()),
    "by number": lambda: ByNumber(alike()),
}
STEPS_ASKED = {"retained": {"retain_chunks": 1, "chunk_size": 3}, "replayed": {"chunk_size": 3}, "naive": {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [pytest.param(asked, marks=() if asked == "replayed" else DEEP) for asked in STEPS_ASKED]
)
@pytest.mark.parametrize("kind", UNLIKE)
def test_layers_that_only_a_graph_or_another_list_tells_apart_are_seen(kind, asked):
    torch.manual_seed(0)
    encoder, loss, options = UNLIKE[kind](), ContrastiveLoss(), STEPS_ASKED[asked]
    step = "naive" if asked == "naive" else "grad_cache"
    same = {"batch_size": 6, "query_length": 5, "passage_length": 7}
    told = forecast_step(step, encoders=[encoder] * 2, loss=loss, **same, **options)
    inputs = [
        {name: torch.ones(6, width, dtype=torch.int64) for name in ("input_ids", "attention_mask")} for width in (5, 7)
    ]
    options = options | ({"verify": "never"} if options else {})
    with record_memory(encoder, loss) as ledger:
        STEPS[step]([encoder] * 2, inputs, loss, on_phase=ledger.on_phase, **options)
    assert told.exact_law and highest(told.timeline) == highest(ledger.timeline)


def highest(timeline):
    """The most bytes of each phase."""
    phases = {segment.phase for segment in timeline} - {"start"}
    return {phase: max(one.peak_bytes for one in timeline if one.phase == phase) for phase in phases}


@pytest.mark.slow
def test_flops_of_encoders_that_count_on_their_layers_are_those_of_all():
    costs = [encoder_cost(make(alike())) for make in (Layers, ByNumber)]
    assert costs[0] == costs[1] and costs[0].forward.per_token == 8 * 3 * 2 * 2 * 16 * 32
