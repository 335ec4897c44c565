"""Checkpoints: whole or not there, checked when read; what an optimizer remembers: `gclib.training.checkpoints`."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from gclib.support import ROOT
from gclib.support.files import DamagedFile
from gclib.training import checkpoints
from gclib.training.checkpoints import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)

FILES = ["generators.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


def checkpoint(step, fill=1.0):
    tensors = {"weight": torch.full((3, 4), fill), "half": torch.arange(5, dtype=torch.bfloat16)}
    generators = {"rank0.0": torch.get_rng_state()}
    return Checkpoint(step, tensors, {"0.exp_avg": torch.randn(3, 4)}, generators, {"epoch": 2, "seconds": 0.1})


def assert_same(one, other):
    assert (one.step, dict(one.about)) == (other.step, dict(other.about))
    for group in ("model", "optimizer", "generators"):
        first, second = getattr(one, group), getattr(other, group)
        assert set(first) == set(second)
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])


def test_what_is_written_is_read_back(tmp_path):
    written = checkpoint(100)
    path = write_checkpoint(tmp_path / "run", written)
    assert path.name == "checkpoint-000100"
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert_same(read_checkpoint(path), written)


def test_tensors_that_share_their_bytes_and_strided_ones_are_kept_whole(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    written = Checkpoint(1, {"a": shared, "b": shared, "turned": shared.T, "row": shared[1], "empty": torch.empty(0)})
    assert_same(read_checkpoint(write_checkpoint(tmp_path, written)), written)


def test_the_newest_are_kept_in_the_order_of_their_steps(tmp_path):
    for step in (2, 10, 9, 1_000_000):
        write_checkpoint(tmp_path, checkpoint(step), keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        *("checkpoint-000009", "checkpoint-000010", "checkpoint-1000000")
    ]
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_later_ones_do_not_cost_what_is_written_now(tmp_path):
    write_checkpoint(tmp_path, checkpoint(8))
    (tmp_path / "checkpoint-000008" / "state.json").write_text("cut")
    for step in (3, 4):
        path = write_checkpoint(tmp_path, checkpoint(step), keep=1)
        assert latest_checkpoint(tmp_path)[0].step == step and path.exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-000004", "checkpoint-000008"]


def test_the_same_step_again_replaces_what_was_there(tmp_path):
    write_checkpoint(tmp_path, checkpoint(5, fill=1.0))
    write_checkpoint(tmp_path, checkpoint(5, fill=2.0))
    assert len(list(tmp_path.iterdir())) == 1
    assert read_checkpoint(tmp_path / "checkpoint-000005").model["weight"][0, 0] == 2.0


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "changed": change_a_byte,
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_in_words(file, damage, tmp_path):
    write_checkpoint(tmp_path, checkpoint(1))
    damaged = write_checkpoint(tmp_path, checkpoint(2))
    DAMAGES[damage](damaged / file)
    with pytest.raises(DamagedFile, match=f"checkpoint-000002: {file}"):
        read_checkpoint(damaged)
    found, told = latest_checkpoint(tmp_path)
    assert found.step == 1
    assert len(told) == 1 and file in told[0]


def test_another_step_in_the_state_is_noticed(tmp_path):
    path = write_checkpoint(tmp_path, checkpoint(7)) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "step": 8}))
    with pytest.raises(DamagedFile, match="does not match its own checksum"):
        read_checkpoint(path.parent)


def test_where_none_is_whole_there_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, [])
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])
    (write_checkpoint(tmp_path, checkpoint(3)) / "model.safetensors").unlink()
    found, told = latest_checkpoint(tmp_path)
    assert found is None and told == ["checkpoint-000003: model.safetensors is missing"]


def test_what_was_being_written_is_never_read_and_is_cleared_away(tmp_path):
    write_checkpoint(tmp_path, checkpoint(1))
    for name in (".checkpoint-000002.part", ".checkpoint-000000.old.part", "checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    found, told = latest_checkpoint(tmp_path)
    assert (found.step, told) == (1, [])
    write_checkpoint(tmp_path, checkpoint(3))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_while_a_step_is_replaced_leaves_the_old_one_or_the_new(moment, tmp_path, monkeypatch):
    """A kill before the folder's change of that number: one of the two is read, and the next write tidies up."""

    class Killed(BaseException):
        pass

    def killed(change):
        def call(*args, **kwargs):
            if len(done) == moment:
                raise Killed
            done.append(change)
            return change(*args, **kwargs)

        return call

    done = []
    write_checkpoint(tmp_path, checkpoint(7, 1.0), keep=1)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(checkpoints.os, "rename", killed(os.rename))
        patch.setattr(checkpoints.shutil, "rmtree", killed(shutil.rmtree))
        write_checkpoint(tmp_path, checkpoint(7, 2.0), keep=1)
    found, told = latest_checkpoint(tmp_path)
    assert (found.model["weight"].unique().item(), told) == (1.0 if moment < 2 else 2.0, [])
    assert len(done) == min(moment, 5)  # the old one aside, the new one in its place, three to remove the old one
    for step in (7, 8):
        write_checkpoint(tmp_path, checkpoint(step, 3.0), keep=1)
        assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{step:06d}"]


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_whole_checkpoints_alone(tmp_path):
    """Three writers are killed at random moments; whatever is there under a checkpoint's name is whole."""
    code = """
import itertools, sys, torch
from pathlib import Path
from gclib.training.checkpoints import Checkpoint, write_checkpoint
for step in itertools.count():
    tensors = {"weight": torch.full((200_000,), float(step))}
    write_checkpoint(Path(sys.argv[1]), Checkpoint(step, tensors, tensors), keep=2)
    print(step, flush=True)
"""
    draw = random.Random(0)
    for number in range(3):
        folder = tmp_path / str(number)
        command = [sys.executable, "-c", code, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
            for _ in range(3):
                writer.stdout.readline()
            time.sleep(draw.uniform(0, 0.05))
            os.kill(writer.pid, signal.SIGKILL)
        paths = list_checkpoints(folder)
        assert len(paths) >= 2
        for path in paths:
            kept = read_checkpoint(path)
            assert kept.model["weight"].unique().item() == kept.step


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_goes_on_bit_for_bit(kind, tmp_path):
    def updates(model, optimizer, first, last):
        for number in range(first, last):
            optimizer.zero_grad()
            torch.manual_seed(number)
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    assert optimizer_tensors(optimizer) == {}
    updates(model, optimizer, 0, 3)
    kept = Checkpoint(3, model.state_dict(), optimizer_tensors(optimizer))
    kept = read_checkpoint(write_checkpoint(tmp_path, kept))
    updates(model, optimizer, 3, 6)

    again = nn.Linear(3, 2)
    again.load_state_dict(dict(kept.model))
    other = kind(again.parameters(), lr=0.1)
    load_optimizer_tensors(other, kept.optimizer)
    updates(again, other, 3, 6)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)


def test_what_is_no_tensor_can_not_be_kept():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight]["count"] = 3
    with pytest.raises(ValueError, match="optimizer must remember nothing but tensors, got"):
        optimizer_tensors(optimizer)


@pytest.mark.parametrize(
    ("step", "keep", "message"), [(-1, None, "step must be an int"), (1, 0, "keep must be an int")]
)
def test_bad_arguments_are_refused_and_nothing_is_written(step, keep, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "run", checkpoint(step), keep=keep)
    assert not (tmp_path / "run").exists()
