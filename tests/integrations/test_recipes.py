"""The README's recipes, read out of it and run: in transformers' Trainer and accelerate."""

import ast
import os
import re

import pytest
import torch
from helpers.counting import Counting
from helpers.oracles import token_batch, worst_error
from helpers.ranks import run_ranks
from project.readme import README
from torch import nn
from torch.utils.data import DataLoader, Dataset

import gclib.integrations
from gclib import ContrastiveLoss, Encoder, grad_cache_step

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Trainer, TrainingArguments

SECTION = README.read_text("utf-8").partition("## In the trainer you use")[2].partition("\n## ")[0]
NAMES = ("SentenceTransformerTrainer", "Trainer", "accelerate")
BATCH = ast.literal_eval(re.search(r"with batches of `({.*?})`", SECTION)[1])  # what the Trainer's collator makes
RECIPES = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL), strict=True))


@pytest.fixture(autouse=True)
def _accelerate_starts_anew():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_each_recipe_has_at_most_15_lines():
    assert len(RECIPES) == 3
    for name, code in RECIPES.items():
        assert 2 <= len([line for line in code.splitlines() if line.strip()]) <= 15, name
        assert "backward()" not in code  # that stays the trainer's


def test_the_package_says_the_recipes_of_the_readme():
    said = [line.strip() for line in gclib.integrations.__doc__.splitlines() if line.strip()]
    for name in ("Trainer", "accelerate"):
        code = [line.strip() for line in RECIPES[name].splitlines() if line.strip()]
        assert any(said[at : at + len(code)] == code for at in range(len(said))), name
    assert re.search("with batches of .*", SECTION)[0].replace("`", "") in said


class Pairs(Dataset):
    """Token ids of pairs, of unlike lengths."""

    def __init__(self, count=16):
        self.towers = [token_batch(count, width, torch.Generator().manual_seed(width)) for width in (6, 9)]

    def __len__(self):
        return len(self.towers[0]["input_ids"])

    def __getitem__(self, row):
        return [{name: values[row] for name, values in tower.items()} for tower in self.towers]


def stacked(rows):
    return tuple({name: torch.stack([row[tower][name] for row in rows]) for name in rows[0][0]} for tower in (0, 1))


def collate(rows):
    queries, passages = stacked(rows)
    return BATCH | {"query": queries, "passage": passages}


def small_encoder():
    torch.manual_seed(0)
    return Encoder.from_config("tiny", vocab_size=23, dropout=0.0).double()


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


# --- transformers' Trainer --------------------------------------------------------------------------------------


class NaiveTrainer(Trainer):
    """The whole batch at once: plain autograd."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs["query"]) @ model(**inputs["passage"]).T / 0.05
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        return (loss, {}) if return_outputs else loss


class StepTrainer(NaiveTrainer):
    """What people did without a loss that has a graph: the step in place of the Trainer's own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        towers = [inputs["query"], inputs["passage"]]
        return grad_cache_step([model, model], towers, ContrastiveLoss(0.05), chunk_size=3)


def trained(kind, output, accumulation, **options):
    model = small_encoder()
    arguments = TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        eval_strategy="epoch",
        logging_steps=1,
        save_strategy="no",
        num_train_epochs=2,
        **({"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0} | options),
    )
    trainer = kind(model=model, args=arguments, train_dataset=Pairs(), eval_dataset=Pairs(5), data_collator=collate)
    trainer.train()
    names = ("loss", "eval_loss", "grad_norm")
    return weights(model), [{n: e[n] for n in names if n in e} for e in trainer.state.log_history]


def recipe(name):
    scope = {}
    exec(RECIPES[name], scope)
    return scope


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer_logs_and_trains_as_with_the_whole_batch(tmp_path, accumulation):
    found, log = trained(recipe("Trainer")["ContrastiveTrainer"], tmp_path, accumulation)
    right, truth = trained(NaiveTrainer, tmp_path, accumulation)
    start = weights(small_encoder())
    moved = [[a - b for a, b in zip(end, start, strict=True)] for end in (found, right)]
    assert worst_error(*moved) <= 1e-10
    assert len(log) == len(truth) >= 7
    assert all(entry == pytest.approx(other) for entry, other in zip(log, truth, strict=True))


def test_an_evaluation_needs_the_last_entry_of_a_batch(tmp_path):
    *towers, last = BATCH
    assert towers == ["query", "passage"] and last == "return_loss"
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    options = {"args": arguments, "eval_dataset": Pairs(5)}
    trainer = recipe("Trainer")["ContrastiveTrainer"]
    assert trainer(small_encoder(), data_collator=collate, **options).evaluate()["eval_loss"] > 0
    without = trainer(
        small_encoder(), data_collator=lambda rows: {name: collate(rows)[name] for name in towers}, **options
    )
    with pytest.raises(ValueError, match="input_ids"):  # the encoder itself was called, with query= and passage=
        without.evaluate()


@pytest.mark.slow
def test_the_step_in_place_of_training_step_adds_micro_batches_up(tmp_path):
    """Why the recipe is what it is: with a step of its own the logged loss is twice the mean of two."""
    wrong, right = (trained(kind, tmp_path, 2)[1][0]["loss"] for kind in (StepTrainer, NaiveTrainer))
    assert wrong == pytest.approx(2 * right)


# --- accelerate -------------------------------------------------------------------------------------------------


def accelerated(encoder, loader):
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    exec(RECIPES["accelerate"], {"encoder": encoder, "optimizer": optimizer, "loader": loader})
    return weights(encoder)


def by_hand(batches, together):
    """Plain autograd: each update from the mean of `together` micro-batches' losses."""
    encoder = small_encoder()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for number, batch in enumerate(batches, start=1):
        logits = encoder(**batch[0]) @ encoder(**batch[1]).T / 0.05
        (nn.functional.cross_entropy(logits, torch.arange(len(logits))) / together).backward()
        if number % together == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(encoder)


def test_accelerate_accumulates_as_with_whole_micro_batches(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    loader = DataLoader(Pairs(), batch_size=4, collate_fn=stacked)
    found, right, start = accelerated(small_encoder(), loader), by_hand(loader, 2), weights(small_encoder())
    assert worst_error(*[[a - b for a, b in zip(end, start, strict=True)] for end in (found, right)]) <= 1e-12


def accelerate_on_two(here, right):
    """[the update's error against plain autograd's over both ranks' micro-batches, all-reduces of a gradient]."""
    os.environ["ACCELERATE_USE_CPU"] = "true"  # a rank's own: the server that forks it may be older than the test
    encoder, loader = small_encoder(), DataLoader(Pairs(), batch_size=2, collate_fn=stacked)
    start = weights(encoder)
    with Counting(sum(weight.numel() for weight in start)) as counted:
        found = accelerated(encoder, loader)
    moved = [[a - b for a, b in zip(end, start, strict=True)] for end in (found, torch.load(right))]
    return [worst_error(*moved), counted.count]


@pytest.mark.slow
def test_accelerate_on_two_ranks_reduces_once_an_update(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.save(by_hand(DataLoader(Pairs(), batch_size=2, collate_fn=stacked), 4), tmp_path / "right.pt")
    for error, reductions in run_ranks(accelerate_on_two, 2, tmp_path, str(tmp_path / "right.pt"), timeout=240.0):
        assert error <= 1e-10 and reductions == 2


def test_an_accelerator_scales_and_clips_as_ever():
    """accelerator.backward and clip_grad_norm_ outside of accumulate."""
    accelerator = Accelerator(cpu=True)
    encoder, batch = small_encoder(), stacked([Pairs()[row] for row in range(6)])
    prepared, optimizer = accelerator.prepare(encoder, torch.optim.SGD(encoder.parameters(), lr=0.1))
    accelerator.backward(gclib.grad_cache_loss([prepared] * 2, batch, ContrastiveLoss(0.05), chunk_size=2))
    norm = accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
    clipped = sum(p.grad.norm() ** 2 for p in encoder.parameters() if p.grad is not None) ** 0.5
    assert norm > 1 and clipped.item() == pytest.approx(1.0, rel=1e-5)
