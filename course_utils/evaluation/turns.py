"""Timing short calls against each other: blocks of a few calls, in turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Call = Callable[[], object]


def in_turns(
    ways: Mapping[str, Sequence[Call]], *, rounds: int = 15, calls: int = 5
) -> dict[str, list[float]]:
    """Milliseconds of a call by each of `ways`, one value for each of `rounds` blocks of `calls` calls.

    The ways take turns, block by block: call by call their waiting threads would fight, and one after the
    other a machine that gets slower would slow down some of them. Each call takes the way's next item, so
    that copies of a weight, one an item, are not found in the cache. One round more comes first, and does
    not count. Raises ValueError for no way, a way of no items, and less than 2 rounds or 1 call.
    """
    if not ways or not all(ways.values()):
        empty = next((name for name, items in ways.items() if not items), None)
        raise ValueError(f"nothing to call{f' for {empty!r}' if ways else ''}: give some items")
    if rounds < 2 or calls < 1:
        raise ValueError(f"{rounds} rounds of {calls} calls: take 2 rounds and 1 call at least")
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, items in ways.items():
            block = [items[(turn * calls + i) % len(items)] for i in range(calls)]
            start = time.perf_counter()
            for call in block:
                call()
            if turn:  # the first is the warm-up
                taken[name].append((time.perf_counter() - start) / calls * 1e3)
    return taken


def times_as_fast(baseline: Sequence[float], way: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as `baseline` a way is, round by round: median, first and third quartile.

    Both are of the same `in_turns`. Raises ValueError for lists of different lengths.
    """
    if len(baseline) != len(way):
        raise ValueError(f"{len(baseline)} and {len(way)} rounds: take both from one in_turns")
    ratios = [slow / fast for slow, fast in zip(baseline, way, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high
