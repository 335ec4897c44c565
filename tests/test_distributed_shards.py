"""FSDP2 on real gloo ranks against one process: gradients by an oracle's plain autograd, messages by formula."""

import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers.oracles import InfoNCE, token_batch, worst_error
from helpers.ranks import message_of, run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gclib.chunks import Chunk, halved_to
from gclib.course.ranks.shards import Watch
from gclib.distributed import average_gradients, is_dtensor, sharded_units, weights_kept
from gclib.losses.module import ContrastiveLoss
from gclib.steps import accumulation_step, grad_cache_loss, grad_cache_step, naive_step

LAYERS, TEMPERATURE = 2, 0.4
ROWS = {2: [5, 3], 3: [5, 3, 4]}  # each rank's queries: with chunks of 2 they would make unlike numbers of calls
LOSSES = {
    "gather": {"across": "gather"},
    "gather, tiles of 2": {"across": "gather", "tile_size": 2},
    "ring, tiles of 2": {"across": "ring", "tile_size": 2},
}
CUTS = {
    "chunks of 2": {"chunk_size": 2},
    "two retained": {"chunk_size": 2, "retain_chunks": 2},
    "all retained": {"chunk_size": 2, "retain_chunks": 99},
    "file order": {"chunk_size": 2, "sort_by_length": False},
    "by tokens": {"chunk_tokens": 12},
}
CHOICES = ("a chunk", "kept", "kept, once")
CASES = list(itertools.product(LOSSES, CUTS, CHOICES, (False, True), (False, True)))[
    ::7
]  # 7 divides no number of choices
QUICK = frozenset(CASES[::3])
SLOW = pytest.mark.slow


class Layers(nn.Module):
    """Embeddings, layers with a residual, a sum over unmasked tokens; `recomputed`: each layer by checkpointing."""

    def __init__(self, recomputed=False):
        super().__init__()
        self.table = nn.Embedding(23, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(LAYERS))
        self.out = nn.Linear(5, 5)
        self.recomputed = recomputed

    def forward(self, input_ids, attention_mask):
        tokens = self.table(input_ids)
        for layer in self.layers:
            changed = checkpoint(layer, tokens, use_reentrant=False) if self.recomputed else layer(tokens)
            tokens = tokens + torch.tanh(changed)
        return self.out((tokens * attention_mask.unsqueeze(-1).to(tokens.dtype)).sum(dim=1))


def models(tied, *, sharded, **settings):
    torch.manual_seed(1)
    first = Layers(**settings).double()
    encoders = [first, first if tied else Layers(**settings).double()]
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for encoder in dict.fromkeys(encoders) if sharded else ():
        for layer in encoder.layers:
            fully_shard(layer)
        fully_shard(encoder)
    return encoders


def batches(rows, width=6):
    generator = torch.Generator().manual_seed(2)
    return token_batch(sum(rows), width, generator), token_batch(sum(rows), width + 1, generator)


def own_part(batch, rows, rank):
    start = sum(rows[:rank])
    return {key: value[start : start + rows[rank]] for key, value in batch.items()}


def temperature_loss(**settings):
    loss_fn = ContrastiveLoss(TEMPERATURE, learnable=True, **settings).double()
    with torch.no_grad():
        loss_fn.log_temperature.copy_(torch.tensor(TEMPERATURE).double().log())
    return loss_fn


def truth(rows, tied):
    """One process, the whole batch, an oracle's own loss: its value and every parameter's gradient."""
    encoders, loss_fn = models(tied, sharded=False), InfoNCE().double()
    with torch.no_grad():
        loss_fn.temperature.copy_(torch.tensor(TEMPERATURE).double())
    loss = loss_fn(*(encoder(**batch) for encoder, batch in zip(encoders, batches(rows), strict=True)))
    loss.backward()
    gradients = [p.grad for encoder in dict.fromkeys(encoders) for p in encoder.parameters()]
    return float(loss.detach()), [*gradients, loss_fn.temperature.grad * loss_fn.temperature.detach()]


def whole_gradients(encoders, loss_fn):
    """What the optimizer would see, of all ranks together."""
    parameters = [p for encoder in dict.fromkeys(encoders) for p in encoder.parameters()]
    assert all(is_dtensor(p) and is_dtensor(p.grad) for p in parameters)
    return [*(p.grad.full_tensor() for p in parameters), loss_fn.log_temperature.grad]


def run_case(here, case, rows, encoders, loss_fn, inputs, *, watched=False):
    """Its loss, and the `Watch` over it; None where it was not to be watched, which every operation pays for."""
    _, cut, choice, _, as_loss = case
    kept = nullcontext() if choice == "a chunk" else weights_kept(*encoders, reduce_once=choice == "kept, once")
    with Watch() if watched else nullcontext() as watch, kept:
        if as_loss:
            loss = grad_cache_loss(encoders, inputs, loss_fn, **CUTS[cut])
            loss.backward()
        else:
            loss = grad_cache_step(encoders, inputs, loss_fn, **CUTS[cut])
    average_gradients(*encoders, loss_fn)
    return float(loss.detach()), watch


def errors_of_a_rank(here, cases):
    """Per case: the loss's error, the gradients', of two steps in a row."""
    rows = ROWS[here.world_size]
    results = []
    for case in cases:
        loss_name, _, _, tied, _ = case
        encoders, loss_fn = models(tied, sharded=True), temperature_loss(**LOSSES[loss_name])
        inputs = [own_part(batch, rows, here.rank) for batch in batches(rows)]
        right, expected = truth(rows, tied)
        errors = [0.0, 0.0]
        for _ in range(2):  # the first one verifies, the second trusts
            for module in (*encoders, loss_fn):
                module.zero_grad()
            loss, _ = run_case(here, case, rows, encoders, loss_fn, inputs)
            of_gradient = worst_error(whole_gradients(encoders, loss_fn), expected)
            errors = [max(errors[0], abs(loss - right)), max(errors[1], of_gradient)]
        results.append(errors)
    return results


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    known = {}

    def measure(ranks, quick):
        if (ranks, quick) not in known:
            cases = [case for case in CASES if (case in QUICK) == quick]
            errors = run_ranks(errors_of_a_rank, ranks, tmp_path_factory.mktemp(f"shards{ranks}"), cases)
            worst = [[max(numbers) for numbers in zip(*of_case, strict=True)] for of_case in zip(*errors, strict=True)]
            known[ranks, quick] = dict(zip(cases, worst, strict=True))
        return known[ranks, quick]

    return measure


def case_name(case):
    loss, cut, choice, tied, as_loss = case
    return ", ".join([loss, cut, choice, "tied" if tied else "untied", "loss" if as_loss else "step"])


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else SLOW, id=case_name(c)) for c in CASES])
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=SLOW)])
def test_every_rank_ends_with_the_gradient_of_one_process(measured, ranks, case):
    of_loss, of_gradient = measured(ranks, case in QUICK)[case]
    assert of_loss <= 1e-10 and of_gradient <= 1e-10


def test_the_quick_cases_meet_every_choice():
    for choices, quick in zip(zip(*CASES, strict=True), zip(*sorted(QUICK), strict=True), strict=True):
        assert set(choices) == set(quick)


# --- messages -------------------------------------------------------------------------------------------------------


def messages_of_a_rank(here, cases):
    rows, counts = ROWS[here.world_size], []
    inputs = [own_part(batch, rows, here.rank) for batch in batches(rows)]
    for case in cases:
        encoders, loss_fn = models(case[3], sharded=True), temperature_loss(**LOSSES[case[0]])
        run_case(here, case, rows, encoders, loss_fn, inputs)
        _, watch = run_case(here, case, rows, encoders, loss_fn, inputs, watched=True)
        counts.append([watch.count("all-gathers"), watch.count("reduce-scatters")])
    return counts


@pytest.mark.slow
def test_messages_follow_from_chunks_layers_and_the_choice(tmp_path):
    cases = list(itertools.product(["gather"], ["chunks of 2", "two retained"], CHOICES, (False, True), (False, True)))
    chunks = 6  # of both towers: 3 of the rank with 5 rows, and so many of the one with 3
    for counts in run_ranks(messages_of_a_rank, 2, tmp_path, cases):
        for (_, cut, choice, tied, as_loss), (gathers, reductions) in zip(cases, counts, strict=True):
            retained, roots = 2 * (cut == "two retained"), 1 if tied else 2
            if choice == "a chunk":
                again = roots * as_loss  # between the loss and its backward the roots are sharded too
                assert gathers == (3 * chunks - retained) * LAYERS + chunks + again
            else:
                assert gathers == roots * (LAYERS + 1)
            assert reductions == (roots if choice == "kept, once" else chunks) * (LAYERS + 1)


# --- what FSDP does by itself, and is put right -----------------------------------------------------------------------


def weights_after_a_loss_that_is_dropped(here):
    """Whether a forward sees the optimizer's step after grad_cache_loss was never backpropagated."""
    [encoder, _], loss_fn = models(True, sharded=True), temperature_loss(across="gather")
    inputs = [own_part(batch, ROWS[2], here.rank) for batch in batches(ROWS[2])]
    grad_cache_loss([encoder] * 2, inputs, loss_fn, chunk_size=2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.to_local().zero_()
        return float(encoder(**inputs[0]).abs().max())


def test_weights_that_an_optimizer_changed_are_used_also_after_a_loss_that_was_dropped(tmp_path):
    assert run_ranks(weights_after_a_loss_that_is_dropped, 2, tmp_path) == [0.0, 0.0]


def error_with_a_forward_before_the_backward(here):
    """After a forward FSDP2 leaves other parameter objects in the root: no weight has changed."""
    encoders, loss_fn = models(True, sharded=True), temperature_loss(across="gather")
    inputs = [own_part(batch, ROWS[2], here.rank) for batch in batches(ROWS[2])]
    loss = grad_cache_loss(encoders, inputs, loss_fn, chunk_size=2)
    with torch.no_grad():
        encoders[0](**inputs[0])
    loss.backward()
    average_gradients(*encoders, loss_fn)
    return worst_error(whole_gradients(encoders, loss_fn), truth(ROWS[2], True)[1])


def test_a_forward_between_the_loss_and_its_backward_changes_nothing(tmp_path):
    assert max(run_ranks(error_with_a_forward_before_the_backward, 2, tmp_path)) <= 1e-12


def most_bytes_in_the_replay(here):
    """Peaks of the step and of the loss with its backward, whose units would stay whole without the hook."""
    peaks = []
    for as_loss in (False, True):
        torch.manual_seed(1)
        encoder = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12))).double()
        for layer in encoder:
            fully_shard(layer)
        fully_shard(encoder)
        inputs = [torch.randn(2, 64, dtype=torch.float64) for _ in range(2)]
        case = ("gather", "file order", "a chunk", True, as_loss)
        run_case(here, case, None, [encoder] * 2, ContrastiveLoss(across="gather"), inputs)
        encoder.zero_grad()
        both = [encoder] * 2
        peaks.append(
            run_case(here, case, None, both, ContrastiveLoss(across="gather"), inputs, watched=True)[1].peak_bytes
        )
    return peaks


@pytest.mark.slow
def test_a_backward_of_the_loss_holds_no_more_units_than_a_step(tmp_path):
    unit = 64 * 65 * 8
    for of_step, of_loss in run_ranks(most_bytes_in_the_replay, 2, tmp_path):
        assert abs(of_loss - of_step) < unit


def recomputed_layers(here):
    rows, errors = ROWS[2], []
    inputs = [own_part(batch, rows, here.rank) for batch in batches(rows)]
    _, expected = truth(rows, True)
    for as_loss, early in itertools.product((False, True), repeat=2):
        encoders, loss_fn = models(True, sharded=True, recomputed=True), temperature_loss(across="gather")
        with set_checkpoint_early_stop(early):  # without, a unit's forward hooks run inside of a backward too
            run_case(here, ("gather", "two retained", "a chunk", True, as_loss), rows, encoders, loss_fn, inputs)
        errors.append(worst_error(whole_gradients(encoders, loss_fn), expected))
    return errors


@pytest.mark.slow
def test_checkpointing_inside_of_sharded_units_is_right(tmp_path):
    assert max(itertools.chain(*run_ranks(recomputed_layers, 2, tmp_path))) <= 1e-10


def naive_and_twice(here):
    """The naive step, and two cached steps added up inside one `weights_kept`: errors against one process."""
    rows = ROWS[2]
    inputs = [own_part(batch, rows, here.rank) for batch in batches(rows)]
    _, expected = truth(rows, True)
    encoders, loss_fn = models(True, sharded=True), temperature_loss(across="gather")
    naive_step(encoders, inputs, loss_fn)
    average_gradients(*encoders, loss_fn)
    errors = [worst_error(whole_gradients(encoders, loss_fn), expected)]
    encoders, loss_fn = models(True, sharded=True), temperature_loss(across="gather")
    with weights_kept(*encoders):
        for _ in range(2):
            grad_cache_step(encoders, inputs, loss_fn, chunk_size=2)
    average_gradients(*encoders, loss_fn)
    errors.append(worst_error(whole_gradients(encoders, loss_fn), [2 * gradient for gradient in expected]))
    return errors


def test_the_naive_step_and_accumulated_steps_are_right_too(tmp_path):
    assert max(itertools.chain(*run_ranks(naive_and_twice, 2, tmp_path))) <= 1e-10


class Tokens(Layers):
    """One vector a token, zero where the token is padding."""

    def forward(self, input_ids, attention_mask):
        tokens = self.table(input_ids)
        for layer in self.layers:
            tokens = tokens + torch.tanh(layer(tokens))
        return self.out(tokens) * attention_mask.unsqueeze(-1).to(tokens.dtype)


def loss_of_tokens(queries, passages):
    """Each rank's own: all pairs of tokens."""
    return F.cross_entropy(torch.einsum("itd,jsd->ij", queries, passages.tanh()), torch.arange(len(queries)))


def token_vectors(here):
    """A rank whose chunks are all as wide as the batch, and one whose are not, call their encoders equally often."""
    torch.manual_seed(3)
    plain, encoder = Tokens().double(), Tokens().double()
    encoder.load_state_dict(plain.state_dict())
    for layer in encoder.layers:
        fully_shard(layer)
    fully_shard(encoder)
    lengths = torch.tensor([[6, 6, 6, 6], [6, 2, 2, 1]])
    ids = torch.randint(1, 23, (2, 4, 6), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(6) < lengths.unsqueeze(-1)).long()
    for rank in range(2):
        batch = {"input_ids": ids[rank], "attention_mask": mask[rank]}
        (loss_of_tokens(plain(**batch), plain(**batch)) / 2).backward()
    own = {"input_ids": ids[here.rank], "attention_mask": mask[here.rank]}
    grad_cache_step([encoder] * 2, [own] * 2, loss_of_tokens, chunk_size=2)
    return worst_error([p.grad.full_tensor() for p in encoder.parameters()], [p.grad for p in plain.parameters()])


def test_vectors_for_each_token_on_ranks_of_unlike_widths(tmp_path):
    assert max(run_ranks(token_vectors, 2, tmp_path)) <= 1e-10


def accumulated(here):
    """Error with as many chunks on both ranks; then what is said, and whether a gradient is there, with 3 and 2."""
    rows, sizes = ROWS[2], (2, 1)
    plain = models(True, sharded=False)
    for rank, size in enumerate(sizes):
        query, passage = (own_part(batch, rows, rank) for batch in batches(rows))
        for start in range(0, rows[rank], size):
            part = slice(start, start + size)
            reps = [plain[0](**{name: value[part] for name, value in batch.items()}) for batch in (query, passage)]
            (InfoNCE().double()(*reps) * len(reps[0]) / rows[rank] / 2).backward()
    inputs = [own_part(batch, rows, here.rank) for batch in batches(rows)]
    encoders, loss_fn = models(True, sharded=True), InfoNCE().double()
    accumulation_step(encoders, inputs, loss_fn, chunk_size=sizes[here.rank])
    weights = list(encoders[0].parameters())
    error = worst_error([p.grad.full_tensor() for p in weights], [p.grad for p in plain[0].parameters()])
    encoders[0].zero_grad()
    kind, words, _ = message_of(lambda: accumulation_step(encoders, inputs, loss_fn, chunk_size=2))
    return error, kind, words, any(p.grad is not None for p in weights)


def test_accumulation_calls_its_encoders_equally_often_or_is_refused(tmp_path):
    for error, kind, words, touched in run_ranks(accumulated, 2, tmp_path):
        assert error <= 1e-10
        assert (kind, touched) == ("ValueError", False)
        assert words == (
            "chunk_size must make as many chunks on every rank where encoders are sharded, got 3 on rank 0, 2 on rank 1"
        )


# --- what is refused --------------------------------------------------------------------------------------------------


def refusals(here):
    rows = [4, 1]
    inputs = [own_part(batch, rows, here.rank) for batch in batches(rows)]
    encoders, loss_fn = models(True, sharded=True), temperature_loss(across="gather")
    plain = models(True, sharded=False)
    flat = FullyShardedDataParallel(plain[0], device_id=torch.device("cpu"))
    split = nn.Linear(4, 4, bias=False)
    mesh = init_device_mesh("cpu", (here.world_size,))
    split.weight = nn.Parameter(distribute_tensor(split.weight.detach(), mesh, [Replicate()]))

    def average_inside():
        with weights_kept(*encoders):
            average_gradients(*encoders)

    def keep_twice():
        with weights_kept(*encoders), weights_kept(*encoders):
            pass

    def step_in_between():
        loss = grad_cache_loss(
            encoders, [own_part(batch, ROWS[2], here.rank) for batch in batches(ROWS[2])], loss_fn, chunk_size=2
        )
        for parameter in encoders[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(encoders[0].parameters(), lr=0.1).step()
        loss.backward()

    calls = [
        lambda: grad_cache_step(encoders, inputs, loss_fn, chunk_size=1),
        lambda: grad_cache_step([flat, flat], inputs, loss_fn, chunk_size=1),
        average_inside,
        keep_twice,
        lambda: weights_kept(nn.Linear(1, 1)).__enter__(),
        lambda: weights_kept(len).__enter__(),
        lambda: average_gradients(split),
        step_in_between,
    ]
    return [message_of(call)[:2] for call in calls]


def test_what_cannot_be_is_refused_in_words_on_every_rank(tmp_path):
    words = [
        "the cut of inputs[0] must make at most 1 chunks",
        "must be sharded by FSDP2",
        "must be averaged after weights_kept",
        "and not be kept already",
        "must hold modules that fully_shard was called on",
        "modules[0] must be a torch module",
        "such as fully_shard shards",
        "weights or inputs must be at backward()",
    ]
    for messages in run_ranks(refusals, 2, tmp_path):
        for (kind, message), expected in zip(messages, words, strict=True):
            assert kind == "ValueError" and expected in message


def after_an_error(here):
    """A step that fails inside `weights_kept` leaves no gradient and nothing gathered; the next one is right."""
    rows = ROWS[2]
    inputs = [own_part(batch, rows, here.rank) for batch in batches(rows)]
    encoders, loss_fn = models(True, sharded=True), temperature_loss(across="gather")

    def stop(phase, *, tower=None, chunk=None, chunks=None, tensors=()):
        if phase == "replay" and tower == 1:
            raise RuntimeError("stopped")

    def stopped():
        with weights_kept(*encoders):
            grad_cache_step(encoders, inputs, loss_fn, chunk_size=2, on_phase=stop)

    told = message_of(stopped)[1]
    clean = all(is_dtensor(p) and p.grad is None for p in encoders[0].parameters())
    loss_fn.zero_grad()
    _, expected = truth(rows, True)
    errors = []
    for choice in ("a chunk", "kept, once"):
        for module in (*encoders, loss_fn):
            module.zero_grad()
        run_case(here, ("gather", "chunks of 2", choice, True, False), rows, encoders, loss_fn, inputs)
        errors.append(worst_error(whole_gradients(encoders, loss_fn), expected))
    return [told, clean, max(errors)]


def test_a_step_that_fails_leaves_fsdp_as_it_was(tmp_path):
    for told, clean, error in run_ranks(after_an_error, 2, tmp_path):
        assert told == "stopped" and clean and error <= 1e-10


# --- alone ------------------------------------------------------------------------------------------------------------


def test_chunks_are_halved_until_there_are_enough():
    plan = [Chunk((0, 1, 2), 4), Chunk((3, 4), 3)]
    assert halved_to(plan, 2) == plan
    assert halved_to(plan, 3) == [Chunk((0, 1), 4), Chunk((2,), 4), Chunk((3, 4), 3)]
    assert sorted(row for chunk in halved_to(plan, 5) for row in chunk.rows) == [0, 1, 2, 3, 4]


def test_nothing_is_sharded_in_a_plain_module():
    assert sharded_units([nn.Linear(1, 1), lambda x: x]) == [] and not is_dtensor(torch.ones(1))
