"""The audit is alone: whatever a loss or an encoder holds and wherever it hides it, it is judged and put back."""

import random
import threading
import types
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, token_batch
from torch import nn
from torch.nn import functional as F

from gclib.audit.audit import audit_step
from gclib.audit.copies import Holders, leaves_of, working_copy
from gclib.course.wild.traps import right_step
from gclib.steps import grad_cache_step, naive_step

CACHED = partial(grad_cache_step, chunk_size=3)
INNER = InfoNCE()
NAMESPACE = types.SimpleNamespace(loss=INNER)
TEMPERATURE = nn.Parameter(torch.tensor(0.4))
LAST = None
QUEUE: deque = deque(maxlen=2)
GENERATOR = np.random.default_rng(0)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return token_batch(7, 6, generator), token_batch(7, 6, generator)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return TinyEncoder(0.3)


def audit(encoder, batch, loss_fn, step=CACHED):
    return audit_step(step, [encoder, encoder], batch, loss_fn)


def plain(queries, passages, temperature=0.4, memory=()):
    logits = queries @ torch.cat([passages, *memory]).T / temperature
    return F.cross_entropy(logits, torch.arange(len(queries)))


class Holder:
    """An object that is no module, with a method that is a loss, and a lock that can't be copied."""

    def __init__(self):
        self.inner, self.memory, self.lock = InfoNCE(), [], threading.Lock()

    def __call__(self, queries, passages):
        with self.lock:
            loss = self.inner(queries, torch.cat([passages, *self.memory])[: len(passages)])
            self.memory.insert(0, passages.detach())
            return loss + plain(queries, passages, memory=self.memory[1:])


HIDDEN = {
    "the global of a lambda": lambda: (lambda q, p: INNER(q, p), INNER.temperature),
    "a bare parameter, a global": lambda: (lambda q, p: plain(q, p, TEMPERATURE), TEMPERATURE),
    "a keyword of a partial": lambda: (partial(plain, temperature=TEMPERATURE), TEMPERATURE),
    "a bound method": lambda: (INNER.forward, INNER.temperature),
    "a namespace": lambda: (lambda q, p: NAMESPACE.loss(q, p), INNER.temperature),
    "an object": lambda: ((holder := Holder()), holder.inner.temperature),
    "an object's method": lambda: ((holder := Holder()).__call__, holder.inner.temperature),
    "a list in a closure": lambda: ((lambda many: lambda q, p: many[0](q, p))([INNER]), INNER.temperature),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_temperature_is_judged_and_left_alone_wherever_it_hides(name, encoder, batch):
    loss_fn, temperature = HIDDEN[name]()
    temperature.grad = torch.tensor(5.0)
    report = audit(encoder, batch, loss_fn)
    assert report.right and report.temperature == pytest.approx(1)
    assert temperature.grad.item() == 5 and temperature.dtype == torch.float32

    def three_times(encoders, inputs, loss):
        value = CACHED(encoders, inputs, loss)
        for leaf in leaves_of(loss(torch.rand(2, 5).double(), torch.rand(2, 5).double())):
            leaf.grad *= 3
        return value

    assert audit(encoder, batch, loss_fn, three_times).names == ["temperature's gradient"]
    assert temperature.grad.item() == 5
    temperature.grad = None


def test_a_step_may_reach_for_the_callers_own_modules(encoder, batch):
    def doubled(encoders, inputs, loss_fn):
        value = CACHED([encoder, encoder], inputs, loss_fn)
        INNER.temperature.grad *= 2
        return value

    for loss_fn in (INNER, lambda q, p: INNER(q, p)):
        report = audit(encoder, batch, loss_fn, doubled)
        assert report.names == ["temperature's gradient"] and report.temperature == pytest.approx(2)
    assert all(parameter.grad is None for parameter in [*INNER.parameters(), *encoder.parameters()])


def test_what_a_step_trains_by_mistake_is_left_alone(encoder, batch):
    other = TinyEncoder()
    assert not audit(encoder, batch, InfoNCE(), lambda e, i, f: CACHED([other, other], i, f)).right
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in other.parameters())


class Queue(nn.Module):
    """A loss that keeps the last batches' passages: as a new buffer, in place, or as a list of its class."""

    shared: list = []

    def __init__(self, kind):
        super().__init__()
        self.kind, self.place = kind, 0
        self.register_buffer("queue", torch.randn(14, 5))

    def forward(self, queries, passages):
        memory = self.shared if self.kind == "class" else [self.queue]
        loss = plain(queries, passages, memory=memory)
        if self.kind == "class":
            self.shared.append(passages.detach())
        elif self.kind == "new":
            self.queue = torch.cat([passages.detach(), self.queue])[:14]
        else:
            self.queue[self.place : self.place + len(passages)] = passages.detach()
            self.place = (self.place + len(passages)) % 14
        return loss


def remembering(queries, passages):
    loss = plain(queries, passages, memory=QUEUE)
    QUEUE.appendleft(passages.detach())
    return loss


def setting(queries, passages):
    global LAST, NEW
    LAST, NEW = passages.detach(), queries
    return sum(plain(queries, passages, TEMPERATURE) for _ in range(2))


def test_globals_that_a_loss_sets_and_reads_in_inner_functions(encoder, batch):
    report = audit(encoder, batch, setting)
    assert report.right and report.temperature == pytest.approx(1)
    assert LAST is None and "NEW" not in globals() and TEMPERATURE.grad is None


def with_default(queries, passages, memory=[]):  # noqa: B006
    loss = plain(queries, passages, memory=memory)
    memory.insert(0, passages.detach())
    return loss


def with_closure():
    memory = []

    def loss_fn(queries, passages):
        nonlocal memory
        loss = plain(queries, passages, memory=memory)
        memory = [passages.detach(), *memory][:2]
        return loss

    return loss_fn


@pytest.mark.slow
@pytest.mark.parametrize("step", [CACHED, naive_step, right_step])
def test_a_loss_with_a_memory_is_no_fault_and_its_memory_is_untouched(step, encoder, batch):
    closure = with_closure()
    for loss_fn in (remembering, with_default, closure):
        assert audit(encoder, batch, loss_fn, step).right
    assert not QUEUE and with_default.__defaults__ == ([],) and closure.__closure__[0].cell_contents == []
    for kind in ("new", "in place", "class"):
        loss_fn = Queue(kind)
        before = loss_fn.queue, loss_fn.queue.clone()
        for hidden in (loss_fn, lambda q, p, loss_fn=loss_fn: loss_fn(q, p)):
            assert audit(encoder, batch, hidden, step).right
        assert loss_fn.queue is before[0] and torch.equal(*before) and loss_fn.place == 0 and not Queue.shared


def test_a_memory_out_of_reach_is_refused(encoder, batch):
    count = (number for number in range(100))
    with pytest.raises(ValueError, match="loss_fn must give the same number again"):
        audit(encoder, batch, lambda q, p: plain(q, p) * (1 + next(count)))


def old_weight_norm(encoder):
    with pytest.warns(FutureWarning):
        encoder.out = nn.utils.weight_norm(encoder.out)


def kept_output(encoder):
    encoder.drop.register_forward_hook(lambda module, given, reps: setattr(module, "reps", reps))
    encoder(*token_batch(2, 3, torch.Generator()).values())


def other_module(encoder):
    scale = nn.Linear(5, 5)
    encoder.out.register_forward_hook(lambda module, given, reps: scale(reps))


def lock(encoder):
    encoder.lock = threading.Lock()


def sparse(encoder):
    encoder.table.sparse = True


@pytest.mark.parametrize("step", [CACHED, naive_step, right_step])
@pytest.mark.parametrize("change", [old_weight_norm, kept_output, other_module, lock, sparse])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_encoders_that_cannot_be_copied_or_have_sparse_gradients_are_audited(change, step, encoder, batch):
    change(encoder)
    held = {name: dict(vars(module)) for name, module in encoder.named_modules()}
    report = audit(encoder, batch, InfoNCE(), step)
    assert report.right and report.error < 1e-12
    assert held == {name: dict(vars(module)) for name, module in encoder.named_modules()}
    assert any("lock" in what for what in report.unjudged) == (change is lock)


def test_attributes_buffers_and_generators_are_put_back(batch):
    class Moving(TinyEncoder):
        def __init__(self):
            super().__init__()
            self.count, self.own, self.seen = 0, torch.Generator().manual_seed(1), []
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, **given):
            reps = super().forward(**given)
            self.count, self.new = self.count + 1, reps
            self.seen.append(len(reps))
            self.mean += reps.detach().mean(0)
            noise = GENERATOR.random() + random.random() + np.random.random() + torch.rand((), generator=self.own)
            return reps * noise

    encoder = Moving()
    before = encoder.own.get_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    numbers = GENERATOR.bit_generator.state
    assert audit(encoder, batch, InfoNCE()).names == ["the second forward is another"]
    assert encoder.count == 0 and encoder.seen == [] and not encoder.mean.any() and not hasattr(encoder, "new")
    assert torch.equal(encoder.own.get_state(), before[0]) and torch.equal(torch.get_rng_state(), before[3])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]
    assert GENERATOR.bit_generator.state == numbers


def test_hooks_on_parameters_do_not_fire_and_optimizers_do_not_move(encoder, batch):
    fired, optimizer = [], torch.optim.SGD(encoder.parameters(), 1.0)
    for parameter in encoder.parameters():
        parameter.register_hook(fired.append)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    def trained(encoders, inputs, loss_fn):
        loss = CACHED(encoders, inputs, loss_fn)
        optimizer.step()
        return loss

    assert audit(encoder, batch, InfoNCE(), trained).right and not fired
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_all_is_put_back_after_an_error(encoder, batch):
    loss_fn = Queue("new")
    before = dict(vars(loss_fn)), loss_fn.queue, encoder.out.weight, encoder.training

    def step(encoders, inputs, loss_fn):
        CACHED(encoders, inputs, loss_fn)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(encoder, batch, loss_fn, step)
    assert (dict(vars(loss_fn)), loss_fn.queue, encoder.out.weight, encoder.training) == before
    assert encoder.out.weight.grad is None and encoder.out.weight.dtype == torch.float32


def test_inputs_are_copied_judged_as_leaves_and_refused_with_a_graph():
    encoder, trunk = nn.Linear(4, 3), nn.Linear(4, 4)
    leaf, rows = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    assert audit_step(CACHED, [encoder] * 2, [leaf, rows], InfoNCE()).right and leaf.grad is None
    halved = lambda e, i, f: CACHED(e, [i[0] * 0.5 + i[0].detach() * 0.5, i[1]], f, verify="never")  # noqa: E731
    with pytest.raises(ValueError, match="graph of their own"):
        audit_step(halved, [encoder] * 2, [leaf, rows], InfoNCE())
    with pytest.raises(ValueError, match=r"inputs\[1\] must not have a graph of their own"):
        audit_step(CACHED, [encoder] * 2, [rows, trunk(rows)], InfoNCE())
    assert trunk.weight.grad is None
    with torch.inference_mode():
        made = torch.randn(6, 4)
        with pytest.raises(ValueError, match="inference_mode must not be around"):
            audit_step(CACHED, [encoder] * 2, [rows, rows], InfoNCE())
    with pytest.raises(ValueError, match="must not be made under inference_mode"):
        audit_step(CACHED, [encoder] * 2, [rows, made], InfoNCE())


def test_what_does_not_run_in_float64_and_lazy_modules_are_refused():
    class Cast(nn.Linear):
        def forward(self, rows):
            return super().forward(rows.bfloat16())

    rows = [torch.randn(6, 4)] * 2
    with pytest.raises(ValueError, match="must run in float64"):
        audit_step(CACHED, [Cast(4, 3)] * 2, rows, InfoNCE())
    with pytest.raises(ValueError, match="run them once"):
        audit_step(CACHED, [nn.LazyLinear(3)] * 2, rows, InfoNCE())
    assert audit_step(CACHED, [nn.Linear(4, 3).bfloat16()] * 2, rows, InfoNCE()).right


def test_working_copies_stand_in_all_places_of_a_tensor_and_leave_again():
    tied = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight, other.many = tied.weight, [tied.weight, tied]
    holders = Holders.behind([tied, other])
    original = tied.weight
    with holders.lent():
        assert tied.weight is other.weight is other.many[0] and other.many[1] is tied
        assert tied.weight is not original and tied.weight.dtype == torch.float64
    assert tied.weight is other.weight is other.many[0] is original
    assert working_copy(torch.ones(2, dtype=torch.long)).dtype == torch.long
