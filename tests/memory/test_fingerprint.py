"""A forecast that was kept is never another model's: whatever bytes depend on is another checksum, or is not kept."""

import gc
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from transformers import BertConfig

from gclib import ContrastiveLoss, Encoder, forecast_step
from gclib.losses.matryoshka import MatryoshkaLoss
from gclib.memory.fake_modules import fake_copy
from gclib.memory.fake_steps import fake_step
from gclib.memory.fingerprint import Indescribable, fingerprint
from gclib.memory.workload import Workload

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Toy(nn.Module):
    """Ids to vectors, through as many copies as `wide` says."""

    def __init__(self, wide=1):
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.options = {"wide": [wide]}

    def forward(self, input_ids, attention_mask):
        return torch.tanh(self.embed(input_ids)).repeat(1, self.options["wide"][0], 1).mean(1)


def edited_toy():
    """A class of the same name and repr, with another forward: a cell that was run again."""

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(60, 8)
            self.options = {"wide": [1]}

        def forward(self, input_ids, attention_mask):
            return torch.tanh(torch.exp(torch.sin(self.embed(input_ids)))).mean(1)

    Toy.__module__, Toy.__qualname__ = __name__, "Toy"
    return Toy()


def peak(encoder, loss=None):
    same = {"batch_size": 6, "query_length": 8, "passage_length": 8, "loss": loss}
    return forecast_step("naive", encoders=[encoder, encoder], **same).peak_bytes


def repeating(times):
    return lambda q, p: (q.repeat(times, 1) @ p.T).exp().mean()


def repeats(q, p, times):
    return (q.repeat(times, 1) @ p.T).exp().mean()


def test_an_edited_class_is_forecast_as_it_is_now():
    first, second = Toy(), edited_toy()
    assert repr(first) == repr(second)
    assert peak(first) != peak(second)
    assert peak(Toy()) == peak(first)


def test_an_attribute_that_repr_does_not_show():
    first, second = Toy(1), Toy(9)
    assert repr(first) == repr(second)
    assert peak(first) < peak(second)
    first.options["wide"][0] = 9
    assert peak(first) == peak(second)


@pytest.mark.slow
def test_a_second_matryoshka_loss(tmp_path, monkeypatch):
    """Other dimensions, equal repr: also from disk."""
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))
    same = {"config": BertConfig(**SMALL), "batch_size": 128, "query_length": 1, "passage_length": 1}
    few, many = (MatryoshkaLoss(ContrastiveLoss(), dims) for dims in ([32], [32, 16, 8, 4]))
    first, second = (forecast_step("naive", loss=loss, **same).peak_bytes for loss in (few, many))
    assert first < second


@pytest.mark.parametrize(
    "losses", [(repeating(1), repeating(9)), (partial(repeats, times=1), partial(repeats, times=9))]
)
def test_a_loss_of_another_value_in_a_closure_or_a_partial(losses):
    few, many = (peak(Toy(), loss) for loss in losses)
    assert few < many


@pytest.mark.slow
def test_lambdas_that_come_and_go_at_one_address():
    """A key that held an id would answer for the next one there."""
    told = []
    for times in (1, 9, 1, 9):
        loss = eval(f"lambda q, p: (q.repeat({times}, 1) @ p.T).exp().mean()")
        told.append(peak(Toy(), loss))
        del loss
        gc.collect()
    assert told[0] == told[2] < told[1] == told[3]


def wide_hook(module, inputs, output):
    return output.repeat(9, 1, 1)[: len(output)]


CHANGES = {
    "a hook": lambda model: model.embed.register_forward_hook(wide_hook),
    "a forward of its own": lambda model: setattr(model, "forward", partial(Toy.forward, model)),
    "what is trained": lambda model: model.embed.requires_grad_(False),
    "its mode": lambda model: model.eval(),
    "its dtype": lambda model: model.double(),
    "a sparse table": lambda model: setattr(model.embed, "sparse", True),
    "a tensor beside": lambda model: setattr(model, "table", torch.zeros(3)),
    "a function": lambda model: setattr(model, "act", torch.exp),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_module_changes_its_checksum(change):
    model = Toy()
    before = fingerprint(model)
    assert fingerprint(Toy()) == before
    CHANGES[change](model)
    assert fingerprint(model) != before


def test_a_patched_class_of_a_library(monkeypatch):
    layer = nn.Linear(2, 2)
    before = fingerprint(layer)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert fingerprint(layer) != before
    monkeypatch.undo()
    assert fingerprint(layer) == before


@pytest.mark.slow
def test_a_patched_attention_is_forecast_for_a_config(monkeypatch):
    same = {"config": BertConfig(**SMALL), "batch_size": 9, "query_length": 64, "passage_length": 64}
    before = forecast_step("naive", **same).peak_bytes
    attention = F.scaled_dot_product_attention

    def wide(query, *args, **kwargs):
        return attention(query.repeat(9, 1, 1, 1)[: len(query)], *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wide)
    assert forecast_step("naive", **same).peak_bytes > before
    monkeypatch.undo()
    assert forecast_step("naive", **same).peak_bytes == before


def helper(x):
    return x


def calls_helper(q, p):
    return helper(q).mean() + p.mean()


def test_a_function_that_the_code_names(monkeypatch):
    before = fingerprint(calls_helper)
    monkeypatch.setitem(globals(), "helper", lambda x: x.exp())
    assert fingerprint(calls_helper) != before


def test_values_of_parameters_and_their_place_do_not_count():
    first, second = Toy(), Toy()
    assert fingerprint(first) == fingerprint(second)
    tied, untied = nn.ModuleList([first, first]), nn.ModuleList([first, second])
    assert fingerprint(tied) != fingerprint(untied)
    shared = Toy()
    shared.embed.weight = first.embed.weight
    assert fingerprint(nn.ModuleList([first, shared])) != fingerprint(untied)


@pytest.mark.parametrize("held", [threading.Lock(), torch.Generator(), sys.stderr], ids=["lock", "generator", "file"])
def test_what_cannot_be_written_down_is_not_kept(held):
    with pytest.raises(Indescribable):
        fingerprint([held])


def test_an_encoder_that_cannot_be_described_is_forecast_anew():
    class Lazy:
        def __init__(self):
            self.iterator = iter([1])

        def __deepcopy__(self, memo):
            return self

    model = Toy()
    model.lazy = Lazy()
    with pytest.raises(Indescribable):
        fingerprint(model)
    before = peak(model)
    model.options["wide"][0] = 9
    assert peak(model) > before


@pytest.mark.slow
def test_the_next_session_finds_it_again():
    code = (
        "from gclib import Encoder, ContrastiveLoss; from gclib.memory.fingerprint import fingerprint\n"
        "print(fingerprint(Encoder.from_config('tiny'), ContrastiveLoss(), {'a', 'b', 'c'}))"
    )
    plain = os.environ | {"GCLIB_CHECK_SHAPES": "0"}  # beartype's wrappers are made anew in each session
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain)
    found = {run().stdout for _ in range(2)}
    assert len(found) == 1


def test_a_module_with_a_lock_is_refused_in_words():
    model = Toy()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="must be modules that copy.deepcopy copies"):
        peak(model)


def test_the_old_weight_norm_is_copied():
    layer = nn.utils.weight_norm(nn.Linear(3, 3))
    layer(torch.ones(1, 3))
    copied = fake_copy(nn.Sequential(layer), FakeTensorMode())
    assert isinstance(copied[0].weight, FakeTensor)


def test_hooks_count_and_the_numbers_that_torch_gives_them_do_not():
    """Checkpointing hangs a hook on the token table; torch numbers all hooks that there ever were."""

    def checkpointed():
        return Encoder.from_config("tiny").checkpoint_activations()

    first = fingerprint(checkpointed())
    torch.nn.Linear(1, 1).register_forward_hook(wide_hook)
    assert fingerprint(checkpointed()) == first
    assert fingerprint(Encoder.from_config("tiny")) != first
    workload = Workload(
        step="naive", config="tiny", batch_size=2, query_length=8, passage_length=8, gradient_checkpointing=True
    )
    fake = fake_step(workload)
    torch.nn.Linear(1, 1).register_forward_hook(wide_hook)
    assert fake_step(workload) is fake
