"""Time, interleaved: what is compared runs in turn, so that a drifting machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import bootstrap

from .memory import heap_kept


FEWEST = 5  # rounds that a 95 % bound of a median can come from: with four, 6 % of the time all lie above it


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
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")  # never beyond what was measured
        return low, high

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    def percentile_interval(self, percent: float) -> tuple[float, float]:
        """The 95 % interval of a percentile, by bootstrap over the rounds (seeded)."""
        drawn = np.random.default_rng(0).choice(self.seconds, (2000, len(self.seconds)))
        low, high = np.percentile(np.percentile(drawn, percent, axis=1), (2.5, 97.5))
        return float(low), float(high)


def speedup(slow: Timing, fast: Timing) -> float:
    """The median over the rounds of slow / fast, each pair taken in the same round."""
    return statistics.median(_ratios(slow, fast))


def speedup_bound(slow: Timing, fast: Timing, confidence: float = 0.95) -> float:
    """The lower bound of `speedup`, one-sided, by bootstrap over the rounds (seeded); 0.0 of fewer than five rounds,
    which bound nothing."""
    ratios = _ratios(slow, fast)
    if len(ratios) < FEWEST:
        return 0.0
    if len(set(ratios)) < 2:
        return ratios[0]
    interval = bootstrap(
        (ratios,), np.median, confidence_level=confidence, alternative="greater", method="percentile", rng=0
    )
    return float(interval.confidence_interval.low)


def _ratios(slow: Timing, fast: Timing) -> list[float]:
    return [a / b for a, b in zip(slow.seconds, fast.seconds)]


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    seconds: float = float("inf"),
    progress: Callable = iter,
    device: torch.device | str | None = None,
) -> dict[str, Timing]:
    """Runs the candidates A B C A B C ... and times each run. Meanwhile the heap keeps what is freed: none pays for
    memory that the one before it gave back.

    Args:
        candidates: what to run, by name.
        rounds: timed runs of each, at most; warmup: untimed ones before.
        seconds: no round is begun after so long, except the first three.
        progress: wraps the iteration over rounds, for example `tqdm`.
        device: where the candidates run; None: on CUDA where torch finds it.

    Returns:
        The timings by name: by CUDA's own events there, by the processor's clock elsewhere.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    measure = partial(_seconds_on_cuda, device=device) if device.type == "cuda" else _seconds
    if rounds < 1:
        raise ValueError(f"rounds ({rounds}) must be >= 1")
    with heap_kept():
        return _rounds(candidates, measure, rounds, warmup, seconds, progress)


def _rounds(
    candidates: Mapping[str, Callable[[], object]],
    measure: Callable[[Callable[[], object]], float],
    rounds: int,
    warmup: int,
    seconds: float,
    progress: Callable,
) -> dict[str, Timing]:
    for _ in range(warmup):
        for candidate in candidates.values():
            candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begun = time.perf_counter()
    for done in progress(range(rounds)):
        if done >= 3 and time.perf_counter() - begun > seconds:
            break
        for name, candidate in candidates.items():
            times[name].append(measure(candidate))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _seconds_on_cuda(call: Callable[[], object], device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    begin.record(stream)
    call()
    end.record(stream)
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3  # from milliseconds


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
