"""Peak memory of one call, beyond what lay there before it; and a heap that keeps what was freed."""

import ctypes
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
        torch.accelerator.synchronize(device)
        torch.accelerator.empty_cache()  # what was reserved for other calls is not this one's
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        call()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# glibc's numbers for what `mallopt` sets: where the heap is trimmed, how large a block must be to be mapped alone, how
# many of those there may be. What they are while the heap is kept, and what glibc comes to by itself with large blocks.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536}


@contextmanager
def heap_kept() -> Iterator[None]:
    """What is freed meanwhile stays with the process, as it does in torch's allocators on accelerators.

    By itself glibc gives blocks back to the system and takes them anew, which a call pays for, or does not, by what ran
    before it. On other C libraries nothing is changed.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        yield
        return
    for setting, value in KEPT.items():
        mallopt(setting, value)
    try:
        yield
    finally:
        for setting, value in USUAL.items():
            mallopt(setting, value)
        _of_glibc("malloc_trim")(0)


def _of_glibc(name: str) -> Any:
    """A function of glibc; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name) if platform.libc_ver()[0] == "glibc" else None


class Resident(NamedTuple):
    """Bytes of resident memory of this process at most while a call ran, and how much more that was than before."""

    peak: int
    growth: int


def peak_resident(call: Callable[[], object], every: float = 0.0005) -> Resident:
    """This process's resident memory while `call` ran, looked at every so many seconds."""
    process, done = psutil.Process(), threading.Event()
    trim = _of_glibc("malloc_trim")
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
