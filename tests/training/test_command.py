"""`python -m gclib train`: options, files, a run that is stopped or killed and goes on, several processes."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.ranks import exit_code, run_commands
from safetensors.torch import load_file

from gclib import __main__ as commands
from gclib.models.encoder import Encoder
from gclib.support import ROOT
from gclib.training import build, checkpoints, command, session
from gclib.training.checkpoints import list_checkpoints, read_checkpoint
from gclib.training.loop import TrainingRecord
from gclib.training.retrieval import encode_texts

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
        "--tile-size auto --ring",
        "--negatives 1 --autocast bf16 --clip-norm 0 --schedule constant --warmup-steps 2",
        "--epochs 1 --pooling cls --test-pairs 0",
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


@pytest.mark.slow
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


# --- several processes ------------------------------------------------------------------------------------------


def torchrun(arguments, processes=2):
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*started, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def by_torchrun(arguments, processes):
    """The command as the README has it typed."""
    done = torchrun(["-m", "gclib", *arguments], processes)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "more"),
    [(by_torchrun, ""), (run_commands, "--ring --tile-size 3 --symmetric --learnable-temperature --negatives 1")],
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


@pytest.mark.slow
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
