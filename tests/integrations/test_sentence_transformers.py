"""`GradCacheLoss` against sentence-transformers' own losses: gradients, what the Trainer logs, checkpoints, ranks."""

import random
import re
import textwrap
from functools import cache, partial

import pytest
import torch
from helpers.counting import Counting
from helpers.oracles import worst_error
from helpers.ranks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

library = pytest.importorskip("sentence_transformers")

from datasets import Dataset  # noqa: E402
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.training_args import (  # noqa: E402
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.util import dot_score  # noqa: E402

import gclib.integrations  # noqa: E402
from gclib.data.pairs import TextPair  # noqa: E402
from gclib.data.tokens import train_tokenizer  # noqa: E402
from gclib.integrations.sentence_transformers import GradCacheLoss  # noqa: E402
from gclib.memory.ledger import record_memory  # noqa: E402
from gclib.memory.step_plan import plan_step  # noqa: E402
from gclib.models.encoder import Encoder  # noqa: E402
from gclib.models.folder import save_model_folder  # noqa: E402
from gclib.support import ROOT  # noqa: E402

WORDS = [
    "apples",
    "plums",
    "figs",
    "dates",
    "pears",
    "count",
    "sort",
    "weigh",
    "wash",
    "peel",
    "the",
    "and",
    "of",
    "a",
    "ripe",
    "sour",
    "green",
]
NAMES = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
JOINT = [{"directions": names} for names in (NAMES[:1], NAMES[:2], NAMES[::2], NAMES)]
BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as sentence-transformers keeps it, with dropout and with vectors that are no unit vectors."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TextPair(word, word[::-1]) for word in WORDS], vocab_size=100)
    encoder = Encoder.from_config("tiny", vocab_size=100, normalize=False)
    save_model_folder(encoder, tokenizer, tmp_path_factory.mktemp("st") / "model", max_length=24)
    return str(next(tmp_path_factory.getbasetemp().glob("st*/model")))


@cache
def loaded(folder):
    return SentenceTransformer(folder, device="cpu").double().eval()


def texts(count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.choice([1, 2, 3, 16]))) for _ in range(count)]


def features(model, rows, columns, seed, **options):
    return [model.preprocess(texts(rows, seed + number), **options) for number in range(columns)]


def gradient(model, loss_fn, batch):
    """The loss, and every parameter's gradient."""
    model.zero_grad()
    loss = loss_fn([dict(column) for column in batch], None)
    loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(model, ours, theirs, batch):
    (value, found), (right, truth) = gradient(model, ours, batch), gradient(model, theirs, batch)
    assert float((value - right).abs()) <= 1e-12 and worst_error(found, truth) <= 1e-12


# --- the same loss and gradient ---------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=max(15, settings().max_examples // 5))
@given(st.data())
def test_loss_and_gradient_are_those_of_sentence_transformers(folder, data):
    model, columns = loaded(folder), data.draw(st.integers(2, 4))
    rows = data.draw(st.integers(2 if columns == 2 else 1, 7))  # one pair without negatives: a gradient of rounding
    same = {"scale": data.draw(st.sampled_from([1.0, 7.5, 20.0]))}
    same |= data.draw(st.sampled_from([{}, {"similarity_fct": dot_score}]))
    same |= data.draw(st.sampled_from([{"partition_mode": "per_direction"}, BOTH_WAYS, *JOINT]))
    if kind := data.draw(st.sampled_from([None, "in_batch_negatives", "hard_negatives", "all_negatives"])):
        same |= {"hardness_mode": kind, "hardness_strength": data.draw(st.sampled_from([0.0, 3.0]))}
    cut = data.draw(st.sampled_from(["chunk_size", "chunk_tokens"]))
    own = {cut: data.draw(st.integers(1, 30)), "retain_chunks": data.draw(st.integers(0, 3))}
    own["tile_size"] = data.draw(st.sampled_from([None, 2, "auto"]))
    batch = features(model, rows, columns, data.draw(st.integers(0, 99)))
    ours = GradCacheLoss(model, **same, **own)
    if same.get("similarity_fct") is dot_score:  # unbounded logits: saturated ones have no digits to compare
        ours.contrastive.fixed_temperature, same["scale"] = 100.0, 0.01
    assert_same(model, ours, losses.MultipleNegativesRankingLoss(model, **same), batch)
    assert_same(model, ours, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2, **same), batch)


def test_a_temperature_is_a_scale_upside_down(folder):
    model = loaded(folder)
    batch = features(model, 5, 3, 0)
    theirs = losses.MultipleNegativesRankingLoss(model, scale=8.0)
    assert_same(model, GradCacheLoss(model, temperature=1 / 8, chunk_size=2), theirs, batch)
    assert_same(model, GradCacheLoss(model, scale=8.0, chunk_size=2), theirs, batch)
    assert GradCacheLoss(model, chunk_size=2).temperature == pytest.approx(1 / 20.0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_prompt_that_is_left_out_of_the_mean(folder, as_tensor):
    model = SentenceTransformer(folder, device="cpu").double().eval()
    model[1].include_prompt = False
    batch = features(model, 5, 2, 0, prompt="count the ")
    assert batch[0]["prompt_length"] > 1
    if as_tensor:  # as a Dataset hands it out
        batch = [column | {"prompt_length": torch.tensor([column["prompt_length"]])} for column in batch]
    assert_same(model, GradCacheLoss(model, chunk_size=2), losses.MultipleNegativesRankingLoss(model), batch)


@pytest.mark.parametrize("options", [{}, {"matryoshka_weights": [0.3, 2.0, 1.0]}, {"n_dims_per_step": 2}])
def test_matryoshka_goes_around_it(folder, options):
    model = loaded(folder)
    batch, dims = features(model, 6, 3, 0), [32, 16, 7]
    ours = losses.MatryoshkaLoss(model, GradCacheLoss(model, chunk_size=2, retain_chunks=1), dims, **options)
    theirs = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), dims, **options)
    random.seed(0)
    value, found = gradient(model, ours, batch)
    random.seed(0)
    right, truth = gradient(model, theirs, batch)
    assert float((value - right).abs()) <= 1e-12 and worst_error(found, truth) <= 1e-12
    plain = gradient(model, GradCacheLoss(model, chunk_size=2), batch)
    assert worst_error(plain[1], truth) > 0.01
    with torch.no_grad():
        random.seed(0)
        assert float((ours([dict(column) for column in batch], None) - right).abs()) <= 1e-12


def test_layers_that_are_left_out_for_the_first_forward_alone_are_refused(folder):
    """AdaptiveLayerLoss takes its layers' wrappers off before backward: a replay would train another model."""
    model = SentenceTransformer(folder, device="cpu").double().eval()
    with pytest.warns(UserWarning, match="not compatible with GradCacheLoss"):
        loss = losses.AdaptiveLayerLoss(model, GradCacheLoss(model, chunk_size=2))
    with pytest.raises(ValueError, match="model must not be wrapped while its loss is taken, as AdaptiveLayerLoss"):
        gradient(model, loss, features(model, 6, 2, 0))
    inner = losses.MatryoshkaLoss(model, GradCacheLoss(model, chunk_size=2), [32, 8])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="must not be wrapped"):
        gradient(model, losses.AdaptiveLayerLoss(model, inner.loss), features(model, 6, 2, 0))


@pytest.mark.slow
def test_auto_plans_each_batch_within_the_budget(folder):
    model = loaded(folder)
    theirs, batch, other = losses.MultipleNegativesRankingLoss(model), *(features(model, 24, 3, n) for n in (0, 9))
    free = plan_of(GradCacheLoss(model), batch, None)
    assert_same(model, GradCacheLoss(model), theirs, batch)
    budget = free.peak_bytes // 2
    loss_fn = GradCacheLoss(model, budget_bytes=budget)
    assert_same(model, loss_fn, theirs, batch)  # once, for the laws of the encoder
    for columns in (batch, other):
        plan = plan_of(loss_fn, columns, budget)
        assert 0 < plan.retain_chunks < free.retain_chunks and "measured" not in plan.reason
        with record_memory(model, loss_fn) as ledger:
            loss_fn([dict(column) for column in columns]).backward()
        assert 0.5 * budget <= ledger.peak_bytes <= budget
    assert_same(model, loss_fn, theirs, other)
    with torch.no_grad():
        assert float(loss_fn(batch)) == pytest.approx(float(theirs(batch, None)), abs=1e-12)
    with pytest.raises(ValueError, match="budget_bytes must be at least"):
        GradCacheLoss(model, budget_bytes=1_000)(batch)


def plan_of(loss_fn, columns, budget_bytes):
    step = [loss_fn.encoder] * len(columns), [dict(column) for column in columns], loss_fn._loss_of
    return plan_step(*step, budget_bytes=budget_bytes)


def test_an_evaluation_is_in_chunks_and_has_no_graph(folder):
    model, rows = loaded(folder), []
    loss_fn, batch = GradCacheLoss(model, chunk_size=2, retain_chunks=2), features(loaded(folder), 6, 2, 0)
    right = gradient(model, loss_fn, batch)[0]
    hook = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]["input_ids"])))
    with torch.no_grad():
        value = loss_fn(batch, None)
    hook.remove()
    assert torch.equal(value, right) and not value.requires_grad and sum(rows) == 12 and max(rows) == 2


# --- in the Trainer ---------------------------------------------------------------------------------------------


def dataset(rows, columns=3):
    names = ("anchor", "positive", "negative")[:columns]
    return Dataset.from_dict({name: texts(rows, seed) for seed, name in enumerate(names)})


def train(folder, loss, output, *, dropout=False, resume=None, rows=24, dtype=torch.float64, **options):
    """The model and the trainer of a short run."""
    torch.manual_seed(0)  # the pooler, which nothing trains, is made anew
    model = SentenceTransformer(folder, device="cpu").to(dtype)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1 if dropout else 0.0
    settings = {"max_steps": 4, "per_device_train_batch_size": 6, "logging_steps": 1, "save_strategy": "no"} | options
    args = SentenceTransformerTrainingArguments(
        output_dir=str(output), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-3, **settings
    )
    parts = {"train_dataset": dataset(rows), "eval_dataset": dataset(5)}
    trainer = SentenceTransformerTrainer(model=model, args=args, loss=loss(model), **parts)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def logged(trainer):
    names = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return [[round(entry[name], 9) for name in names if name in entry] for entry in trainer.state.log_history]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_logs_and_trains_the_same(folder, tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 2}
    ours = train(folder, lambda model: GradCacheLoss(model, chunk_size=2), tmp_path / "a", **options)
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        theirs = train(folder, getattr(losses, name), tmp_path / "b", **options)
        assert logged(ours[1]) == logged(theirs[1]) and len(logged(theirs[1])) >= 6
        weights = [list(model.parameters()) for model in (ours[0], theirs[0])]
        assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(*weights, strict=True))


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_run(folder, tmp_path):
    def loss(model):
        return GradCacheLoss(model, chunk_size=2, retain_chunks=1)

    options = {"dropout": True, "save_strategy": "steps", "save_steps": 2}
    whole, trainer = train(folder, loss, tmp_path, **options)
    card = (tmp_path / "checkpoint-2" / "README.md").read_text("utf-8")
    assert "GradCacheLoss" in card and "gao2021scaling" in card and '"chunk_size": 2' in card
    again, resumed = train(folder, loss, tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert logged(resumed) == logged(trainer)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


@pytest.mark.slow
def test_under_bf16_of_the_trainer(folder, tmp_path):
    def losses_of(loss, **options):
        trainer = train(folder, loss, tmp_path, dtype=torch.float32, max_steps=2, **options)[1]
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def ours(model):
        return GradCacheLoss(model, chunk_size=2)

    full = losses_of(ours)
    half, theirs = losses_of(ours, bf16=True), losses_of(losses.MultipleNegativesRankingLoss, bf16=True)
    assert half != full and half == pytest.approx(full, rel=0.02) and half == pytest.approx(theirs, rel=0.02)


def train_on_two(here, folder, output, options):
    """[the weights' largest difference from those of one process, all-reduces of a gradient, the losses]."""
    right = torch.load(f"{output}/one.pt")
    with Counting(sum(weight.numel() for weight in right)) as counted:
        model, trainer = train(
            folder,
            lambda model: GradCacheLoss(model, chunk_size=2, gather_across_devices=True, directions=NAMES),
            f"{output}/two",
            per_device_train_batch_size=4,
            **options,
        )
    off = max(float((a.detach() - b).abs().max()) for a, b in zip(model.parameters(), right, strict=True))
    return [off, counted.count, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]]


@pytest.mark.slow
def test_two_ranks_that_gather_train_what_one_process_does(folder, tmp_path):
    options = {"rows": 8, "max_steps": 3, "gradient_accumulation_steps": 1}
    model, trainer = train(
        folder,
        lambda model: losses.MultipleNegativesRankingLoss(model, directions=NAMES),
        tmp_path,
        per_device_train_batch_size=8,
        **options,
    )
    torch.save([weight.detach() for weight in model.parameters()], tmp_path / "one.pt")
    for off, reductions, values in run_ranks(train_on_two, 2, tmp_path, folder, str(tmp_path), options):
        assert off <= 1e-7 and reductions == 3
        assert values == pytest.approx([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.slow
def test_the_line_of_the_readme_and_of_the_recipe_takes_the_place_of_theirs(folder, tmp_path):
    section = (ROOT / "README.md").read_text("utf-8").partition("## In the trainer you use")[2]
    swaps = [re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]]
    swaps += [textwrap.dedent(re.search(r"and nothing else:\n\n((?:    .*\n|\n)+)", gclib.integrations.__doc__)[1])]
    theirs = train(folder, losses.CachedMultipleNegativesRankingLoss, tmp_path, rows=40, per_device_train_batch_size=40)

    def written(model, code):
        scope = {"model": model}
        exec(code, scope)
        return scope["loss"]

    for code in swaps:
        loss = partial(written, code=code)
        assert logged(train(folder, loss, tmp_path, rows=40, per_device_train_batch_size=40)[1]) == logged(theirs[1])


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [{"hardness_mode": "all_negatives"}, {"hardness_strength": 2.0}])
def test_half_of_what_hardness_needs_is_told(half, folder):
    with pytest.warns(UserWarning, match="weighs nothing"):
        assert GradCacheLoss(loaded(folder), **half).rule is None


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"chunk_size": 2, "chunk_tokens": 8}, "one of them must be given"),
        ({"chunk_size": None}, "chunk_size must be an int of at least 1"),
        ({"chunk_size": "big"}, "chunk_size must be an int of at least 1"),
        ({"retain_chunks": -1}, "retain_chunks must be an int of at least 0"),
        ({"chunk_size": "auto", "retain_chunks": 1}, 'retain_chunks must be 0 with chunk_size="auto"'),
        ({"budget_bytes": 2**30}, "budget_bytes must be None without"),
        ({"chunk_size": "auto", "budget_bytes": 0}, "budget_bytes must be an int of at least 1"),
        ({"verify": "twice"}, "verify must be one of"),
        ({"hardness_mode": "some", "hardness_strength": 1.0}, "hardness_mode must be one of"),
        ({"hardness_mode": "some"}, "hardness_mode must be one of"),
        ({"hardness_mode": "all_negatives", "hardness_strength": -1.0}, "hardness_strength must be"),
        ({"hardness_strength": -1.0}, "hardness_strength must be"),
        ({"chunk_size": 0}, "chunk_size must be an int of at least 1"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"scale": -1.0}, "scale must be"),
        ({"scale": 20.0, "temperature": 0.1}, "scale must not be given beside a temperature"),
        ({"similarity_fct": torch.cdist}, "similarity_fct must be cos_sim or dot_score"),
        ({"directions": ("query_to_doc", "query_to_passage")}, "directions must be of"),
        ({"directions": ("doc_to_query",)}, "directions must be"),
        ({"directions": ()}, "directions must be"),
        ({"partition_mode": "both"}, "partition must be one of"),
        ({"directions": NAMES, "partition_mode": "per_direction"}, "partition must be 'joint'"),
        ({"tile_size": 0}, "tile_size"),
        ({"mini_batch_size": 32}, "mini_batch_size is chunk_size here.* got 32"),
        ({"mini_batch_num_tokens": 2048}, "mini_batch_num_tokens is chunk_tokens here"),
        ({"show_progress_bar": True}, "show_progress_bar must be left out"),
        ({"chunks": 2}, "chunks is no setting of this loss"),
    ],
)
def test_settings_that_can_not_be_are_refused(folder, settings_, words):
    with pytest.raises(ValueError, match=words):
        GradCacheLoss(loaded(folder), **{"chunk_size": 2} | settings_)


def test_columns_that_do_not_fit_are_refused(folder):
    model = loaded(folder)
    loss_fn, batch = GradCacheLoss(model, chunk_size=2), features(model, 4, 2, 0)
    with pytest.raises(ValueError, match="two columns or more"):
        loss_fn(batch[:1])
    with pytest.raises(ValueError, match="as many rows in every column"):
        loss_fn([batch[0], *features(model, 3, 1, 0)])
    with pytest.raises(ValueError, match="static embeddings and flattened"):
        loss_fn([batch[0], batch[1] | {"cu_seq_lens_q": torch.arange(5)}])
    with pytest.raises(ValueError, match="model must be the SentenceTransformer"):
        GradCacheLoss("all-MiniLM-L6-v2", chunk_size=2)
    with pytest.raises(ValueError, match="no loss, got 'CachedMultipleNegativesRankingLoss'"):
        GradCacheLoss(losses.CachedMultipleNegativesRankingLoss(model))
    with pytest.raises(ValueError, match="what follows the model must be given by name .*, got 20.0"):
        GradCacheLoss(model, 20.0)
