"""Work in several processes: in order, each in a process of its own making."""

import os

import pytest

from gclib.support.processes import map_in_processes


def told(item):
    return item, os.getpid()


def test_no_process_is_refused_before_any_work():
    with pytest.raises(ValueError, match="processes must be"):
        list(map_in_processes(pytest.fail, ["work was done"], 0))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_made_comes_in_order_from_as_many_processes(processes):
    made = list(map_in_processes(told, range(6), processes))
    assert [item for item, _ in made] == list(range(6))
    assert ({process for _, process in made} == {os.getpid()}) == (processes == 1)
