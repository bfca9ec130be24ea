"""Wall-clock time, interleaved: what is compared runs in turn, so that a drifting machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (self.median,) * 3
        return low, high


def speedup(slow: Timing, fast: Timing) -> float:
    """The median over the rounds of slow / fast, each pair taken in the same round."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds))


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, progress: Callable = iter
) -> dict[str, Timing]:
    """Runs the candidates A B C A B C ... and times each run.

    Args:
        candidates: what to run, by name.
        rounds: timed runs of each; warmup: untimed ones before.
        progress: wraps the iteration over rounds, for example `tqdm`.

    Returns:
        The timings by name, on the device's own clock edges: an accelerator is waited for.
    """
    if rounds < 1:
        raise ValueError(f"rounds ({rounds}) must be >= 1")
    for _ in range(warmup):
        for candidate in candidates.values():
            candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in progress(range(rounds)):
        for name, candidate in candidates.items():
            _wait()
            start = time.perf_counter()
            candidate()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
