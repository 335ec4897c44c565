"""What autograd remembers, against counts by hand and against the ledger."""

import pytest
import torch
from helpers.oracles import token_batch
from torch import nn

from gclib import ContrastiveLoss, Encoder, naive_step
from gclib.course.saved import watch_saved
from gclib.memory.ledger import KINDS, record_memory


def test_a_small_net_by_hand():
    """Linear keeps its input, ReLU its output, which is the next input: one storage, counted once."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with watch_saved(net) as saved:
        out = net(torch.randn(5, 4)).sum()
    assert saved.by_shape() == [((5, 8), torch.float32, 1, 5 * 8 * 4), ((5, 4), torch.float32, 1, 5 * 4 * 4)]
    assert saved.total_bytes == 4 * (5 * 4 + 5 * 8)
    out.backward()  # the graph is as good as ever


def test_nothing_is_remembered_without_a_graph():
    net = nn.Linear(4, 4)
    with watch_saved(net) as saved, torch.no_grad():
        net(torch.randn(3, 4))
    assert saved.total_bytes == 0 and saved.by_shape() == []


@pytest.mark.parametrize("rows", [4, 9])
def test_the_ledger_says_the_same_before_the_backward(rows):
    generator = torch.Generator().manual_seed(0)
    batch = [token_batch(rows, 8, generator) for _ in range(2)]
    encoder, loss_fn = Encoder.from_config("tiny"), ContrastiveLoss(0.1)
    with watch_saved(encoder) as saved:
        loss = loss_fn(*(encoder(**inputs) for inputs in batch))
    del loss
    with record_memory(encoder) as ledger:
        naive_step([encoder] * 2, batch, loss_fn, on_phase=ledger.on_phase)
    before = [segment for segment in ledger.timeline if segment.phase == "loss"][-1].kind_bytes[-1]
    held = dict(zip(KINDS, before.tolist(), strict=True))
    assert saved.total_bytes == pytest.approx(held["activations"] + held["inputs"] + held["loss"], rel=0.02)


def test_bytes_are_a_line_in_the_rows():
    encoder, totals = Encoder.from_config("tiny"), []
    for rows in (4, 8, 12):
        inputs = token_batch(rows, 8, torch.Generator().manual_seed(0))
        with watch_saved(encoder) as saved:
            encoder(**inputs)
        totals.append(saved.total_bytes)
    assert totals[2] - totals[1] == totals[1] - totals[0] > 0


def test_refuses_what_is_no_module():
    with pytest.raises(ValueError, match="modules must be torch modules"), watch_saved("encoder"):
        pass
