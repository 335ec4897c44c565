"""Encoders that break what a step assumes of them: the right gradient all the same, or a refusal in words."""

import random
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, gradients, token_batch, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from gclib.chunks import Chunk, plan_chunks
from gclib.distance import distance_cache_step
from gclib.memory.ledger import record_memory
from gclib.steps import accumulation_step, grad_cache_loss, grad_cache_step, naive_step
from gclib.support.modules import modules_of
from gclib.towers import Tower, row_lengths
from gclib.verify import _generators_kept, learn, seen, sketch

CACHED = partial(grad_cache_step, chunk_size=3)


def pictures(rows=8, seed=0):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts(rows=8, width=6, seed=0):
    batch = token_batch(rows, width, torch.Generator().manual_seed(seed))
    batch["attention_mask"][0] = 1
    batch["input_ids"][:, 0] = 1
    batch["attention_mask"][:, 0] = 1
    return batch


def error(encoder, inputs, loss=None, *, step=CACHED, modules=None):
    """The step's error against plain autograd over the whole batch."""
    loss = (loss or InfoNCE()).double() if not callable(loss) or isinstance(loss, nn.Module) or loss is None else loss
    modules = [*(modules or [encoder]), *([loss] if isinstance(loss, nn.Module) else [])]

    def call(batch):
        return encoder(**batch) if isinstance(batch, dict) else encoder(batch)

    def whole():
        value = loss(call(inputs[0]), call(inputs[1]))
        value.backward()
        return value

    truth = gradients(modules, whole)
    return worst_error(gradients(modules, lambda: step([encoder] * 2, inputs, loss))[1], truth[1])


class Around(nn.Module):
    """A layer, and something behind it."""

    def __init__(self, behind):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.behind = behind

    def forward(self, x):
        return self.behind(self.layer(x))


class Running(nn.Module):
    """Divides by a running scale that each forward in training mode moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("square", torch.ones(4))

    def forward(self, x):
        if self.training:
            self.square.mul_(0.9).add_(x.detach().square().mean(0), alpha=0.1)
        return x / self.square.sqrt()


class Attribute(Running):
    """The same with a plain number for its state."""

    scale = 1.0

    def forward(self, x):
        self.scale *= 1.1
        return x * self.scale


def numpy_noise(x):
    return x * (1 + 0.1 * torch.from_numpy(np.random.standard_normal(tuple(x.shape))))


def python_noise(x):
    return x * (1 + 0.1 * random.random())


CHANGING = {
    "spectral norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "a running scale in a buffer": Running,
    "a running scale in an attribute": Attribute,
    "numpy's generator": lambda: numpy_noise,
    "Python's generator": lambda: python_noise,
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"chunk_size": 3, "retain_chunks": 2}, {"chunk_size": 8}])
def test_an_encoder_whose_second_forward_is_another_is_refused(name, options):
    encoder = Around(CHANGING[name]()).double()
    with pytest.raises(
        ValueError,
        match=r"encoders\[[01]\] must (return the second time what|encode each row by itself)",
    ):
        grad_cache_step([encoder] * 2, [pictures(), pictures(seed=1)], InfoNCE().double(), **options)


@pytest.mark.parametrize("name", CHANGING)
def test_trusted_blindly_their_gradient_is_another_one(name):
    encoder = Around(CHANGING[name]()).double()
    state = {key: value.clone() for key, value in encoder.state_dict().items()}

    def started(step):
        encoder.load_state_dict(state)
        np.random.seed(0)
        random.seed(0)
        encoder.behind.__dict__.pop("scale", None)
        return gradients([encoder], lambda: step([encoder] * 2, [pictures(), pictures(seed=1)], InfoNCE().double()))[1]

    blind = started(partial(grad_cache_step, chunk_size=8, verify="never"))
    assert worst_error(blind, started(naive_step)) > 1e-4


TOGETHER = {
    "a mean over the batch": lambda x: x - x.mean(0),
    "batch statistics without a module": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "a threshold at a quantile of the batch": lambda x: x * (x.detach() <= x.detach().quantile(0.9)),
    "a scale that goes with the row's place": lambda x: x * torch.arange(1, len(x) + 1)[:, None],
    "another first row": lambda x: torch.cat([2 * x[:1], x[1:]]),
    "another third row": lambda x: torch.cat([x[:2], 2 * x[2:3], x[3:]]),
    "another scale for two rows": lambda x: x * (1 if len(x) == 2 else 2),
    "a mean over three rows and more": lambda x: x - (x.mean(0) if len(x) > 2 else 0),
    "a threshold at the batch's median": lambda x: x * (x > x.median(0).values),
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rows_that_depend_on_each_other_are_refused(name, dropout):
    encoder = Around(nn.Sequential(nn.Dropout(dropout))).double()
    behind = TOGETHER[name]
    with pytest.raises(ValueError, match=r"encoders\[0\] must encode each row by itself"):
        CACHED([lambda x: behind(encoder(x))] * 2, [pictures(), pictures(seed=1)], InfoNCE().double())


def test_one_chunk_that_is_the_batch_may_hold_rows_that_depend_on_each_other():
    encoder = Around(TOGETHER["a mean over the batch"]).double()
    inputs = [pictures(), pictures(seed=1)]
    assert error(encoder, inputs, step=partial(grad_cache_step, chunk_size=8)) <= 1e-12


class Holder:
    """A callable object around a module."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)


def test_batch_norm_behind_a_callable_is_found():
    encoder = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    holder = type(
        "Holder", (), {"__init__": lambda self: setattr(self, "model", encoder), "__call__": lambda self, x: 0}
    )
    for hidden in (lambda x: encoder(x), partial(lambda model, x: model(x), encoder), encoder.forward, holder()):
        for step in (CACHED, partial(accumulation_step, chunk_size=3)):
            with pytest.raises(ValueError, match="BatchNorm in training mode"):
                step([hidden] * 2, [pictures(), pictures()], InfoNCE().double())


class Padded(nn.Module):
    """An encoder of texts that padding changes."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.table = kind, nn.Embedding(23, 6)
        self.lstm = nn.LSTM(6, 3, bidirectional=True, batch_first=True)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, input_ids, attention_mask):
        tokens = self.table(input_ids)
        if self.kind == "LSTM":
            tokens = self.lstm(tokens)[0]
        elif self.kind == "convolution":
            tokens = self.convolution(tokens.transpose(1, 2)).transpose(1, 2)
        else:
            tokens = torch.fft.fft(tokens, dim=1).real
        weights = attention_mask.unsqueeze(-1)
        return (tokens * weights).sum(1) / weights.sum(1)


@pytest.mark.parametrize("kind", ["LSTM", "convolution", "Fourier"])
@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"chunk_tokens": 12, "retain_chunks": 1}])
def test_an_encoder_that_padding_changes_is_left_untrimmed_with_a_warning(kind, options):
    encoder, inputs = Padded(kind).double(), [texts(), texts(seed=1)]
    step = partial(grad_cache_step, **options)
    with pytest.warns(UserWarning, match="sort_by_length=False"):
        assert error(encoder, inputs, step=step) <= 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert error(encoder, inputs, step=step) <= 1e-12
    assert error(encoder, inputs, step=partial(step, verify="never")) > 1e-4
    plan = [plan_chunks([int(row.sum()) for row in batch["attention_mask"]], chunk_size=3) for batch in inputs]
    with pytest.raises(ValueError, match="plan must not trim"):
        grad_cache_step([encoder] * 2, inputs, InfoNCE().double(), plan=plan)


def test_token_vectors_of_padding_must_be_zero_to_be_trimmed():
    table = nn.Embedding(23, 4).double()
    inputs = [texts(), texts(seed=1)]

    def unmasked(input_ids, attention_mask):
        return table(input_ids)

    with pytest.warns(UserWarning, match="vectors of padding"):
        assert error(unmasked, inputs, best_match, modules=[table]) <= 1e-12


def best_match(queries, passages):
    scores = torch.einsum("qid,pjd->qpij", queries, passages).amax(dim=(2, 3))
    return nn.functional.cross_entropy(scores, torch.arange(len(queries)))


class Codes(nn.Module):
    """As many vectors for every text, however long."""

    def __init__(self, count):
        super().__init__()
        self.table, self.codes = nn.Embedding(23, 4), nn.Parameter(torch.randn(count, 4))

    def forward(self, input_ids, attention_mask):
        tokens = self.table(input_ids)
        scores = (self.codes @ tokens.transpose(1, 2)).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return scores.softmax(-1) @ tokens


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("retain", [0, 2])
def test_as_many_vectors_as_tokens_are_no_token_vectors(count, retain):
    inputs = [{name: nn.functional.pad(t, (0, 3)) for name, t in texts(width=5, seed=seed).items()} for seed in (0, 1)]
    encoder = Codes(count).double()
    assert error(encoder, inputs, best_match, step=partial(CACHED, retain_chunks=retain)) <= 1e-12


class Prompted(nn.Module):
    """Token vectors behind two learnt ones; `stride` keeps every second."""

    def __init__(self, stride=1):
        super().__init__()
        self.table, self.prompt, self.stride = nn.Embedding(23, 4), nn.Parameter(torch.randn(2, 4)), stride

    def forward(self, input_ids, attention_mask):
        tokens = self.table(input_ids) * attention_mask.unsqueeze(-1)
        return torch.cat([self.prompt.expand(len(tokens), 2, 4), tokens], 1)[:, :: self.stride]


def test_token_vectors_behind_soft_prompts_are_widened():
    inputs = [{name: nn.functional.pad(t, (0, 2)) for name, t in texts(seed=seed).items()} for seed in (0, 1)]
    assert error(Prompted().double(), inputs, best_match) <= 1e-12


def test_vectors_that_go_neither_with_texts_nor_with_tokens_are_left_untrimmed():
    inputs = [{name: nn.functional.pad(t, (0, 3)) for name, t in texts(seed=seed).items()} for seed in (0, 1)]
    encoder = Prompted(stride=2).double()
    assert error(encoder, inputs, best_match) <= 1e-12
    with pytest.raises(ValueError, match="one vector a token, or as many for every text"):
        CACHED([Prompted(stride=2)] * 2, inputs, best_match, verify="never")


class Regions(nn.Module):
    """A text beside regions of a picture, (rows, R, 5)."""

    def __init__(self):
        super().__init__()
        self.text, self.picture = TinyEncoder(), nn.Linear(5, 5)

    def forward(self, regions, **text):
        return self.text(**text) + self.picture(regions).sum(1)


@pytest.mark.parametrize("count", [4, 5, 6, 7])
@pytest.mark.parametrize("token_inputs", [None, ()])
def test_regions_beside_a_text_are_not_cut_by_a_coincidence(count, token_inputs):
    inputs = [texts(seed=seed) | {"regions": torch.randn(8, count, 5).double()} for seed in (0, 1)]
    step = partial(CACHED, token_inputs=token_inputs)
    assert error(Regions().double(), inputs, step=step) <= 1e-12


def test_named_token_inputs_are_trimmed_and_unknown_ones_keep_the_batch_untrimmed():
    widths = []

    def encoder(input_ids, attention_mask, weights):
        widths.append(input_ids.shape[1])
        return model(input_ids, attention_mask * weights)

    model, inputs = TinyEncoder(), [texts(seed=seed) | {"weights": torch.rand(8, 6)} for seed in (0, 1)]
    CACHED([encoder] * 2, inputs, InfoNCE(), verify="never")
    assert set(widths) == {6}
    CACHED([encoder] * 2, inputs, InfoNCE(), token_inputs=["weights"], verify="never")
    assert min(widths) < 6


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("weights", "must be a list of names"),
        (3, "must be a list of names"),
        (["heft"], r"must name entries of the in"),
    ],
)
def test_token_inputs_that_no_input_has_are_refused(names, words):
    inputs = [texts(seed=seed) | {"weights": torch.rand(8, 6)} for seed in (0, 1)]
    with pytest.raises(ValueError, match=f"token_inputs {words}"):
        CACHED([TinyEncoder()] * 2, inputs, InfoNCE(), token_inputs=names)


def test_a_draw_that_moves_numpys_place_alone_is_seen():
    tower = Tower(0, TinyEncoder(), texts(seed=0), 8, (), 6)
    np.random.seed(0)
    np.random.rand()  # the keys are made; what follows moves the place in them
    with _generators_kept(tower) as again:
        assert again(np.random.rand, told=True)[1] and not again(lambda: None, told=True)[1]


def test_writing_into_the_inputs_is_refused_before_the_batch_is_changed():
    model = nn.Linear(5, 4).double()
    inputs = [pictures(), pictures(seed=1)]
    before = [batch.clone() for batch in inputs]
    with pytest.raises(ValueError, match="must not write into its inputs"):
        CACHED([lambda x: model(x.mul_(0.5))] * 2, inputs, InfoNCE().double())
    assert all(map(torch.equal, inputs, before))


def test_the_first_step_looks_and_later_ones_trust():
    encoder, calls = TinyEncoder(0.5).double().train(), []
    encoder.register_forward_hook(lambda module, args, kwargs, out: calls.append(len(out)), with_kwargs=True)
    inputs, loss = [texts(), texts(seed=1)], InfoNCE().double()
    counts, changes = [], []
    for verify in ("first", "first", "always", "never"):
        calls.clear()
        torch.manual_seed(1)
        step = partial(CACHED, verify=verify, retain_chunks=1)
        changes.append(gradients([encoder, loss], lambda step=step: step([encoder] * 2, inputs, loss))[1])
        counts.append(len(calls))
    later = counts[1]
    assert counts == [later + 8, later, later + 16, later]  # tied towers are looked at once; always: each of them
    for change in changes[1:]:  # what looks at rows draws nothing
        assert all(map(torch.equal, change, changes[0]))


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_first_step_takes_the_bytes_of_a_later_one(chunk_size, dtype):
    encoder, inputs, loss = TinyEncoder().to(dtype), [texts(), texts(seed=1)], InfoNCE().to(dtype)

    def peak():
        encoder.zero_grad(set_to_none=True)
        loss.zero_grad(set_to_none=True)
        with record_memory(encoder, loss) as ledger:
            grad_cache_step([encoder] * 2, inputs, loss, chunk_size=chunk_size, on_phase=ledger.on_phase)
        return ledger.peak_bytes

    assert peak() == peak()


class Slightly(nn.Module):
    """A layer whose output moves by `size` of its length in each forward with a graph: in one number, or in all."""

    def __init__(self, size, everywhere):
        super().__init__()
        self.layer, self.size, self.everywhere = nn.Linear(5, 4), size, everywhere

    def forward(self, x):
        output = self.layer(x)
        if not torch.is_grad_enabled():
            return output
        away = torch.ones_like(output) if self.everywhere else torch.eye(*output.shape).to(output) * (x[0, 0] * 0 + 1)
        return output + away * (self.size * output.detach().norm() / away.norm())


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e-8), (torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_a_second_forward_that_is_slightly_another_is_refused(dtype, size, everywhere):
    inputs, loss = [pictures().to(dtype), pictures(seed=1).to(dtype)], InfoNCE().to(dtype)
    with pytest.raises(ValueError, match="the second time"):
        CACHED([Slightly(size, everywhere).to(dtype)] * 2, inputs, loss)
    CACHED([Slightly(size / 1e3, everywhere).to(dtype)] * 2, inputs, loss)


@settings(deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), seed=st.integers(0, 10**6), part=st.floats(0, 1))
def test_sketches_are_as_far_apart_as_what_they_stand_for(shape, seed, part):
    generator = torch.Generator().manual_seed(seed)
    first, away = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    away = away * (torch.rand(shape, generator=generator) <= part)
    (numbers, length), (others, _) = sketch(first), sketch(first + 1e-6 * away)
    assert length == pytest.approx(float(first.norm()))
    told, true = float(np.sqrt(np.square(numbers - others).mean())), 1e-6 * float(away.norm())
    assert true / 50 <= told <= 50 * true + 1e-14 * length


def test_a_sketch_passes_over_trailing_zeros_and_tells_numbers_that_are_not_finite():
    reps = torch.randn(3, 4, 5, dtype=torch.float64)
    padded = nn.functional.pad(reps, (0, 0, 0, 3))
    assert np.allclose(sketch(reps)[0], sketch(padded)[0], rtol=1e-12)
    with_nan, with_infinity = reps.clone(), reps.clone()
    with_nan[0, 0, 0], with_infinity[0, 0, 0] = torch.nan, torch.inf
    assert np.array_equal(sketch(with_nan)[0], sketch(with_nan)[0])
    assert not np.allclose(sketch(with_nan)[0], sketch(with_infinity)[0])


def test_another_mode_is_looked_at_anew():
    encoder = Around(Running()).double().eval()
    inputs = [pictures(), pictures(seed=1)]
    assert error(encoder, inputs) <= 1e-12
    encoder.train()
    with pytest.raises(ValueError, match="each row by itself"):
        CACHED([encoder] * 2, inputs, InfoNCE().double())


def test_always_sees_what_turns_bad_later():
    behind = nn.Sequential(nn.Identity())
    encoder, inputs = Around(behind).double(), [pictures(), pictures(seed=1)]
    CACHED([encoder] * 2, inputs, InfoNCE().double())
    behind[0] = Attribute().double()
    CACHED([encoder] * 2, inputs, InfoNCE().double())
    with pytest.raises(ValueError, match="the second time"):
        CACHED([encoder] * 2, inputs, InfoNCE().double(), verify="always")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_is_no_reason_to_refuse(dtype, autocast):
    encoder = TinyEncoder(0.3).train().to(torch.float32 if autocast else dtype)
    loss = InfoNCE().to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        CACHED([encoder] * 2, [texts(), texts(seed=1)], loss, verify="always")


@pytest.mark.parametrize("step", [naive_step, partial(accumulation_step, chunk_size=3), CACHED])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_refused(step, context):
    with context(), pytest.raises(ValueError, match=r"no_grad.*inference_mode"):
        step([TinyEncoder()] * 2, [texts(), texts(seed=1)], InfoNCE())


@pytest.mark.parametrize("step", [partial(accumulation_step, chunk_size=3), CACHED])
def test_inputs_that_chunks_cannot_share_are_refused(step):
    trunk, head = nn.Linear(5, 5).double(), nn.Linear(5, 4).double()
    with torch.inference_mode():
        made = pictures()
    for batch, words in (
        (made, "inference_mode"),
        (trunk(pictures()), "graph of their own"),
        (pictures().to("meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=words):
            step([head] * 2, [batch, pictures()], InfoNCE().double())
    leaf = pictures().requires_grad_()
    step([head] * 2, [leaf, pictures(seed=1)], InfoNCE().double())
    assert leaf.grad is not None


class Checkpointed(nn.Module):
    """A frozen base under reentrant checkpointing, and a trained head inside it: no graph reaches the head."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 4)

    def forward(self, x):
        return checkpoint(lambda x: self.head(self.base(x)), x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("retain", [0, 2, 99])
def test_nothing_to_train_is_refused_as_in_the_naive_step(retain):
    plain = InfoNCE(learnable=False).double()
    for encoder in (Checkpointed().double(), nn.Linear(5, 4).double().requires_grad_(False)):
        for step in (naive_step, partial(CACHED, retain_chunks=retain)):
            with pytest.raises(ValueError, match="without a graph"):
                step([encoder] * 2, [pictures(), pictures(seed=1)], plain)
        loss = InfoNCE().double()
        CACHED([encoder] * 2, [pictures(), pictures(seed=1)], loss, retain_chunks=retain)
        assert loss.temperature.grad is not None


def test_a_distance_whose_second_forward_is_another_is_refused():
    model, encoder = nn.Linear(4, 1).double(), nn.Linear(5, 4).double()

    def distance(queries, passages):
        return numpy_noise(model(queries[:, None] * passages[None]).squeeze(-1))

    inputs = [pictures(), pictures(seed=1)]
    with pytest.raises(ValueError, match="distance must return the second time"):
        distance_cache_step([encoder] * 2, distance, inputs, lambda d: d.logsumexp(1).mean(), chunk_size=3)


def test_verify_is_one_of_three_words():
    with pytest.raises(ValueError, match="verify must be one of 'first', 'always', 'never', got 'once'"):
        CACHED([TinyEncoder()] * 2, [texts(), texts()], InfoNCE(), verify="once")


def test_hooks_on_gradients_are_told_once_and_linear_ones_are_right():
    encoder = TinyEncoder().double()
    encoder.table.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.warns(UserWarning, match=r"encoders\[0\]: the gradient hook on table.weight runs once a chunk"):
        assert error(encoder, [texts(), texts(seed=1)]) <= 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(encoder, [texts(), texts(seed=1)]) <= 1e-12


def test_an_optimizer_inside_the_backward_is_refused_before_anything_is_done():
    encoder = TinyEncoder().double()
    encoder.table.weight.register_post_accumulate_grad_hook(lambda parameter: parameter.data.sub_(parameter.grad))
    before = encoder.table.weight.detach().clone()
    with pytest.raises(ValueError, match=r"encoders\[0\] must have no hooks .* got one on table.weight"):
        CACHED([encoder] * 2, [texts(), texts(seed=1)], InfoNCE().double())
    assert torch.equal(encoder.table.weight, before)


def test_the_ledgers_own_hooks_may_stay():
    encoder = TinyEncoder().double()
    with record_memory(encoder) as ledger:
        CACHED([encoder] * 2, [texts(), texts(seed=1)], InfoNCE().double(), on_phase=ledger.on_phase)
    assert ledger.peak_bytes > 0 and not encoder.table.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_ready_plan_that_cuts_tokens_off_is_refused(verify):
    inputs, plan = [texts(seed=seed) for seed in (0, 1)], [Chunk((0, 1, 2, 3), 3), Chunk((4, 5, 6, 7), 6)]
    with pytest.raises(ValueError, match="plan must have chunks as wide as their rows of inputs.0., here 6 tokens"):
        grad_cache_step([TinyEncoder()] * 2, inputs, InfoNCE(), plan=[plan] * 2, verify=verify)


class TwoWays(nn.Module):
    """One vector a token, or always four vectors: two methods of one object."""

    def __init__(self):
        super().__init__()
        self.embed, self.four_of = nn.Embedding(64, 4), nn.Linear(4, 16)

    def tokens(self, input_ids, attention_mask):
        return self.embed(input_ids) * attention_mask.unsqueeze(-1)

    def four(self, input_ids, attention_mask):
        return self.four_of(self.tokens(input_ids, attention_mask).sum(1)).unflatten(1, (4, 4))


@pytest.mark.parametrize("names", [("tokens", "four"), ("four", "tokens")])
def test_two_methods_of_one_object_have_shapes_of_their_own(names):
    model = TwoWays().double()
    inputs = [texts(seed=seed) for seed in (0, 1)]
    inputs[0]["attention_mask"][:, 4:] = inputs[1]["attention_mask"][:, 5:] = 0

    def loss(queries, passages):
        return InfoNCE().double()(queries.tanh().sum(1), passages.tanh().sum(1))

    encoders = [getattr(model, name) for name in names]
    value, truth = gradients([model], lambda: naive_step(encoders, inputs, loss))
    found, changes = gradients([model], lambda: CACHED(encoders, inputs, loss))
    assert abs(float(value) - float(found)) <= 1e-12 and worst_error(changes, truth) <= 1e-12


def exchange_a_weight(encoder, inputs):
    encoder.layer[0].weight = nn.Parameter(encoder.layer[0].weight.detach() + 1)


def exchange_an_input(encoder, inputs):
    inputs[0] = {"x": inputs[0].pop("x") + 1}


def exchange_an_entry(encoder, inputs):
    inputs[0]["x"] = inputs[0]["x"] + 1


@pytest.mark.parametrize("exchange", [exchange_a_weight, exchange_an_entry, exchange_an_input])
def test_what_is_exchanged_before_the_backward_is_refused(exchange):
    encoder, inputs = Around(nn.Tanh()).double(), [{"x": pictures(seed=seed)} for seed in (0, 1)]
    CACHED([encoder] * 2, inputs, InfoNCE().double())  # trusted from here on
    loss = grad_cache_loss([encoder] * 2, inputs, InfoNCE().double(), chunk_size=3)
    exchange(encoder, inputs)
    with pytest.raises(ValueError, match="weights or inputs must be at backward"):
        loss.backward()


def test_a_hook_that_steps_is_refused_in_a_distance_and_in_accumulation():
    encoder, distance = Around(nn.Tanh()), nn.Bilinear(4, 4, 1)
    distance.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="distance must have no hooks that run as soon as a gradient is there"):
        distance_cache_step([encoder] * 2, distance, [pictures().float()] * 2, torch.sum, chunk_size=2)
    encoder.layer[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"encoders\[0\] must have no hooks that run as soon as a gradient is there"):
        accumulation_step([encoder] * 2, [pictures().float()] * 2, InfoNCE(), chunk_size=2)


def test_what_was_seen_in_one_mode_of_a_part_is_not_taken_for_another():
    encoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    learn(encoder, "replay", "cpu", True)
    encoder[1].train()
    assert seen(encoder, "replay", "cpu") is None


def test_a_buffer_that_a_forward_exchanges_is_as_without_the_look():
    counted = []
    for verify in ("first", "never"):
        encoder = Around(nn.Tanh())
        encoder.behind.register_buffer("count", torch.zeros(()))
        encoder.behind.register_forward_hook(lambda part, *_: setattr(part, "count", part.count + 1))
        CACHED([encoder] * 2, [pictures().float(), pictures(seed=1).float()], InfoNCE(), verify=verify)
        counted.append(int(encoder.behind.count))
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (nn.BatchNorm1d(5, track_running_stats=False).eval(), "BatchNorm without running statistics"),
        (nn.BatchNorm1d(5, track_running_stats=False), "Give it running ones"),
        (nn.InstanceNorm1d(5, track_running_stats=True), "InstanceNorm that tracks statistics"),
    ],
)
def test_other_statistics_of_a_chunk_are_refused(part, words):
    with pytest.raises(ValueError, match=words):
        CACHED([nn.Sequential(part, nn.Linear(5, 4))] * 2, [pictures().float()] * 2, InfoNCE())


@dataclass
class Unhashable:
    """A callable that no dictionary takes for a key."""

    model: nn.Module

    def __call__(self, x):
        return self.model(x)


def test_an_encoder_without_a_hash_is_looked_at_in_each_step():
    encoder = Around(nn.Tanh()).double()
    inputs = [pictures(), pictures(seed=1)]
    truth = gradients([encoder], lambda: naive_step([Unhashable(encoder)] * 2, inputs, InfoNCE().double()))[1]
    found = gradients([encoder], lambda: CACHED([Unhashable(encoder)] * 2, inputs, InfoNCE().double()))[1]
    assert worst_error(found, truth) <= 1e-12


def test_texts_of_an_encoder_without_a_hash_are_trimmed_and_a_ready_plan_is_taken():
    widths, model, inputs = [], TinyEncoder(), [texts(seed=seed) for seed in (0, 1)]

    @dataclass
    class Encoding:
        model: nn.Module

        def __call__(self, input_ids, attention_mask):
            widths.append(input_ids.shape[1])
            return self.model(input_ids, attention_mask)

    CACHED([Encoding(model)] * 2, inputs, InfoNCE())
    assert min(widths) < 6
    plans = [plan_chunks(row_lengths(batch), chunk_size=3) for batch in inputs]
    assert any(chunk.width < 6 for plan in plans for chunk in plan)
    grad_cache_step([Encoding(model)] * 2, inputs, InfoNCE(), plan=plans)


def test_a_method_s_other_modules_are_not_its_own():
    class Trainer:
        def __init__(self):
            self.model, self.teacher = nn.Linear(2, 2), nn.BatchNorm1d(2)

        def encode(self, x):
            return self.model(x)

        def through_a_helper(self, x):
            return self.encode(x)

        @property
        def layer(self):
            return self.model

        @torch.autocast("cpu")
        def through_a_property(self, x):
            return torch.stack([self.layer(row) for row in x])

    class Child(Trainer):
        def encode(self, x):
            return super().encode(x)

    for trainer in (Trainer(), Child()):
        for method in (trainer.encode, trainer.through_a_helper, trainer.through_a_property):
            assert modules_of(method) == [trainer.model]
