"""Peak memory of one call, beyond what lay there before it."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that torch's allocator held at most while `call` ran, less what it held before.

    On an accelerator the allocator's own statistics; on a CPU the profiler's record of every allocation, temporary
    buffers inside operators included. What BLAS libraries allocate for themselves is in neither.
    """
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()  # what was reserved for other calls is not this one's
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        call()
        torch.accelerator.synchronize()
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Resident(NamedTuple):
    """Bytes of resident memory of this process at most while a call ran, and how much more that was than before."""

    peak: int
    growth: int


def peak_resident(call: Callable[[], object], every: float = 0.0005) -> Resident:
    """This process's resident memory while `call` ran, looked at every so many seconds."""
    process, done = psutil.Process(), threading.Event()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc keeps what was freed before, and would hide what is taken now
        trim(0)
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(every)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    peak = max(peak, process.memory_info().rss)
    return Resident(peak, peak - before)
