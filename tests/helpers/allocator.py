"""The allocator's own peak, as torch.profiler reports it: the oracle of the ledger."""

from torch.profiler import ProfilerActivity, profile


def allocator_peak(run) -> int:
    """The most bytes that `run()` had allocated at once, beyond what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert events
    return peak
