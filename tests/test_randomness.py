"""Generators are recorded, replayed and left alone as promised."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gclib import RandomState


def test_replay_draws_the_same_and_leaves_no_trace():
    state = RandomState.record([torch.zeros(1)])
    first = torch.rand(3)
    after = torch.get_rng_state()
    with state.replay():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_an_error_inside_replay_leaves_no_trace():
    state = RandomState.record([])
    torch.rand(3)
    after = torch.get_rng_state()
    with pytest.raises(KeyError), state.replay():
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), after)


def test_restore_puts_the_generator_back():
    state = RandomState.record([])
    first = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), first)


def test_the_state_counts_its_bytes():
    (tensor,) = RandomState.record([torch.zeros(1)]).tensors
    assert tensor.nbytes == torch.get_rng_state().nbytes


def test_fake_tensors_never_put_a_real_generator_back():
    with FakeTensorMode():
        state = RandomState.record([torch.zeros(1)])
    assert sum(tensor.nbytes for tensor in state.tensors) == torch.get_rng_state().nbytes
    torch.rand(3)
    before = torch.get_rng_state()
    state.restore()
    with state.replay():
        pass
    assert torch.equal(torch.get_rng_state(), before)
