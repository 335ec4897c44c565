"""Real gloo ranks against one process: plain autograd on the whole batch, float64, after an SGD step with lr=1."""

import itertools
import time
import weakref
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from helpers.oracles import InfoNCE, TinyEncoder, gradients, token_batch, worst_error
from helpers.ranks import message_of, run_ranks
from torch import nn

from gclib.distributed import average_gradients, gather_with_grad, process_group, world_size
from gclib.losses.dense import contrastive_loss
from gclib.losses.module import ContrastiveLoss
from gclib.losses.ring import ring_contrastive_loss
from gclib.steps import accumulation_step, grad_cache_step, naive_step

ROWS = {2: [3, 2], 3: [2, 4, 1]}  # each rank's queries: none alike, one rank with a single row
LOSSES = {
    "gather": {"across": "gather"},
    "gather, tiles of 2": {"across": "gather", "tile_size": 2},
    "gather, tiles by rule": {"across": "gather", "tile_size": "auto"},
    "ring, tiles of 2": {"across": "ring", "tile_size": 2},
    "ring, tiles of 3": {"across": "ring", "tile_size": 3},
}
STEPS = {
    "naive": naive_step,
    "grad cache, none retained": partial(grad_cache_step, chunk_size=2),
    "grad cache, one retained": partial(grad_cache_step, chunk_size=2, retain_chunks=1),
    "grad cache, all retained": partial(grad_cache_step, chunk_size=2, retain_chunks=99),
    "grad cache, by tokens": partial(grad_cache_step, chunk_tokens=9),
}
SLOW = pytest.mark.slow
CASES = list(itertools.product(LOSSES, STEPS, (False, True), (0, 2), (False, True), (False, True)))


def case_name(case):
    loss, step, symmetric, negatives, tied, wrapped = case
    return ", ".join(
        [
            loss,
            step,
            "symmetric" if symmetric else "one direction",
            f"K={negatives}",
            "tied" if tied else "untied",
            "DDP" if wrapped else "bare",
        ]
    )


def models(tied):
    torch.manual_seed(1)
    first = TinyEncoder().double()
    return [first, first if tied else TinyEncoder().double()]


def batches(rows, negatives):
    generator = torch.Generator().manual_seed(2)
    return token_batch(sum(rows), 6, generator), token_batch(sum(rows) * (1 + negatives), 7, generator)


def own_part(batch, rows, rank, group):
    start = sum(rows[:rank]) * group
    return {key: value[start : start + rows[rank] * group] for key, value in batch.items()}


def truth(rows, symmetric, negatives, tied):
    """One process, the whole batch, an oracle's own loss."""
    encoders, loss_fn = models(tied), InfoNCE(symmetric).double()
    whole = batches(rows, negatives)

    def step():
        loss = loss_fn(*(encoder(**batch) for encoder, batch in zip(encoders, whole, strict=True)))
        loss.backward()
        return loss

    loss, changes = gradients([*encoders, loss_fn], step)
    # The oracle's parameter is the temperature, gclib's its logarithm: d/dlog t = t d/dt.
    changes[-1] = changes[-1] * loss_fn.temperature.detach()
    return loss, changes


def errors_of_a_rank(here, cases):
    """Per case: the loss's error, and the largest error of a parameter on the gradient's scale."""
    found = []
    rows = ROWS[here.world_size]
    for loss_name, step_name, symmetric, negatives, tied, wrapped in cases:
        encoders = models(tied)
        loss_fn = ContrastiveLoss(0.4, learnable=True, symmetric=symmetric, **LOSSES[loss_name]).double()
        with torch.no_grad():
            loss_fn.log_temperature.copy_(torch.tensor(0.4).double().log())
        inputs = [
            own_part(batch, rows, here.rank, 1 + negatives * place)
            for place, batch in enumerate(batches(rows, negatives))
        ]
        towers = encoders
        if wrapped:
            made = {encoder: nn.parallel.DistributedDataParallel(encoder) for encoder in dict.fromkeys(encoders)}
            towers = [made[encoder] for encoder in encoders]

        def step(towers=towers, inputs=inputs, loss_fn=loss_fn, name=step_name):
            loss = STEPS[name](towers, inputs, loss_fn)
            average_gradients(*towers, loss_fn)
            return loss

        loss, changes = gradients([*encoders, loss_fn], step)
        right, expected = truth(rows, symmetric, negatives, tied)
        found.append([float((loss - right).abs()), worst_error(changes, expected)])
    return found


# What `make check` runs: 2 processes, and every 7th case; `make test` runs every 5th too, on 2 and on 3 processes.
# Together they meet every pair of choices. `make test-deep` runs the rest.
QUICK = frozenset(CASES[::7])
KINDS = {case: "quick" if case in QUICK else "slow" if case in CASES[::5] else "deep" for case in CASES}
MARKS = {"quick": (), "slow": SLOW, "deep": (SLOW, pytest.mark.deep)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """measured(ranks, kind) -> {case: (loss error, gradient error) of the worst rank}; one start of the processes."""

    @cache
    def measure(ranks, kind):
        cases = [case for case in CASES if KINDS[case] == kind]
        errors = run_ranks(errors_of_a_rank, ranks, tmp_path_factory.mktemp(f"ranks{ranks}"), cases)
        worst = [[max(numbers) for numbers in zip(*of_case, strict=True)] for of_case in zip(*errors, strict=True)]
        return dict(zip(cases, worst, strict=True))

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, marks=MARKS[KINDS[c]], id=case_name(c)) for c in CASES])
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=SLOW)])
def test_every_rank_ends_with_the_gradient_of_one_process(measured, ranks, case):
    of_loss, of_gradient = measured(ranks, KINDS[case])[case]
    assert of_loss <= 1e-12
    assert of_gradient <= 1e-12


@pytest.mark.parametrize("kind", MARKS)
def test_cases_of_every_kind_meet_every_choice(kind):
    chosen = [case for case in CASES if KINDS[case] == kind]
    for choices, met in zip(zip(*CASES, strict=True), zip(*chosen, strict=True), strict=True):
        assert set(choices) == set(met)


# --- one synchronisation a step, by DDP's hooks or by ours ----------------------------------------------------------


def collectives_of_a_rank(here):
    """What a grad-cache step with gather, and then `average_gradients`, send through torch.distributed."""
    counted: list[tuple[str, int]] = []
    kept = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name):
        def call(first, *rest, **settings):
            tensor = first if name == "all_reduce" else rest[0]
            counted.append((name, tensor.numel()))
            return kept[name](first, *rest, **settings)

        return call

    encoders, loss_fn = models(tied=True), ContrastiveLoss(0.4, learnable=True, across="gather").double()
    inputs = [own_part(batch, ROWS[2], here.rank, 1) for batch in batches(ROWS[2], 0)]
    for name in kept:
        setattr(dist, name, counting(name))
    try:
        grad_cache_step(encoders, inputs, loss_fn, chunk_size=1)
        in_step, counted[:] = list(counted), []
        average_gradients(*encoders, loss_fn)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return {"in_step": in_step, "after": list(counted)}


@pytest.mark.slow
def test_gradients_travel_once_a_step_and_representations_once(tmp_path):
    encoders = models(tied=True)
    parameters = sum(p.numel() for p in encoders[0].parameters()) + 1
    tensors = len(list(encoders[0].parameters())) + 1
    for counted in run_ranks(collectives_of_a_rank, 2, tmp_path):
        assert counted["after"] == [["all_reduce", parameters + tensors]]  # one flag a parameter rides along
        # shapes, passages, the loss's value, and the passages' gradient: however many chunks there are
        assert [name for name, _ in counted["in_step"]] == ["all_gather", "all_gather", "all_reduce", "all_reduce"]
        assert max(size for _, size in counted["in_step"]) <= sum(ROWS[2]) * 5


def hooks_of_ddp(here):
    """Errors of a step that leaves the averaging to DDP's hooks, and of one that turns them off and averages once."""
    errors = []
    _, expected = truth(ROWS[2], False, 0, False)
    for name in ("out of sight", "in a lambda", "as it is"):
        encoders, loss_fn = models(tied=False), ContrastiveLoss(0.4, learnable=True, across="gather").double()
        with torch.no_grad():
            loss_fn.log_temperature.copy_(torch.tensor(0.4).double().log())
        wrapped = [nn.parallel.DistributedDataParallel(encoder) for encoder in encoders]
        unseen = [weakref.ref(module) for module in wrapped]
        towers = {
            "out of sight": [lambda module=module, **batch: module()(**batch) for module in unseen],
            "in a lambda": [lambda module=module, **batch: module(**batch) for module in wrapped],
            "as it is": wrapped,
        }[name]
        inputs = [own_part(batch, ROWS[2], here.rank, 1) for batch in batches(ROWS[2], 0)]

        def step(towers=towers, inputs=inputs, loss_fn=loss_fn, own=[] if name == "out of sight" else wrapped):
            loss = grad_cache_step(towers, inputs, loss_fn, chunk_size=1, retain_chunks=99)
            average_gradients(*own, loss_fn)
            return loss

        errors.append(worst_error(gradients([*encoders, loss_fn], step)[1], expected))
    return errors


@pytest.mark.slow
def test_ddp_hooks_average_one_chunk_alone_so_they_are_off_and_the_step_averages_once(tmp_path):
    for spoilt, *right in run_ranks(hooks_of_ddp, 2, tmp_path):
        assert spoilt > 1e-3
        assert max(right) <= 1e-12


def without_the_factor(here):
    """The error of a gathered loss whose gradient is this rank's share, not W times it, after the average."""
    encoders = models(tied=True)
    loss_fn = ContrastiveLoss(0.4, learnable=True, across="gather").double()
    with torch.no_grad():
        loss_fn.log_temperature.copy_(torch.tensor(0.4).double().log())
    inputs = [own_part(batch, ROWS[2], here.rank, 1) for batch in batches(ROWS[2], 0)]

    def step(factor):
        loss = grad_cache_step(encoders, inputs, lambda *reps: loss_fn(*reps) * factor, chunk_size=2)
        average_gradients(*encoders, loss_fn)
        return loss

    _, expected = truth(ROWS[2], False, 0, True)
    modules = [*encoders, loss_fn]
    return [worst_error(gradients(modules, partial(step, factor))[1], expected) for factor in (1 / 2, 1.0)]


def test_a_loss_without_the_factor_w_has_gradients_w_times_too_small(tmp_path):
    """The trap of GradCache's distributed loss, for which its README asks the caller. Adam would hide it."""
    for trap, ours in run_ranks(without_the_factor, 2, tmp_path):
        assert trap == pytest.approx(1 / 2)
        assert ours <= 1e-12


# --- gradients that some ranks lack ---------------------------------------------------------------------------------


def partly_missing(here):
    both, one, none, frozen = (nn.Linear(1, 1, bias=False) for _ in range(4))
    frozen.weight.requires_grad_(False)
    both.weight.grad = torch.tensor([[1.0 + here.rank]])
    kept = both.weight.grad
    if here.rank == 1:
        one.weight.grad = torch.tensor([[6.0]])
    half = nn.Linear(1, 1, bias=False).bfloat16()
    half.weight.grad = torch.tensor([[4.0 * here.rank]]).bfloat16()
    average_gradients(both, one, none, frozen, both, half)
    found = [m.weight.grad for m in (both, one, none, frozen, half)]
    return [None if g is None else float(g) for g in found] + [both.weight.grad is kept]


def test_a_gradient_that_a_rank_lacks_counts_as_zero_and_one_that_nobody_has_stays_away(tmp_path):
    assert run_ranks(partly_missing, 2, tmp_path) == [[1.5, 3.0, None, None, 2.0, True]] * 2


# --- what goes wrong ------------------------------------------------------------------------------------------------


def unlike_ranks(here):
    reps = torch.randn(2, 3 + here.rank)
    more = torch.randn(2 * (1 + here.rank), 3)
    loss = ContrastiveLoss(across="gather")
    return [
        message_of(lambda: gather_with_grad(reps)),
        message_of(lambda: loss(torch.randn(2, 3), more)),
        message_of(lambda: gather_with_grad(torch.randn(2, 3, dtype=(torch.float32, torch.float64)[here.rank]))),
        message_of(lambda: ring_contrastive_loss(torch.randn(2, 3), more, temperature=0.1, tile_size=1)),
    ]


def test_ranks_that_do_not_fit_together_are_all_told_so(tmp_path):
    for messages in run_ranks(unlike_ranks, 2, tmp_path):
        for kind, text, _ in messages:
            assert kind == "ValueError" and "same columns, dtype and K on all ranks" in text and "rank 1" in text


def one_rank_fails(here):
    """Rank 1 is gone before the others' collective; what rank 0 is told, and how long that took."""
    if here.rank == 1:
        return message_of(lambda: (_ for _ in ()).throw(ValueError("this rank's data is bad")))
    loss_fn, encoders = ContrastiveLoss(across="gather").double(), models(tied=True)
    inputs = [own_part(batch, ROWS[2], 0, 1) for batch in batches(ROWS[2], 0)]
    return message_of(lambda: grad_cache_step(encoders, inputs, loss_fn, chunk_size=1))


def test_a_rank_that_is_left_alone_stops_with_a_clear_error(tmp_path):
    left, failed = run_ranks(one_rank_fails, 2, tmp_path, timeout=8.0)
    assert failed[1] == "this rank's data is bad"
    assert left[0] == "RuntimeError" and "another rank failed or is late" in left[1] and left[2] < 30


def late_rank(here):
    module = nn.Linear(1, 1)
    module.weight.grad = torch.ones(1, 1)
    if here.rank == 1:
        time.sleep(15)
    return message_of(lambda: average_gradients(module))


@pytest.mark.slow
def test_a_rank_that_waits_too_long_stops_with_a_clear_error(tmp_path):
    waited, _ = run_ranks(late_rank, 2, tmp_path, timeout=5.0)
    assert waited[0] == "RuntimeError" and "average_gradients" in waited[1] and waited[2] < 15


def outside_of_the_group(here):
    """A process that averages over a group it is not in, and one that is in it."""
    group = dist.new_group([1, 2])
    module = nn.Linear(1, 1, bias=False)
    module.weight.grad = torch.tensor([[float(here.rank)]])
    told = message_of(lambda: average_gradients(module, group=group))
    return [told[0], float(module.weight.grad)]


def test_a_process_outside_the_group_is_refused_and_its_gradient_left_alone(tmp_path):
    assert run_ranks(outside_of_the_group, 3, tmp_path) == [["ValueError", 0.0], ["none", 1.5], ["none", 1.5]]


def accumulation_that_gathers(here):
    inputs = [own_part(batch, ROWS[2], here.rank, 1) for batch in batches(ROWS[2], 0)]
    loss_fn = ContrastiveLoss(across="gather").double()
    return message_of(lambda: accumulation_step(models(tied=True), inputs, loss_fn, chunk_size=1))


def test_accumulation_does_not_gather(tmp_path):
    for told in run_ranks(accumulation_that_gathers, 2, tmp_path):
        assert told[0] == "ValueError" and "must not gather" in told[1]


# --- alone ----------------------------------------------------------------------------------------------------------


def test_alone_everything_is_the_plain_loss():
    queries, passages = torch.randn(5, 4), torch.randn(15, 4)
    plain = contrastive_loss(queries, passages, temperature=0.3, symmetric=True)
    for settings in LOSSES.values():
        loss = ContrastiveLoss(0.3, symmetric=True, **settings)(queries, passages)
        torch.testing.assert_close(loss, plain)
    assert gather_with_grad(queries) is queries and world_size() == 1
    module = nn.Linear(2, 2)
    module.weight.grad = torch.ones(2, 2)
    average_gradients(module)
    assert module.bias.grad is None and bool((module.weight.grad == 1).all())
    with process_group() as here:
        assert (here.rank, here.world_size, here.is_first) == (0, 1, True)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: ContrastiveLoss(across="ring"), "tile_size must be an int"),
        (lambda: ContrastiveLoss(across="both", tile_size=4), "across must be one of"),
        (lambda: ContrastiveLoss(tile_size="big"), "tile_size must be an int of at least 1"),
        (lambda: average_gradients(lambda x: x), r"modules\[0\] must be a torch module"),
        (lambda: process_group(backend="mpi").__enter__(), "backend must be one of"),
        (lambda: process_group(timeout_seconds=0).__enter__(), "timeout_seconds must be a finite number"),
        (
            lambda: ContrastiveLoss(across="gather")(
                torch.ones(2, 2), torch.ones(2, 2), mask=torch.zeros(2, 2, dtype=torch.bool)
            ),
            "mask must be a rule of gclib.losses.masks",
        ),
    ],
)
def test_bad_arguments_are_refused_in_words(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()
