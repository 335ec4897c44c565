"""Rules against whole masks made number by number, in every form of the loss; what they cost; what is refused."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.long_double import errors, exact, own_errors, value_and_gradients
from helpers.oracles import gradients, unique_parameters, worst_error
from helpers.ranks import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gclib import ContrastiveLoss, accumulation_step, grad_cache_loss, grad_cache_step, naive_step
from gclib.losses.dense import contrastive_loss
from gclib.losses.directions import TEXTS
from gclib.losses.masks import GuideFilter, HardnessWeight, Rules, SameIds
from gclib.losses.max_sim import MaxSimLoss
from gclib.losses.tiled import tiled_contrastive_loss
from gclib.memory.ledger import record_memory

NAMES = ("loss", "queries", "passages", "temperature")
WAYS = (
    {},
    {"symmetric": True},
    {"directions": ("query_to_passage", "query_to_query")},
    {"directions": ("query_to_passage", "passage_to_query")},
    {"directions": ("query_to_passage", "passage_to_query"), "partition": "per_direction"},
    {"directions": ("passage_to_query", "query_to_passage", "query_to_query", "passage_to_passage")},
    {"directions": ("query_to_passage", "query_to_query", "positive_to_positive")},
)


# --- The rules, number by number ------------------------------------------------------------------------------------


def same_ids(direction, query_ids, passage_ids, group):
    """What SameIds' docstring says, in loops."""
    batch = len(query_ids)
    right = [passage_ids[i * group] for i in range(batch)]
    left_out = []
    for i in range(batch):
        row = []
        if direction in ("query_to_query", "positive_to_positive", "passage_to_query"):
            for k in range(batch):
                row.append(query_ids[i] == query_ids[k] or right[i] == right[k])
        else:
            for j, passage in enumerate(passage_ids):
                is_positive = j % group == 0
                row.append(passage == right[i] or (is_positive and query_ids[j // group] == query_ids[i]))
        left_out.append(row)
    return np.array(left_out)


def guided(direction, guide_queries, guide_passages, group, margin, kind):
    """GISTEmbed's filter, from cosines; the distance of the nearest one from its threshold."""
    q, p = (reps.double().numpy() for reps in (guide_queries, guide_passages))
    q, p = (reps / np.linalg.norm(reps, axis=1, keepdims=True) for reps in (q, p))
    texts = {"queries": q, "passages": p, "positives": p[::group]}
    own = (q * p[::group]).sum(1)
    least = own - margin * (np.abs(own) if kind == "relative" else 1)
    if direction == "passage_to_query":
        distances = ((q @ p[::group].T) - least[:, None]).T
    else:
        left, right = TEXTS[direction]
        distances = texts[left] @ texts[right].T - least[:, None]
    return distances > 0, distances


def weighed(kind, batch, group):
    """The query-to-passage logits that are weighed."""
    mine = np.arange(batch * group)[None, :] // group == np.arange(batch)[:, None]
    positive = mine & (np.arange(batch * group)[None, :] % group == 0)
    return {"in_batch_negatives": ~mine, "hard_negatives": mine & ~positive, "all_negatives": ~positive}[kind]


def drawn_case(draw, batch, hard):
    """A rule and what says the same: masks by direction, and weights."""
    group, kinds = 1 + hard, draw.choice([("ids",), ("guide",), ("weight",), ("ids", "guide", "weight"), ()])
    rules, masks, weights = [], {}, {}
    shape = {name: (batch, batch * (group if TEXTS[name][1] == "passages" else 1)) for name in TEXTS}
    masks = {name: np.zeros(shape[name], dtype=bool) for name in TEXTS}
    if "ids" in kinds:
        query_ids = [draw.randrange(2 + batch // 2) for _ in range(batch)]
        passage_ids = [draw.randrange(2 + batch) for _ in range(batch * group)]
        rules.append(SameIds(torch.tensor(query_ids), torch.tensor(passage_ids)))
        masks = {name: masks[name] | same_ids(name, query_ids, passage_ids, group) for name in TEXTS}
    if "guide" in kinds:
        guide = torch.randn(batch, 3).double(), torch.randn(batch * group, 3).double()
        margin, kind = draw.choice([-0.3, 0.0, 0.1]), draw.choice(["absolute", "relative"])
        rules.append(GuideFilter(*guide, margin=margin, kind=kind))
        masks = {name: masks[name] | guided(name, *guide, group, margin, kind)[0] for name in TEXTS}
    if "weight" in kinds:
        kind = draw.choice(["in_batch_negatives", "hard_negatives", "all_negatives"])
        strength = draw.choice([0.5, 5.0])
        rules.append(HardnessWeight(strength, kind))
        weights = {"strength": strength, "weighed": weighed(kind, batch, group)}
    rule = None if not rules else rules[0] if len(rules) == 1 else Rules(rules)
    return rule, masks, weights


def names_of(way):
    """The directions, and whether they are joint, of a loss's settings."""
    if way.get("symmetric"):
        return ["query_to_passage", "passage_to_query"], False
    return sorted(way.get("directions", ["query_to_passage"]), key=list(TEXTS).index), way.get("partition") is None


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    chance = random.Random(seed)
    batch, hard = draw(st.integers(1, 14)), draw(st.integers(0, 3))
    dtype, scale = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.sampled_from([0.3, 1.0, 4.0]))
    reps = [scale * torch.randn(rows, draw(st.integers(3, 3)), dtype=dtype) for rows in (batch, batch * (1 + hard))]
    temperature = torch.tensor(draw(st.sampled_from([0.05, 0.3, 1.0])), dtype=dtype)
    case = drawn_case(chance, batch, hard)
    return (*reps, temperature), case, draw(st.sampled_from(WAYS)), draw(st.integers(1, 16))


@pytest.mark.slow
@given(problems())
def test_rules_in_tiles_err_at_most_4_times_as_much_as_the_dense_masked_loss(problem):
    inputs, (rule, masks, weights), way, tile_size = problem
    names, joint = names_of(way)

    def oracle(*inputs):
        return exact(*inputs, names, joint, masks, **weights)

    def dense(*inputs):
        return value_and_gradients(contrastive_loss, *inputs, mask=rule, **way)

    tiled = value_and_gradients(tiled_contrastive_loss, *inputs, mask=rule, **way, tile_size=tile_size)
    found = errors(tiled, oracle(*inputs))
    for neighbours in (6, 60):  # the worst of a few errors of one number may be a small one: then of ten times as many
        allowed = own_errors(dense, oracle, inputs, neighbours)
        if all(error <= 4 * own for error, own in zip(found, allowed, strict=True)):
            return
    pytest.fail(f"errors of {NAMES}: {found}, the dense version's own {allowed}")


@given(problems())
def test_the_dense_loss_with_rules_is_the_formula(problem):
    (queries, passages, temperature), (rule, masks, weights), way, _ = problem
    inputs = queries.double(), passages.double(), temperature.double()
    truth = exact(*inputs, *names_of(way), masks, **weights)
    values = value_and_gradients(contrastive_loss, *inputs, mask=rule, **way)
    scale = float(np.sqrt(sum(np.linalg.norm(np.ravel(np.asarray(v, dtype=float))) ** 2 for v in truth)))
    scale += 1e-3 * (1 + float((inputs[0] @ inputs[1].T).abs().max() / inputs[2]))  # a logit's own rounding
    assert max(errors(values, truth)) <= 1e-12 * scale / inputs[2].item()


def test_the_two_kinds_of_duplicates_by_hand():
    """Queries 0 and 1 have one passage; 2 and 3 are one query with two passages; hard negative 5 is 0's positive."""
    rule = SameIds([10, 11, 12, 12], [7, 1, 7, 2, 8, 7, 9, 3])
    queries, passages = torch.zeros(4, 2), torch.zeros(8, 2)
    loss = contrastive_loss(queries, passages, temperature=1.0, mask=rule)
    # 0: all but row 2 and hard negative 5; 1: all but 0 and 5; 2: all but 6; 3: all but 4.
    assert loss.item() == pytest.approx(np.log([6, 6, 7, 7]).mean(), rel=1e-6)


@pytest.mark.parametrize("tile_size", [None, 2])
def test_weights_of_unlike_negatives_stand_side_by_side(tile_size):
    reps = torch.randn(5, 3, dtype=torch.float64), torch.randn(15, 3, dtype=torch.float64)
    loss_fn = ContrastiveLoss(0.4, tile_size=tile_size)
    apart = HardnessWeight(2.0) | HardnessWeight(2.0, "hard_negatives")
    together = HardnessWeight(2.0, "all_negatives")
    assert loss_fn(*reps, mask=apart).item() == pytest.approx(loss_fn(*reps, mask=together).item(), rel=1e-14)


def test_own_positives_stay_whatever_the_rule_says():
    same = SameIds([1, 1, 1], [5, 5, 5])
    loss = contrastive_loss(torch.randn(3, 2), torch.randn(3, 2), temperature=0.1, symmetric=True, mask=same)
    assert loss.item() == 0
    guide = GuideFilter(torch.ones(3, 2), torch.ones(3, 2), margin=1.0)
    tiled = tiled_contrastive_loss(torch.randn(3, 2), torch.randn(3, 2), temperature=0.1, mask=guide, tile_size=2)
    assert tiled.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_guide_in_half_precision_leaves_out_every_twin_of_the_positive(dtype):
    """In half precision the sum of s_i and the matrix product of its twin's s_ij are 1e-3 to 1e-2 apart."""
    queries = torch.randn(32, 384)
    queries = torch.cat([queries, queries])  # so that i and i + 32 are one query with one passage
    passages = queries + torch.randn(32, 384).repeat(2, 1)
    rule = GuideFilter(queries.to(dtype), passages.to(dtype), margin=1e-3)
    reps = torch.zeros(64, 2, dtype=torch.float64)
    loss = contrastive_loss(reps, reps, temperature=1.0, mask=rule)
    expected = contrastive_loss(reps, reps, temperature=1.0, mask=SameIds([*range(32)] * 2, range(64)))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("tile_size", [None, 2])
def test_ids_of_any_int_type_are_the_same_ids(tile_size):
    reps, ids = [torch.randn(3, 2), torch.randn(6, 2)], ([1, 2, 1], [7, 8, 9, 7, 3, 3])
    losses = [
        ContrastiveLoss(symmetric=True, tile_size=tile_size)(*reps, mask=SameIds(*(torch.tensor(i).to(t) for i in ids)))
        for t in (torch.int64, torch.uint8, torch.int16, torch.int32, torch.uint64)
    ]
    assert len(set(map(float, losses))) == 1


@pytest.mark.parametrize("tile_size", [None, 4])
def test_a_temperature_in_half_precision_weighs_as_its_number_does(tile_size):
    loss_fn = ContrastiveLoss(0.05, learnable=True, tile_size=tile_size).bfloat16()
    reps = torch.nn.functional.normalize(torch.randn(6, 8)), torch.nn.functional.normalize(torch.randn(12, 8))
    expected = ContrastiveLoss(loss_fn.temperature.item(), tile_size=tile_size)(*reps, mask=HardnessWeight(5.0))
    assert loss_fn(*reps, mask=HardnessWeight(5.0)).item() == pytest.approx(expected.item(), rel=1e-5)


# --- Across processes -----------------------------------------------------------------------------------------------

CASES = 16


def across_ranks(here):
    """The largest error of each gradient and of the loss, W times the whole batch's, over random cases and forms."""
    worst = [0.0] * 4
    for number in range(CASES):
        draw = random.Random(f"{here.world_size}/{number}")
        torch.manual_seed(number)
        rows, hard = [draw.randint(1, 5) for _ in range(here.world_size)], draw.choice([0, 1, 2])
        batch, group = sum(rows), 1 + hard
        reps = [torch.randn(count, 4, dtype=torch.float64) for count in (batch, batch * group)]
        rule, masks, weights = drawn_case(draw, batch, hard)
        way = draw.choice(WAYS)
        temperature = torch.tensor(0.4, dtype=torch.float64)
        truth = exact(*reps, temperature, *names_of(way), masks, **weights)
        first = sum(rows[: here.rank])
        own = slice(first, first + rows[here.rank])
        mine = slice(own.start * group, own.stop * group)
        part = None if rule is None else rule[own, mine]
        for form in ({}, {"tile_size": draw.choice([1, 2, 3, 64])}, {"tile_size": 2, "across": "ring"}):
            loss_fn = ContrastiveLoss(0.4, learnable=True, **({"across": "gather"} | way | form)).double()
            leaves = [reps[0][own].clone().requires_grad_(), reps[1][mine].clone().requires_grad_()]
            with torch.no_grad():
                loss_fn.log_temperature.copy_(temperature.log())
            loss = loss_fn(*leaves, mask=part)
            loss.backward()
            shared = loss_fn.log_temperature.grad / 0.4
            if here.world_size > 1:
                dist.all_reduce(shared)
            w = here.world_size
            values = [loss.detach(), leaves[0].grad / w, leaves[1].grad / w, shared / w]
            parts = [truth[0], truth[1][own], truth[2][mine], truth[3]]
            scale = max(1.0, float(np.linalg.norm(np.asarray(truth[2], dtype=float))))
            worst = [max(pair) for pair in zip(worst, [e / scale for e in errors(values, parts)], strict=True)]
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gathered_and_ring_losses_take_the_same_rules(ranks, tmp_path):
    for worst in run_ranks(across_ranks, ranks, tmp_path):
        assert max(worst) <= 1e-12, dict(zip(NAMES, worst, strict=True))


@pytest.mark.parametrize("settings", [{"across": "gather"}, {"across": "ring", "tile_size": 4}])
def test_a_whole_mask_is_refused_across_processes(settings):
    with pytest.raises(ValueError, match="mask must be a rule of gclib.losses.masks"):
        ContrastiveLoss(**settings)(torch.ones(2, 2), torch.ones(2, 2), mask=torch.zeros(2, 2, dtype=torch.bool))


# --- In the steps ---------------------------------------------------------------------------------------------------


def steps(loss_fn, encoders, inputs, rule):
    yield lambda: naive_step(encoders, inputs, loss_fn, mask=rule)
    yield lambda: grad_cache_step(encoders, inputs, loss_fn, mask=rule, chunk_size=[3, 4])

    def deferred():
        loss = grad_cache_loss(encoders, inputs, loss_fn, mask=rule, chunk_size=2)
        loss.backward()
        return loss

    yield deferred


@pytest.mark.parametrize("tile_size", [None, 3])
def test_every_step_takes_a_rule(tile_size):
    encoders = [torch.nn.Linear(5, 4).double() for _ in range(2)]
    inputs = [torch.randn(7, 5, dtype=torch.float64), torch.randn(14, 5, dtype=torch.float64)]
    ids = [0, 1, 2, 0, 4, 5, 6], [0, 9, 1, 9, 2, 9, 3, 9, 1, 0, 5, 9, 6, 9]
    mask = torch.from_numpy(same_ids("query_to_passage", *ids, 2))
    mask[torch.arange(7), torch.arange(7) * 2] = False
    loss_fn = ContrastiveLoss(0.4, learnable=True, symmetric=True, tile_size=tile_size).double()
    modules = [*encoders, loss_fn]
    truth = gradients(modules, lambda: naive_step(encoders, inputs, loss_fn, mask=mask))
    assert worst_error(gradients(modules, lambda: naive_step(encoders, inputs, loss_fn))[1], truth[1]) > 1e-3
    for step in steps(loss_fn, encoders, inputs, SameIds(*map(torch.tensor, ids))):
        loss, changes = gradients(modules, step)
        assert abs(loss - truth[0]) <= 1e-12 and worst_error(changes, truth[1]) <= 1e-12
    assert len(unique_parameters(*modules)) == len(truth[1])


def test_accumulation_cuts_the_rule_to_its_chunk():
    encoder, inputs = torch.nn.Linear(5, 4).double(), [torch.randn(n, 5, dtype=torch.float64) for n in (6, 12)]
    ids = torch.tensor([0, 0, 2, 3, 3, 5]), torch.tensor([0, 9, 1, 0, 2, 9, 3, 2, 4, 9, 5, 4])
    guide = torch.randn(6, 3).double(), torch.randn(12, 3).double()
    rule = SameIds(*ids) | GuideFilter(*guide, margin=0.2) | HardnessWeight(2.0, "all_negatives")
    loss_fn = ContrastiveLoss(0.4, symmetric=True, tile_size=2)
    whole = gradients([encoder], lambda: accumulation_step([encoder] * 2, inputs, loss_fn, chunk_size=2, mask=rule))

    def by_hand():
        total = 0
        for first in (0, 2, 4):
            rows, columns = slice(first, first + 2), slice(2 * first, 2 * first + 4)
            part = SameIds(ids[0][rows], ids[1][columns])
            part = part | GuideFilter(guide[0][rows], guide[1][columns], margin=0.2)
            part = part | HardnessWeight(2.0, "all_negatives")
            loss = loss_fn(encoder(inputs[0][rows]), encoder(inputs[1][columns]), mask=part) / 3
            loss.backward()
            total += loss.detach()
        return total

    expected = gradients([encoder], by_hand)
    assert abs(whole[0] - expected[0]) <= 1e-12 and worst_error(whole[1], expected[1]) <= 1e-12


@pytest.mark.parametrize("mask", [SameIds([0, 1, 0, 3], [0, 1, 2, 3]), torch.eye(4).flip(0).bool()])
def test_accumulation_cuts_a_mask_of_one_tower_against_itself(mask):
    encoder, inputs = torch.nn.Linear(5, 4).double(), torch.randn(4, 5, dtype=torch.float64)

    def loss_fn(reps, mask=None):
        return contrastive_loss(reps, reps, temperature=0.4, mask=mask)

    loss = accumulation_step([encoder], [inputs], loss_fn, chunk_size=2, mask=mask)
    halves = [loss_fn(encoder(inputs[part]), mask[part, part]) for part in (slice(0, 2), slice(2, 4))]
    assert loss.item() == pytest.approx(sum(halves).item() / 2, rel=1e-12)


# --- What it costs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ids_at_a_batch_of_65536_take_less_than_256_mib_beside_inputs():
    """Gradients of the representations included; the mask alone would be 4 GiB."""
    batch, dimensions = 65_536, 128
    with FakeTensorMode():
        queries, passages = (torch.empty(batch, dimensions, requires_grad=True) for _ in range(2))
        rule = SameIds(torch.empty(batch, dtype=torch.long), torch.empty(batch, dtype=torch.long))
        with record_memory() as ledger:
            ledger.on_phase("loss", tensors=[("inputs", t) for t in (queries, passages, *rule.queries, *rule.passages)])
            start = ledger.events[-1].total_bytes
            loss_fn = ContrastiveLoss(symmetric=True, tile_size=4096)
            loss_fn(queries, passages, mask=rule).backward()
    gradients_bytes = 2 * 4 * batch * dimensions
    assert gradients_bytes < ledger.peak_bytes - start <= 256 * 2**20


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: SameIds(torch.zeros(2), torch.zeros(2).long()), "query_ids must be a vector of ints"),
        (lambda: SameIds([1, 2], [[1], [2]]), "passage_ids must be a vector of ints"),
        (lambda: SameIds([1, 2], [1, 2, 3]), "passage_ids must have .* a multiple of B = 2"),
        (lambda: SameIds([], []), "query_ids must be a vector of ints"),
        (lambda: SameIds(["a", "b"], [1, 2]), "query_ids must be a vector of ints below 2"),
        (lambda: SameIds([1, 2], [1, 2**63]), "passage_ids must be a vector of ints below 2"),
        (lambda: SameIds(None, [1]), "query_ids must be a vector of ints"),
        (lambda: torch.zeros(1, 1).bool() | SameIds([1], [1]), r"rules\[0\] must be a rule"),
        (lambda: GuideFilter(torch.ones(2, 3), torch.ones(2, 3).double()), "guide_passage_reps must have .*float32"),
        (lambda: GuideFilter(torch.ones(2, 3), torch.ones(2, 4)), "guide_passage_reps must have guide_query_reps' 3"),
        (lambda: GuideFilter(torch.ones(2), torch.ones(2, 4)), "guide_query_reps must be a floating point matrix"),
        (lambda: GuideFilter(torch.ones(2, 3), torch.ones(3, 3)), "guide_passage_reps must have B"),
        (lambda: GuideFilter(torch.ones(2, 3), torch.ones(2, 3), margin=torch.nan), "margin must be a finite number"),
        (lambda: GuideFilter(torch.ones(2, 3), torch.ones(2, 3), kind="both"), "kind must be one of"),
        (lambda: HardnessWeight(0.0), "strength must be a finite number above 0"),
        (lambda: HardnessWeight(1.0) | HardnessWeight(1.0, "all_negatives"), "rules must weigh no negatives twice"),
        (lambda: HardnessWeight(1.0, "some"), "kind must be one of"),
        (lambda: SameIds([1], [1]) | "another", r"rules\[1\] must be a rule"),
        (lambda: ContrastiveLoss(symmetric=True, directions=("query_to_passage",)), "directions must be None"),
        (lambda: ContrastiveLoss(directions=("query_to_query",)), "directions must be 'query_to_passage' and"),
        (lambda: ContrastiveLoss(directions=("query_to_passage", "doc_to_doc")), "directions must be"),
        (lambda: ContrastiveLoss(directions="query_to_passage"), "directions must be"),
        (lambda: ContrastiveLoss(partition="apart"), "partition must be one of"),
        (
            lambda: ContrastiveLoss(directions=("query_to_passage", "query_to_query"), partition="per_direction"),
            "partition must be 'joint' with directions whose own denominator lacks the positive",
        ),
    ],
)
def test_bad_arguments_are_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_another_batch_s_rule_is_refused_before_anything_is_computed():
    def never(inputs):
        raise AssertionError("was encoded")

    inputs = [torch.ones(4, 2), torch.ones(4, 2)]
    for rule, words in ((SameIds([1, 2], [1, 2]), "4 queries"), (SameIds(range(4), range(8)), "4 passages")):
        for step in (naive_step, lambda *a, **k: grad_cache_step(*a, chunk_size=2, **k)):
            with pytest.raises(ValueError, match=f"mask must be a rule for the {words} of the batch"):
                step([never] * 2, inputs, ContrastiveLoss(), mask=rule)
        with pytest.raises(ValueError, match=f"mask must be a rule for the {words} of the batch"):
            contrastive_loss(*inputs, temperature=0.1, mask=rule)


@pytest.mark.parametrize("kind", ["in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_temperature_of_one_element_may_have_any_shape(shape, kind):
    reps = torch.randn(5, 3, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    numbers = [torch.full(of, 0.3, dtype=torch.float64) for of in ((), shape)]
    for loss in (contrastive_loss, lambda *a, **k: tiled_contrastive_loss(*a, tile_size=3, **k)):
        truth, values = (
            value_and_gradients(loss, *reps, number, symmetric=True, mask=HardnessWeight(2.0, kind))
            for number in numbers
        )
        assert torch.equal(truth[3], values[3].reshape(())) and all(map(torch.equal, truth[:3], values[:3]))


@pytest.mark.parametrize("loss_fn", [MaxSimLoss(torch.ones(4, 1), torch.ones(4, 1)), lambda queries, passages: 0])
def test_a_loss_that_takes_no_mask_is_refused_before_anything_is_computed(loss_fn):
    def never(inputs):
        raise AssertionError("was encoded")

    inputs, mask = [torch.ones(4, 2), torch.ones(4, 2)], SameIds(range(4), range(4))
    for step in (naive_step, accumulation_step, grad_cache_step, grad_cache_loss):
        options = {} if step is naive_step else {"chunk_size": 2}
        with pytest.raises(ValueError, match="loss_fn must take the representations of 2 towers and mask="):
            step([never] * 2, inputs, loss_fn, mask=mask, **options)
