"""Seconds of calls that are compared, and the pages of memory that a call was handed.

All calls are timed in turn, round by round, so that a slow moment of the machine hits them alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from gclib.support.validation import positive_int, refuse


def seconds_by_round(calls: Mapping[str, Callable[[], object]], *, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each call in each round. Every call runs once to warm up; then each round runs all, in turn.

    So a slow moment of the machine hits the calls alike: compare them by `median_ratio`, round by round. Raises
    ValueError where there is nothing to call.
    """
    positive_int("rounds", rounds)
    if not calls or not all(map(callable, calls.values())):
        raise refuse("calls", "must hold a callable without arguments for each name", calls)
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds of one call's seconds / another's. ValueError where the rounds are not as many."""
    if not seconds or len(seconds) != len(others):
        raise refuse("others", f"must hold as many rounds as seconds, {len(seconds)} and not none", len(others))
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def page_faults() -> int | None:
    """Pages of memory that the system has handed to this process so far (none read from disk); None on Windows.

    A tensor on memory that was given back before is handed new pages, cleared, on first touch: that takes time which no
    FLOP shows.
    """
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
