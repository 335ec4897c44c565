"""Several processes and a CUDA card: nccl with a world of one, two gloo ranks that share the card, the trainer.

A card belongs to one nccl rank, so what several nccl ranks send each other is only tested where the world is one: a
rank that gathers from itself, reduces with itself, and is its own neighbour around the ring.
"""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.oracles import gradients, worst_error
from helpers.ranks import message_of, run_ranks

from gclib.distributed import _average, _Gather, average_gradients, rows_of_ranks
from gclib.losses.dense import contrastive_loss
from gclib.losses.directions import Directions
from gclib.losses.module import ContrastiveLoss
from gclib.losses.ring import Ring, _RingLoss
from gclib.steps import grad_cache_step
from gclib.support import ROOT
from tests.test_distributed import batches, models, own_part, truth
from tests.training.test_command import ROWS as PAIRS

SHARES = {1: [5], 2: [3, 2]}
LOSSES = {
    "gather": {"gather": True},
    "gather, tiles of 2": {"gather": True, "tile_size": 2},
    "ring, tiles of 2": {"ring": True, "tile_size": 2},
}


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


def errors_on_the_card(here, names):
    """Per loss: its error, and the gradient's, of this rank's share computed on the one card."""
    rows, found = SHARES[here.world_size], {}
    right, expected = truth(rows, True, 1, True)
    for name in names:
        encoders = [encoder.cuda() for encoder in models(tied=True)]
        loss_fn = ContrastiveLoss(0.4, learnable=True, symmetric=True, **LOSSES[name]).double().cuda()
        with torch.no_grad():
            loss_fn.log_temperature.copy_(torch.tensor(0.4).double().log())
        parts = [own_part(batch, rows, here.rank, 1 + place) for place, batch in enumerate(batches(rows, 1))]
        inputs = [on("cuda", part) for part in parts]

        def step(encoders=encoders, inputs=inputs, loss_fn=loss_fn):
            loss = grad_cache_step(encoders, inputs, loss_fn, chunk_size=2, retain_chunks=1)
            average_gradients(*encoders, loss_fn)
            return loss

        loss, changes = gradients([*encoders, loss_fn], step)
        found[name] = [float((loss.cpu() - right).abs()), worst_error([change.cpu() for change in changes], expected)]
    return found


def test_nccl_with_a_world_of_one_gives_the_plain_gradient(tmp_path):
    for found in run_ranks(errors_on_the_card, 1, tmp_path, list(LOSSES), backend="nccl", on_card=True):
        assert set(found) == set(LOSSES) and max(max(errors) for errors in found.values()) <= 1e-12, found


def test_two_gloo_ranks_that_share_a_card_give_the_gradient_of_one_process(tmp_path):
    names = [name for name in LOSSES if "ring" not in name]
    for found in run_ranks(errors_on_the_card, 2, tmp_path, names, on_card=True):
        assert set(found) == set(names) and max(max(errors) for errors in found.values()) <= 1e-12, found


def ring_on_the_card(here):
    reps = [torch.randn(3, 4, device="cuda", requires_grad=True) for _ in range(2)]
    return message_of(lambda: ContrastiveLoss(across="ring", tile_size=2)(*reps))


def test_a_ring_of_gloo_says_that_it_sends_no_cuda_tensors(tmp_path):
    for kind, text, _ in run_ranks(ring_on_the_card, 2, tmp_path, on_card=True):
        assert kind == "ValueError" and "gloo's, which sends no CUDA tensors: take nccl, or gather" in text


def sent_to_itself(here, by_ring):
    """The error of a loss that goes through nccl itself: alone the library sends nothing, so its parts are called."""
    torch.manual_seed(5)
    reps = [torch.randn(rows, 4, device="cuda", dtype=torch.float64, requires_grad=True) for rows in (5, 10)]
    temperature = torch.tensor(0.3, device="cuda", dtype=torch.float64, requires_grad=True)
    rows = rows_of_ranks(*reps)
    plain = contrastive_loss(*reps, temperature=temperature, symmetric=True)
    if by_ring:
        ring = Ring(0, rows, 2, 2, Directions.of(True, None, "joint"), rule=None, group=None)
        loss = _RingLoss.apply(*reps, temperature, ring)
    else:
        gathered = [_Gather.apply(rep, [rep.shape[0]], None) for rep in reps]
        loss = contrastive_loss(*gathered, temperature=temperature, symmetric=True)
    found, expected = ([value.detach(), *torch.autograd.grad(value, [*reps, temperature])] for value in (loss, plain))
    layer = torch.nn.Linear(2, 3, device="cuda")
    layer.weight.grad = torch.ones_like(layer.weight)
    _average(list(layer.parameters()), None)
    kept = bool((layer.weight.grad == 1).all()) and layer.bias.grad is None
    return [rows, worst_error(found, expected), kept]


@pytest.mark.parametrize("by_ring", [False, True], ids=["gathered and averaged", "around the ring"])
def test_what_the_library_sends_goes_through_nccl(by_ring, tmp_path):
    [[rows, error, kept]] = run_ranks(sent_to_itself, 1, tmp_path, by_ring, backend="nccl", on_card=True)
    assert rows == [5] and kept and error <= 1e-12


# --- the trainer ----------------------------------------------------------------------------------------------------

SMALL = "--model tiny --vocab-size 200 --batch-size 8 --chunk-size 3 --steps 6 --query-length 16 --passage-length 24"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", PAIRS), ("test", PAIRS[:10])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(arguments, *, cards="0", torchrun=True):
    """`python -m gclib train`, under torchrun with one process or plainly; what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"] if torchrun else []
    command = [sys.executable, *launcher, "-m", "gclib", "train", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": cards}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", ["", "--ring --tile-size 3 --symmetric --learnable-temperature --autocast bf16"])
def test_the_trainer_under_torchrun_on_the_card(more, data, tmp_path):
    """Without dropout the losses are the processor's; in bfloat16 nearly."""
    arguments = ["--data", data, *SMALL.split(), "--dropout", "0", *more.split()]
    said = trained(["--output", tmp_path / "card", *arguments])
    assert "parameters on cuda" in said and "test pairs: " in said
    trained(["--output", tmp_path / "processor", *arguments], cards="", torchrun=False)
    found, expected = losses(tmp_path / "card"), losses(tmp_path / "processor")
    assert len(found) == 6 and all(math.isfinite(loss) for loss in found)
    assert found == pytest.approx(expected, rel=0.05 if "bf16" in more else 1e-3)
    assert (tmp_path / "card" / "model" / "model.safetensors").is_file()


def test_a_run_on_the_card_goes_on_to_the_same_losses(data, tmp_path):
    """With dropout: the card's generator is part of a checkpoint."""
    output = tmp_path / "run"
    more = ["--checkpoint-every", "3", "--keep", "3"]
    trained(["--output", output, "--data", data, *SMALL.split(), *more])
    whole = losses(output)
    shutil.rmtree(output / "checkpoint-000006")
    shutil.rmtree(output / "model")
    assert "Resumed after step 3." in trained(["--output", output, "--resume"])
    assert losses(output) == pytest.approx(whole, rel=1e-4)
