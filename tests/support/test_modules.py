"""Which modules a callable runs, their mode for a while, and autocast put back."""

from functools import partial

import pytest
import torch
from torch import nn

from gclib.support.modules import Autocast, call, modules_of, refuse_batch_norm, training_mode

LAYER = nn.Linear(2, 2)


class Holder:
    """A callable object that is no module and holds one."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x)


class Plain:
    """An object that can't be called, whose method runs the module it holds."""

    def __init__(self, module):
        self.model = module

    def encode(self, x):
        return self.model(x)


def test_modules_are_seen_through_what_holds_them():
    module = nn.Sequential(nn.Linear(2, 2))
    defaults = lambda x, layer=module: layer(x)  # noqa: E731
    for held in (module, lambda x: module(x), partial(defaults), defaults, Holder(module), Holder(module).__call__):
        assert modules_of(held) == [module]
    assert modules_of(Plain(module).encode) == [module]
    assert modules_of(lambda x: LAYER(x)) == [LAYER] and modules_of(len) == []


def test_of_a_module_and_its_part_the_outer_one_is_told():
    module = nn.Sequential(nn.Linear(2, 2))
    assert modules_of(lambda x: module(module[0](x))) == [module]


def test_batch_norm_is_refused_in_training_mode_wherever_it_hides():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"encoders\[0\].*BatchNorm"):
        refuse_batch_norm("encoders[0]", lambda x: module(x), "a chunk")
    refuse_batch_norm("encoders[0]", module.eval(), "a chunk")


def test_the_mode_is_put_back_after_an_error():
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), training_mode([module], False):
        assert not any(part.training for part in module.modules())
        raise KeyError
    assert [part.training for part in module.modules()] == [True, True, False]


def test_arguments_that_a_callable_does_not_take_are_told_and_its_own_errors_are_not():
    with pytest.raises(ValueError, match="must take the inputs' names as keywords"):
        call(lambda x: x, wrong=1)
    with pytest.raises(TypeError, match="unsupported operand"):
        call(lambda x: x + "text", 1)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_is_as_it_was(enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        ambient = Autocast.ambient("cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled), ambient.restored():
        assert torch.is_autocast_enabled("cpu") == enabled
        assert torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == (torch.bfloat16 if enabled else torch.float32)
