"""How `bench` times and counts: all methods in turn, from the same gradients."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..conformance.counting import Operations
from ..stats import ClipStats


@dataclass
class Method:
    """One way to clip.

    Args:
        call: what is timed; None where it cannot run here.
        before: what makes gradients ready for one call, not timed.
        reason: why there is no call.
        period: calls after which costs repeat.
        baseline: whether the others are measured against it.
    """

    name: str
    call: Callable[[], Any] | None = None
    before: Callable[[], None] = lambda: None
    reason: str = ""
    period: int = 1
    baseline: bool = False
    seconds: list[float] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def typical(self) -> float:
        """The median over rounds; of what repeats every few calls, over means of that many."""
        return statistics.median(self._means(self.seconds))

    def ratio(self, other: Method) -> float:
        """The median over rounds of this method's time over the other's in the same round (or rounds, as above)."""
        pairs = zip(self._means(self.seconds), self._means(other.seconds), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def record(self, found: Sequence[Method], floor: str) -> dict[str, Any]:
        """For a table or for JSON, beside the baseline and the method called ``floor`` among those ``found``."""
        if self.call is None:
            return {"method": self.name, "unavailable": self.reason}
        beside = {"to_norm_clip": [m for m in found if m.baseline], "to_floor": [m for m in found if m.name == floor]}
        ratios = {name: self.ratio(others[0]) for name, others in beside.items() if others}
        return {"method": self.name, "ms": 1e3 * self.typical, **ratios, **self.counts}

    def _means(self, seconds: Sequence[float]) -> list[float]:
        whole = range(0, len(seconds) - self.period + 1, self.period)
        return [statistics.fmean(seconds[start : start + self.period]) for start in whole]


def time_together(chosen: Sequence[Method], rounds: int, show: Callable[[], None]) -> None:
    """Every method once a round, together with the other ranks. The slowest rank counts. Two rounds before the first
    are not timed: plans are made in them."""
    several = dist.is_initialized()
    for method in chosen:
        if method.call is not None and rounds < method.period:
            method.call, method.reason = None, f"its cost repeats every {method.period} calls: needs as many rounds"
    running = [m for m in chosen if m.call is not None]
    for i in range(rounds + 2):
        for method in running:
            assert method.call is not None
            method.before()
            if several:
                dist.barrier()
            began = time.perf_counter()
            method.call()
            if i >= 2:
                method.seconds.append(time.perf_counter() - began)
        show()
    for method in running:
        method.counts = count(method)
        if several:
            slowest = torch.tensor(method.seconds, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            method.seconds = slowest.tolist()


def count(method: Method) -> dict[str, float]:
    """Operations, collectives and their bytes of a call, and the most memory it allocated beyond what there was.

    Means over the method's period, but of the memory the most. That is what torch's profiler sees of the allocator.
    Where the call returns statistics, how many units it clipped.
    """
    assert method.call is not None
    seen, most, stats = Operations(), 0, None
    for _ in range(method.period):
        method.before()
        with seen:
            stats = method.call()
    for _ in range(method.period):
        method.before()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            method.call()
        most = max(most, _peak(profile))
    found: dict[str, float] = {
        name: getattr(seen, name) / method.period for name in ("operations", "collectives", "bytes")
    }
    found["peak_extra_bytes"] = most
    if isinstance(stats, ClipStats):
        found["clipped_units"] = int(stats.clipped_units)
    return found


def _peak(profile: torch.profiler.profile) -> int:
    now = most = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
