"""Calls are timed in turn, compared by their medians, and fresh memory is counted."""

import mmap

import pytest

from gclib.course.timing import median_ratio, page_faults, seconds_by_round


def test_calls_take_turns_and_the_warm_up_is_not_timed():
    order = []
    seconds = seconds_by_round({name: lambda n=name: order.append(n) for name in "ab"}, rounds=3)
    assert "".join(order) == "ab" * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert median_ratio([1.0, 9.0, 4.0], [2.0, 3.0, 4.0]) == 1.0


def test_page_faults_count_fresh_memory():
    if (before := page_faults()) is None:
        pytest.skip("this system does not count page faults")
    fresh = mmap.mmap(-1, 64 * 2**20)
    fresh[::4096] = bytes(len(fresh) // 4096)  # touch every page: until then none is handed out
    assert page_faults() > before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seconds_by_round({}), "calls must hold a callable"),
        (lambda: seconds_by_round({"a": print}, rounds=0), "rounds must be an int of at least 1"),
        (lambda: median_ratio([1.0], []), "others must hold as many rounds"),
    ],
)
def test_bad_arguments_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
