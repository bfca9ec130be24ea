"""Energy as the device's own meters have it, read by zeus (the extra `energy`). Nothing is estimated here."""

import time
from collections.abc import Callable, Mapping
from typing import Any


WINDOW = 0.5  # seconds at least: meters are read ten times a second, or less often
ROUNDS = 5


def open_meters() -> Any:
    """What reads the meters of all devices of this machine.

    Raises:
        ImportError: zeus is missing.
    """
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError as error:
        raise ImportError("energy needs zeus: pip install 'hf_tokenprune[energy]'") from error
    return ZeusMonitor()


def measure_energy(
    monitor: Any, calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, window: float = WINDOW
) -> dict[str, list[float]]:
    """Joules of one call of each, one figure per round; the calls take turns. Empty where no device has a meter.

    Args:
        monitor: as `open_meters` gives it. Calls must have ended on the device when they return.
    """
    joules: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            monitor.begin_window(name)
            started, times = time.perf_counter(), 0
            while not times or time.perf_counter() - started < window:
                call()
                times += 1
            read = monitor.end_window(name)
            sources = (read.gpu_energy, read.cpu_energy, read.dram_energy)
            found = [value for source in sources for value in (source or {}).values()]
            if not found:
                return {}
            joules[name].append(sum(found) / times)
    return joules
