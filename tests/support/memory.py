"""Memory that a function allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_of_allocations(run: Callable[[], Any]) -> int:
    """Return the largest number of bytes that ``run`` has allocated at a time, on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept  # its memory counts
    return peak
