"""`python -m gclib train`: options, files, a run that is stopped or killed and goes on, several processes."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.ranks import exit_code, run_commands
from safetensors import SafetensorError
from safetensors.torch import load_file

from gclib import __main__ as commands
from gclib.models.encoder import Encoder
from gclib.support import ROOT
from gclib.training import build, checkpoints, command, session
from gclib.training.checkpoints import list_checkpoints, read_checkpoint
from gclib.training.loop import TrainingRecord
from gclib.training.retrieval import encode_texts
from gclib.training.settings import Settings

pytestmark = pytest.mark.slow

THINGS = ["apples", "pears", "plums", "figs", "dates", "melons"]
THINGS += ["cherries", "grapes", "lemons", "limes", "kiwis", "mangos"]
ROWS = [
    {"query": f"How to {deed} the {thing}.", "passage": f"def {deed}_{thing}(): return {deed}({thing})"}
    for thing in THINGS
    for deed in ("count", "sort", "weigh")
]
SMALL = "--model tiny --vocab-size 200 --batch-size 8 --chunk-size 3 --steps 8 --query-length 16 --passage-length 24"


def write_data(folder):
    folder.mkdir()
    for name, rows in (("train", ROWS), ("test", ROWS[:10])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments_of(output, data, more="", small=SMALL):
    """The arguments of a small run in a folder, with more options behind."""
    return ["train", "--output", str(output), "--data", str(data), "--quiet", *small.split(), *more.split()]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def typed(data):
    """`arguments_of` a run on the test's own data."""
    return lambda output, more="", *, small=SMALL: arguments_of(output, data, more, small)


def records(output):
    """What is told of each step, the seconds left out."""
    lines = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def assert_same_run(one, other):
    """Records, evaluations and weights are equal, bit for bit."""
    assert records(one) == records(other)
    assert (one / "evaluations.jsonl").read_text() == (other / "evaluations.jsonl").read_text()
    first, second = weights(one), weights(other)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_the_help_says(typed, tmp_path, capsys):
    output = tmp_path / "run"
    assert commands.main(typed(output, "--checkpoint-every 3 --evaluate-every 3 --keep 2")) == 0
    names = {path.name for path in output.iterdir()}
    assert names == {
        *("config.json", "records.jsonl", "evaluations.jsonl", "model", "checkpoint-000006", "checkpoint-000008")
    }
    told = [TrainingRecord(**line, seconds=0.0) for line in records(output)]
    assert [record.step for record in told] == list(range(1, 9))
    assert [record.examples for record in told] == list(range(8, 72, 8))
    assert told[-1].loss < told[0].loss
    evaluations = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [0, 3, 6, 8]
    assert all(line["pairs"] == 10 and 0 < line["mrr"] <= 1 for line in evaluations)
    config = json.loads((output / "config.json").read_text())
    assert config["settings"]["batch_size"] == 8 and config["processes"] == 1 and config["steps"] == 8
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == ""


def test_nothing_is_pickled(typed, tmp_path):
    commands.main(typed(tmp_path / "run"))
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize(
    "more",
    [
        "--step naive",
        "--step accumulation --chunk-size 4",
        "--chunk-tokens 40 --retain-chunks 1",
        "--chunk-size 3 --tile-size 4 --symmetric --learnable-temperature",
        pytest.param("--tile-size auto --ring", marks=pytest.mark.slow),
        pytest.param(
            "--negatives 1 --autocast bf16 --clip-norm 0 --schedule constant --warmup-steps 2", marks=pytest.mark.slow
        ),
        pytest.param("--epochs 1 --pooling cls --test-pairs 0", marks=pytest.mark.slow),
    ],
)
def test_every_step_and_loss_trains(more, typed, tmp_path):
    steps = "" if "--epochs" in more else "--steps 4"
    small = f"--model tiny --vocab-size 200 --batch-size 8 --query-length 16 --passage-length 24 {steps}"
    assert commands.main(typed(tmp_path / "run", more, small=small)) == 0
    assert len(records(tmp_path / "run")) == 4


def test_the_steps_losses_agree_without_dropout(typed, tmp_path):
    small = "--model tiny --vocab-size 200 --batch-size 8 --steps 4 --dropout 0 --test-pairs 0"
    for name, more in {"one": "--step naive", "two": "--chunk-size 3", "three": "--chunk-size 5 --tile-size 3"}.items():
        assert commands.main(typed(tmp_path / name, more, small=small)) == 0
    losses = [[line["loss"] for line in records(tmp_path / name)] for name in ("one", "two", "three")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_chunks_are_chosen_once_and_kept(typed, tmp_path):
    small = SMALL.replace("--chunk-size 3 ", "").replace("--steps 8", "--steps 4 --checkpoint-every 2")
    assert commands.main(typed(tmp_path / "run", small=small)) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    settings = config["settings"]
    assert (
        "chunk_size" in config["chosen"]
        and isinstance(settings["chunk_size"], int)
        and settings["chunk_tokens"] is None
    )
    assert settings["retain_chunks"] == 16  # so small a batch fits as a whole
    (tmp_path / "run" / "checkpoint-000004").rename(tmp_path / "later")
    for more in ("--resume", "--resume --chunk-size auto"):
        before = records(tmp_path / "run")
        assert commands.main(["train", "--quiet", "--output", str(tmp_path / "run"), *more.split()]) == 0
        assert records(tmp_path / "run") == before and len(before) == 4
        assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"] == settings


@pytest.mark.parametrize("more", ["--retain-chunks 2", "--chunk-size auto --chunk-tokens 40"])
def test_what_is_chosen_cannot_be_typed_too(more, typed, tmp_path, capsys):
    small = SMALL.replace("--chunk-size 3", "--chunk-size auto")
    assert commands.main(typed(tmp_path / "run", more, small=small)) == 2
    assert "--chunk-" in capsys.readouterr().err


# --- stopped, killed, resumed -----------------------------------------------------------------------------------


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_call(number, function):
    """The function, but its call of this number kills the process."""
    calls = itertools.count(1)
    return lambda *args, **options: (kill if next(calls) == number else function)(*args, **options)


def killed_in_replay(number, step):
    """The step, but its call of this number kills the process when it encodes a second time."""
    calls = itertools.count(1)

    def wrapped(*args, **options):
        if next(calls) == number:
            options["on_phase"] = lambda phase, **more: kill() if phase == "replay" else None
        return step(*args, **options)

    return wrapped


def train_until_killed(place, arguments):
    """Runs in a process of its own: nothing needs to be put back."""
    if place == "inside a step":
        build.grad_cache_step = killed_in_replay(7, build.grad_cache_step)
    elif place == "between the files of a checkpoint":
        checkpoints.save_file = killed_at_call(5, checkpoints.save_file)
    elif place == "before a checkpoint gets its name":
        checkpoints.os.rename = killed_at_call(2, checkpoints.os.rename)
    elif place == "before the first checkpoint":
        checkpoints.save_file = kill
    elif place == "before the model is written":
        session.save_model_folder = kill
    commands.main(arguments)


PLACES = {
    "inside a step": [3, 6],
    "between the files of a checkpoint": [3],
    "before a checkpoint gets its name": [3],
    "before the first checkpoint": [],
    "before the model is written": [6, 8],
}
WITH_CHECKPOINTS = "--checkpoint-every 3 --evaluate-every 3 --learnable-temperature"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The run that none of the places interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert commands.main(arguments_of(folder / "run", write_data(folder / "data"), WITH_CHECKPOINTS)) == 0
    return folder / "run"


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(place, typed, tmp_path, whole_run):
    killed = tmp_path / "killed"
    assert exit_code(train_until_killed, place, typed(killed, WITH_CHECKPOINTS)) == -signal.SIGKILL
    assert not (killed / "model").exists()
    assert [read_checkpoint(path).step for path in list_checkpoints(killed)] == PLACES[place]
    assert commands.main(["train", "--output", str(killed), "--resume", "--quiet"]) == 0
    assert_same_run(killed, whole_run)
    assert not list(killed.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(number, typed, tmp_path, monkeypatch, capsys):
    assert commands.main(typed(tmp_path / "whole")) == 0
    output, write = tmp_path / "run", session.Session.write_record

    def interrupted(run, record):
        write(run, record)
        if record.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(session.Session, "write_record", interrupted)
    handlers = [signal.getsignal(one) for one in session.SIGNALS]
    arguments = [word for word in typed(output) if word != "--quiet"]
    assert commands.main(arguments) == 128 + number
    assert (
        f"Stopped after step 3. To go on: python -m gclib train --output {output} --resume" in capsys.readouterr().err
    )
    assert [signal.getsignal(one) for one in session.SIGNALS] == handlers
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-000003"]
    assert len(records(output)) == 3
    assert commands.main(["train", "--output", str(output), "--resume"]) == 0
    assert "Resumed after step 3." in capsys.readouterr().out
    assert_same_run(output, tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_is_used(typed, tmp_path, capsys):
    output = tmp_path / "run"
    commands.main(typed(output, "--checkpoint-every 3 --keep 3"))
    told, kept = records(output), weights(output)
    file = output / "checkpoint-000008" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with (output / "records.jsonl").open("a") as lines:
        lines.write('{"step": 9, "loss"')  # as a kill leaves a line
    assert commands.main(["train", "--output", str(output), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "Passed over a damaged checkpoint: checkpoint-000008: optimizer.safetensors does not match" in printed
    assert "Resumed after step 6." in printed
    assert records(output) == told
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(output).items())


def test_a_finished_run_that_is_resumed_takes_no_step(typed, tmp_path):
    output = tmp_path / "run"
    commands.main(typed(output))
    before = (output / "records.jsonl").read_text(), (output / "evaluations.jsonl").read_text()
    assert commands.main(["train", "--output", str(output), "--resume", "--quiet"]) == 0
    assert ((output / "records.jsonl").read_text(), (output / "evaluations.jsonl").read_text()) == before


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--step naive --chunk-size 4", "--chunk-size must not be given with --step naive"),
        ("--step naive --retain-chunks 1", "--retain-chunks must not be given with --step naive"),
        ("--step accumulation", "--step accumulation must be given --chunk-size alone"),
        ("--step accumulation --chunk-size 4 --retain-chunks 1", "--step accumulation must be given --chunk-size"),
        ("--chunk-size 4 --chunk-tokens 40", "--chunk-tokens must not be given with --chunk-size"),
        ("--ring", "--ring must be given with --tile-size"),
        ("--tile-size 0", "--tile-size must be auto or at least 1, got 0"),
        ("--steps 4 --epochs 1", "--epochs must not be given with --steps"),
        ("--steps 4 --warmup-steps 5", "--warmup-steps must be at most --steps, 4, got 5"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--keep 0", "--keep must be at least 1, got 0"),
        ("--learning-rate nan", "--learning-rate must be a finite number above 0, got nan"),
        ("--temperature 0", "--temperature must be a finite number above 0, got 0.0"),
        ("--weight-decay -1", "--weight-decay must be a finite number, 0 or more, got -1.0"),
        ("--dropout 1", "--dropout must be a number from 0 to below 1, got 1.0"),
        ("--dropout 0 --model minilm-l6", "--dropout must be left out but for tiny"),
        ("--model enormous", "--model must be one of tiny, mini"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line_before_anything_is_loaded(
    more, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "run", None)  # calling it would raise
    assert commands.main(["train", "--output", str(tmp_path / "run"), *more.split()]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("python -m gclib train: error: ") and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--output", "x", "--batch-size", "many"], ["--output", "x", "--step", "none"]])
def test_what_can_not_be_read_is_refused_with_the_usage(more, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["train", *more])
    assert stopped.value.code == 2
    assert "usage: python -m gclib train --output FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--batch-size 37", "--batch-size must be at most the number of pairs, 36, got 37"),
        ("--passage-length 2000", "must be at most the model's 512 tokens, got 2000"),
        ("--steps 3 --query-column question", 'texts "question" and "passage"'),
        ("--negatives 40", "per_query must be at most"),
        ("--epochs 1 --warmup-steps 100", "warmup_steps must be at most the number of steps"),
    ],
)
def test_what_does_not_fit_the_data_or_the_model_is_refused_before_the_folder_is_made(
    more, message, typed, tmp_path, capsys
):
    assert commands.main(typed(tmp_path / "run", more, small="--model tiny --batch-size 8")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_by_other_settings(typed, data, tmp_path, capsys):
    output = tmp_path / "run"
    commands.main(typed(output))
    before = (output / "records.jsonl").read_text()
    assert commands.main(typed(output)) == 2
    assert "--output must be a new folder, or be given with --resume" in capsys.readouterr().err
    for more, message in {
        "--batch-size 4": "--batch-size must be 8, as in the run that is resumed, got 4",
        "--epochs 3": "--epochs must be left out, as in the run that is resumed, got 3",
        "--symmetric": "--symmetric must be left out",
    }.items():
        assert commands.main(["train", "--output", str(output), "--resume", *more.split()]) == 2
        assert message in capsys.readouterr().err
    assert commands.main(["train", "--output", str(output), "--resume", "--quiet", "--keep", "1"]) == 0
    with (data / "train.jsonl").open("a") as lines:
        lines.write(json.dumps({"query": "new", "passage": "newer"}) + "\n")
    assert commands.main(["train", "--output", str(output), "--resume", "--quiet"]) == 2
    assert "--resume must find the 36 pairs that the run began with, got 37 pairs" in capsys.readouterr().err
    assert (output / "records.jsonl").read_text() == before


def test_data_without_a_test_split_are_trained_on_without_evaluations(typed, data, tmp_path, capsys):
    (data / "test.jsonl").unlink()
    assert commands.main(typed(tmp_path / "run")) == 2
    assert "--test-pairs must be 0 for data without pairs to test on" in capsys.readouterr().err
    assert commands.main(typed(tmp_path / "run", "--test-pairs 0 --steps 1")) == 0
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_resume_wants_a_run(tmp_path, capsys):
    assert commands.main(["train", "--output", str(tmp_path), "--resume"]) == 2
    assert "--resume must be given with the --output of a run" in capsys.readouterr().err
    for content in ("{", "{}", '{"settings": {"new": 1}}'):
        (tmp_path / "config.json").write_text(content)
        assert commands.main(["train", "--output", str(tmp_path), "--resume"]) == 2
        assert "--resume must find a config.json that this version can read" in capsys.readouterr().err


def test_folders_are_kept_by_their_whole_path(typed, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a size all the same
    assert commands.main(typed("run", "--steps 1 --data data")) == 0
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (kept["data"], kept["model"]) == (str(data.resolve()), "tiny")
    monkeypatch.chdir(data)
    assert commands.main(["train", "--output", str(tmp_path / "run"), "--resume", "--quiet"]) == 0


def test_a_loss_that_is_no_number_ends_the_run_in_words(typed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "step_function", lambda *of: lambda *batch: torch.tensor(torch.nan))
    assert commands.main(typed(tmp_path / "run")) == 1
    assert "error: training stopped: the loss is nan" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "run") == []


# --- the model that is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_kept_model_is_loaded_by_the_encoder_and_by_sentence_transformers(pooling, typed, tmp_path):
    models = pytest.importorskip("sentence_transformers")
    commands.main(typed(tmp_path / "run", f"--steps 2 --pooling {pooling}"))
    folder = tmp_path / "run" / "model"
    encoder = Encoder.from_pretrained(folder, pooling=pooling).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [row["passage"] for row in ROWS] + ["plums " * 60]  # the last is cut
    with torch.no_grad():
        ours = encode_texts(encoder, texts, tokenizer, 24, 8)
    theirs = models.SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_a_folder(typed, tmp_path):
    assert commands.main(typed(tmp_path / "first")) == 0
    small = "--batch-size 8 --chunk-size 3 --steps 2 --query-length 16 --passage-length 24"
    more = f"--model {tmp_path / 'first' / 'model'}"
    assert commands.main(typed(tmp_path / "second", more, small=small)) == 0
    first, second = records(tmp_path / "first"), records(tmp_path / "second")
    assert second[0]["loss"] < first[0]["loss"] - 0.3


# --- where it began and where it ends ---------------------------------------------------------------------------


def loud(arguments):
    return [word for word in arguments if word != "--quiet"]


FROM_A_FOLDER = "--batch-size 8 --chunk-size 3 --steps 12 --query-length 16 --passage-length 24"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that a small run left."""
    folder = tmp_path_factory.mktemp("trained")
    assert commands.main(arguments_of(folder / "run", write_data(folder / "data"))) == 0
    return folder / "run" / "model"


def config_of_run(output):
    return json.loads((output / "config.json").read_text())


def test_fresh_and_trained_weights_start_at_rates_of_their_own(trained, typed, tmp_path, capsys):
    assert commands.main(loud(typed(tmp_path / "fresh", "--steps 2"))) == 0
    assert (
        "From fresh weights: a highest rate of 0.001 (chosen; --learning-rate sets another)" in capsys.readouterr().out
    )
    assert [line["learning_rate"] for line in records(tmp_path / "fresh")] == pytest.approx([1e-3, 5e-4])
    assert commands.main(loud(typed(tmp_path / "run", f"--model {trained}", small=FROM_A_FOLDER))) == 0
    told = capsys.readouterr().out
    assert "From trained weights: a highest rate of 2e-05 (chosen; --learning-rate sets another), 2 steps of" in told
    rates = [line["learning_rate"] for line in records(tmp_path / "run")]
    assert rates[:3] == pytest.approx([1e-5, 2e-5, 2e-5]) and rates[3:] == sorted(rates[3:], reverse=True)
    config = config_of_run(tmp_path / "run")
    assert config["chosen"] == ["learning_rate", "warmup_steps"]
    assert (config["settings"]["learning_rate"], config["settings"]["warmup_steps"]) == (2e-5, 2)


def test_what_was_typed_always_wins(trained, typed, tmp_path, capsys):
    more = f"--model {trained} --learning-rate 0.003 --warmup-steps 0 --schedule constant"
    assert commands.main(loud(typed(tmp_path / "run", more, small=FROM_A_FOLDER))) == 0
    assert {line["learning_rate"] for line in records(tmp_path / "run")} == {0.003}
    assert "a highest rate of 0.003, 0 steps of warm-up." in capsys.readouterr().out
    assert config_of_run(tmp_path / "run")["chosen"] == []


def evaluations_that_say(monkeypatch, *values):
    """What each evaluation of a run finds, without one."""
    told = iter(values)
    monkeypatch.setattr(
        session, "retrieval_metrics", lambda *_, **__: dict(zip(("top-1", "mrr"), next(told), strict=True))
    )


def test_before_and_after_stand_side_by_side(typed, tmp_path, monkeypatch, capsys):
    evaluations_that_say(monkeypatch, (0.25, 0.5), (0.5, 0.625))
    assert commands.main(loud(typed(tmp_path / "run", "--steps 2"))) == 0
    told = capsys.readouterr().out
    assert "10 test pairs  before  after step 2\n" in told
    assert "top-1           0.250         0.500\nmrr             0.500         0.625\n" in told
    assert "Warning" not in told


@pytest.mark.parametrize("after", [(0.125, 0.75), (0.5, 0.25)])
def test_a_run_that_ends_below_where_it_began_says_so(after, typed, tmp_path, monkeypatch, capsys):
    evaluations_that_say(monkeypatch, (0.5, 0.5), after)
    assert commands.main(loud(typed(tmp_path / "run", "--steps 2"))) == 0
    told = capsys.readouterr().out
    worse = f"top-1 from 0.500 to {after[0]:.3f}" if after[0] < 0.5 else f"mrr from 0.500 to {after[1]:.3f}"
    assert f"Warning: the model is worse than it was before the training: {worse}. The loss may" in told


def test_a_resumed_run_is_compared_with_its_own_beginning_and_other_test_pairs_are_not(typed, tmp_path, capsys):
    commands.main(typed(tmp_path / "run"))
    resume = ["train", "--output", str(tmp_path / "run"), "--resume"]
    assert commands.main(resume) == 0
    assert "10 test pairs  before  after step 8\n" in capsys.readouterr().out
    assert commands.main([*resume, "--test-pairs", "5", "--steps", "9"]) == 0
    told = capsys.readouterr().out
    assert "Step 9, 5 test pairs" in told and "before" not in told


def test_test_pairs_for_a_run_that_has_ended_compare_nothing(typed, tmp_path):
    small = "--model tiny --vocab-size 200 --batch-size 8 --steps 2 --test-pairs 0"
    assert commands.main(typed(tmp_path / "run", small=small)) == 0
    assert commands.main(["train", "--output", str(tmp_path / "run"), "--resume", "--test-pairs", "10"]) == 0


def test_an_empty_output_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["train", "--output", ""])
    assert ended.value.code == 2 and "must be a folder, got an empty text" in capsys.readouterr().err


def test_the_temperature_of_each_loss_is_recorded(typed, tmp_path):
    assert commands.main(typed(tmp_path / "fixed", "--temperature 0.07 --steps 2")) == 0
    assert [line["temperature"] for line in records(tmp_path / "fixed")] == [0.07, 0.07]
    assert commands.main(typed(tmp_path / "learned", "--temperature 0.07 --steps 2 --learnable-temperature")) == 0
    first, second = [line["temperature"] for line in records(tmp_path / "learned")]
    assert first == pytest.approx(0.07, rel=1e-6) and 0.0001 < abs(second - 0.07) / 0.07 < 0.01


# --- prefixes ---------------------------------------------------------------------------------------------------


def test_prefixes_stand_before_every_text_and_are_kept_as_prompts(typed, data, tmp_path):
    models = pytest.importorskip("sentence_transformers")
    prefixes = ["--query-prefix", "ask: ", "--passage-prefix", "tell: "]
    assert commands.main([*typed(tmp_path / "run", "--negatives 1"), *prefixes]) == 0
    for name, rows in (("train", ROWS), ("test", ROWS[:10])):
        texts = [{"query": "ask: " + row["query"], "passage": "tell: " + row["passage"]} for row in rows]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    settings = config_of_run(tmp_path / "run")["settings"]
    assert (settings["query_prefix"], settings["passage_prefix"]) == ("ask: ", "tell: ")
    model = models.SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert (model.prompts["query"], model.prompts["document"]) == ("ask: ", "tell: ")
    theirs = model.encode_query(["How to sort"], convert_to_tensor=True)
    torch.testing.assert_close(theirs, model.encode(["ask: How to sort"], prompt="", convert_to_tensor=True))


def test_texts_that_bring_their_prefix_give_the_same_losses(typed, data, tmp_path):
    prefixes = ["--query-prefix", "ask: ", "--passage-prefix", "tell: "]
    assert commands.main([*typed(tmp_path / "typed"), *prefixes]) == 0
    for name, rows in (("train", ROWS), ("test", ROWS[:10])):
        texts = [{"query": "ask: " + row["query"], "passage": "tell: " + row["passage"]} for row in rows]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    assert commands.main(typed(tmp_path / "written")) == 0
    assert_same_run(tmp_path / "typed", tmp_path / "written")


def with_prompts(trained, folder, **about):
    shutil.copytree(trained, folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({"query": "q: ", "document": "d: "}, None, ("q: ", "d: ")),
        ({"query": "q: ", "passage": "p: "}, None, ("q: ", "p: ")),
        ({"sts": "s: ", "query": "q: "}, "sts", ("q: ", "s: ")),
        ({"sts": "s: "}, None, ("", "")),
    ],
)
def test_a_folders_own_prompts_are_used_and_kept(prompts, default, expected, trained, typed, tmp_path):
    model = with_prompts(trained, tmp_path / "model", prompts=prompts, default_prompt_name=default)
    assert commands.main(typed(tmp_path / "run", f"--model {model} --steps 1", small=FROM_A_FOLDER)) == 0
    settings = config_of_run(tmp_path / "run")["settings"]
    assert (settings["query_prefix"], settings["passage_prefix"]) == expected
    again = build.with_prompts(Settings(model=str(tmp_path / "run" / "model")))
    assert (again.query_prefix, again.passage_prefix) == expected
    no_prefix = ["--query-prefix", "", "--passage-prefix", ""]
    assert (
        commands.main([*typed(tmp_path / "bare", f"--model {model} --steps 1", small=FROM_A_FOLDER), *no_prefix]) == 0
    )
    bare = build.with_prompts(Settings(model=str(tmp_path / "bare" / "model")))
    assert (bare.query_prefix, bare.passage_prefix) == ("", "")


def test_a_prefix_that_leaves_no_room_for_text_is_refused(typed, tmp_path, capsys):
    assert (
        commands.main([*typed(tmp_path / "run"), "--query-prefix", "words that fill all of the room there is " * 3])
        == 2
    )
    assert "--query-length must leave room for text beside the prefix and special tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- a finished run made longer ---------------------------------------------------------------------------------


EPOCHS = "--model tiny --vocab-size 200 --batch-size 8 --chunk-size 3 --query-length 16 --passage-length 24"


def test_a_finished_run_goes_on_to_the_numbers_of_a_longer_one(typed, tmp_path, capsys):
    constant = "--schedule constant --warmup-steps 2 --learnable-temperature"
    assert commands.main(typed(tmp_path / "whole", f"{constant} --epochs 3", small=EPOCHS)) == 0
    assert commands.main(typed(tmp_path / "run", f"{constant} --epochs 2", small=EPOCHS)) == 0
    assert commands.main(["train", "--output", str(tmp_path / "run"), "--resume", "--epochs", "3"]) == 0
    told = capsys.readouterr().out
    assert "begun as one of 8 steps and goes on as one of 12, to the same numbers as one of 12 from the start." in told
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    first, second = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, other = config_of_run(tmp_path / "run"), config_of_run(tmp_path / "whole")
    assert one == other


def test_a_schedule_that_depends_on_the_length_is_told(typed, tmp_path, capsys):
    output = tmp_path / "run"
    assert commands.main(typed(output, "--epochs 1", small=EPOCHS)) == 0
    assert commands.main(["train", "--output", str(output), "--resume", "--epochs", "2"]) == 0
    told = capsys.readouterr().out
    assert (
        "begun as one of 4 steps and goes on as one of 8. Its rates depend on that number (linear, 0 steps of" in told
    )
    assert "the numbers are not those of a run of 8 steps from the start" in told
    rates = [line["learning_rate"] for line in records(output)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4])


def test_a_warm_up_that_was_chosen_by_the_length_is_told(trained, typed, tmp_path, capsys):
    small = FROM_A_FOLDER.replace("--steps 12", "--steps 8")
    assert commands.main(typed(tmp_path / "run", f"--model {trained} --schedule constant", small=small)) == 0
    resume = ["train", "--output", str(tmp_path / "run"), "--resume", "--steps"]
    assert commands.main([*resume, "10"]) == 0
    assert "to the same numbers as one of 10 from the start" in capsys.readouterr().out
    assert commands.main([*resume, "11"]) == 0
    assert "not those of a run of 11 steps from the start" in capsys.readouterr().out


def test_a_run_is_not_made_shorter_than_it_is(typed, tmp_path, capsys):
    assert commands.main(typed(tmp_path / "run")) == 0
    before = (tmp_path / "run" / "config.json").read_text()
    assert commands.main(["train", "--output", str(tmp_path / "run"), "--resume", "--steps", "7"]) == 2
    assert "--steps or --epochs must lead to 8 steps or more, which are taken already, got 7" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_run_that_was_begun_before_there_were_prefixes_goes_on_as_it_was(trained, typed, tmp_path):
    """Its config.json has neither of them; then no prefix stood there, and the mean was taken of any folder."""
    model = with_prompts(trained, tmp_path / "model", prompts={"query": "q: "})
    for place in ("whole", "run"):
        more = f"--model {model} --learning-rate 0.001 --warmup-steps 0 --pooling mean"
        prefixes = ["--query-prefix", "", "--passage-prefix", ""]
        assert (
            commands.main([*typed(tmp_path / place, f"{more} --checkpoint-every 4", small=FROM_A_FOLDER), *prefixes])
            == 0
        )
    config = config_of_run(tmp_path / "run")
    del config["settings"]["query_prefix"], config["settings"]["passage_prefix"], config["chosen"]
    config["settings"]["pooling"] = None
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "run" / "checkpoint-000012")
    assert commands.main(["train", "--output", str(tmp_path / "run"), "--resume", "--quiet"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- nothing lost on disk ---------------------------------------------------------------------------------------


def test_two_trainers_never_write_into_one_folder(typed, tmp_path, monkeypatch, capsys):
    output, write, others = tmp_path / "run", session.Session.write_record, []

    def another_one_comes(run, record):
        write(run, record)
        if record.step == 2 and not others:
            for arguments in (typed(output), ["train", "--output", str(output), "--resume"]):
                others.append(commands.main(arguments))

    monkeypatch.setattr(session.Session, "write_record", another_one_comes)
    assert commands.main(typed(output)) == 0
    assert others == [2, 2]
    told = capsys.readouterr().err
    assert "which holds a run" in told and f"where process {os.getpid()} on" in told
    assert [line["step"] for line in records(output)] == list(range(1, 9))


def test_two_trainers_that_begin_at_once_on_a_new_folder(typed, tmp_path, monkeypatch, capsys):
    """The second comes while the first loads its data: there is no config.json yet."""
    output, load, others = tmp_path / "run", command.load_data, []

    def another_one_comes(*arguments, **options):
        if not others:
            others.append(None)
            others[0] = commands.main(typed(output))
        return load(*arguments, **options)

    monkeypatch.setattr(command, "load_data", another_one_comes)
    assert commands.main(typed(output)) == 0
    assert others == [2] and "no other run writes into" in capsys.readouterr().err
    assert len(records(output)) == 8


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_gives(umask, mode, typed, tmp_path):
    before = os.umask(umask)
    try:
        assert commands.main(typed(tmp_path / "run", "--steps 2")) == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert set(modes.values()) == {mode}, modes


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def full_for_safetensors(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (checkpoints, "save_file", full_for_safetensors),
        (checkpoints, "save_file", full),
        (session, "append_line", full),
        (session, "save_model_folder", full),
    ],
)
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_later(
    module, name, fault, typed, tmp_path, monkeypatch, capsys
):
    assert commands.main(typed(tmp_path / "whole", "--checkpoint-every 3")) == 0
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fault)
        assert commands.main(typed(output, "--checkpoint-every 3")) == 1
    told = capsys.readouterr().err
    assert told.startswith("python -m gclib train: error: ") and told.count("\n") == 1
    assert "No space left on device" in told and f"To go on: python -m gclib train --output {output} --resume" in told
    assert not list(output.glob(".*")) and not (output / "run.lock").exists()
    assert commands.main(["train", "--output", str(output), "--resume", "--quiet"]) == 0
    assert_same_run(output, tmp_path / "whole")


def test_a_disk_without_room_for_the_run_is_told_before_the_first_step(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * 2**20))
    assert commands.main(typed(tmp_path / "run", "--checkpoint-every 1 --keep 3")) == 2
    assert "--output must be on a disk with 3." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to"), MemoryError()])
def test_too_little_memory_is_one_line(error, typed, tmp_path, monkeypatch, capsys):
    def raises(*_, **__):
        raise error

    monkeypatch.setattr(build, "grad_cache_step", raises)
    assert commands.main(typed(tmp_path / "run")) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback(typed, tmp_path, monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(build, "grad_cache_step", raises)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        commands.main(typed(tmp_path / "run"))


@pytest.fixture
def mistakes(data, trained, tmp_path):
    """Folders and files that a command line may name by mistake."""
    for name in ("empty", "no_config", "bad_config", "no_config_text"):
        (tmp_path / name).mkdir()
    (tmp_path / "no_config" / "model.safetensors").write_text("x")
    (tmp_path / "bad_config" / "config.json").write_text("{")
    (tmp_path / "unknown.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data {0}/nothing", "--data must be a folder, or a name that `datasets`"),
        ("--data {0}/data/train.jsonl", "--data must be the folder that holds train.jsonl"),
        ("--data {0}/empty", "--data must be a folder that holds train.jsonl"),
        ("--data nothing", "--data must be a folder, or a name that `datasets`"),
        ("--query-column text --passage-column text", "--passage-column must be another column than --query-column"),
        ("--model {0}/nothing", "--model must be one of tiny"),
        ("--model {0}/file", "--model must be one of tiny"),
        ("--model {0}/empty", "--model must be a folder that holds a model's config.json"),
        ("--model {0}/no_config", "--model must be a folder that holds a model's config.json"),
        ("--model {0}/bad_config", "--model must hold a config.json that can be read"),
        ("--model {0}/nothing.json", "--model must be one of tiny"),
        ("--model {0}/unknown.json", "config"),
        ("--model clip-vit-b-32-vision", "--model must read text, got clip-vit-b-32-vision, which reads pictures"),
        ("--model clip-vit-b-32-text", "must be at most the model's 77 tokens, got 100"),
        ("--model minilm-l6 --vocab-size 100", "--vocab-size must be left out but for tiny"),
        ("--output {0}/file", "--output must be a folder, or one that can be made"),
        ("--output {0}/file/run", "--output must be a folder, or one that can be made"),
    ],
)
def test_mistakes_are_told_as_what_they_are_before_anything_is_loaded(
    more, message, mistakes, typed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)  # with it, a name that is no folder may be one of the hub
    monkeypatch.setattr(command, "load_data", None)  # calling it would raise
    small = "--batch-size 8 --steps 2 --passage-length 100"
    assert commands.main(typed(tmp_path / "run", more.format(mistakes), small=small)) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("python -m gclib train: error: ") and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_columns_without_data_are_refused(tmp_path, capsys):
    assert commands.main(["train", "--output", str(tmp_path / "run"), "--query-column", "question"]) == 2
    assert "--query-column and --passage-column must be given with --data" in capsys.readouterr().err


# --- several processes ------------------------------------------------------------------------------------------


def torchrun(arguments, processes=2):
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*started, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def by_torchrun(arguments, processes):
    """The command as the README has it typed."""
    done = torchrun(["-m", "gclib", *arguments], processes)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("start", "more"),
    [
        pytest.param(by_torchrun, "", marks=pytest.mark.deep),
        (run_commands, "--ring --tile-size 3 --symmetric --learnable-temperature --negatives 1"),
    ],
    ids=["", "ring"],
)
def test_two_processes_give_the_records_of_one(start, more, typed, tmp_path):
    """A batch of 7: four rows for one process, three for the other."""
    small = SMALL.replace("--batch-size 8", "--batch-size 7") + " --dropout 0 --checkpoint-every 3"
    assert commands.main(typed(tmp_path / "one", more, small=small)) == 0
    start(typed(tmp_path / "two", more, small=small), 2)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(two) == 8
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    kept = read_checkpoint(list_checkpoints(tmp_path / "two")[-1])
    assert set(kept.generators) == {"rank0.0", "rank1.0"}


INTERRUPTED = """
import os, signal, sys
from gclib import __main__
from gclib.training import session

write = session.Session.write_record

def interrupted(run, record):
    write(run, record)
    if record.step == 5 and run.rank.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)

session.Session.write_record = interrupted
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_two_processes_stop_after_the_same_step_and_go_on_where_they_were(typed, tmp_path, capsys):
    """The signal reaches one of them alone. With dropout: each has generators of its own."""
    whole, cut, script = tmp_path / "whole", tmp_path / "cut", tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    run_commands(typed(whole), 2)
    assert torchrun([str(script), *typed(cut)]).returncode != 0
    assert [path.name for path in list_checkpoints(cut)] == ["checkpoint-000005"]
    assert records(cut) == records(whole)[:5]
    resume = ["train", "--output", str(cut), "--resume", "--quiet"]
    assert commands.main(resume) == 2
    assert "the number of processes must be 2, as in the run that is resumed" in capsys.readouterr().err
    run_commands(resume, 2)
    assert_same_run(cut, whole)


def test_without_dropout_another_number_of_processes_may_go_on(typed, tmp_path, monkeypatch):
    assert commands.main(typed(tmp_path / "run", "--dropout 0 --steps 1")) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.settings_for(tmp_path / "run", {}, resume=True).dropout == 0
