"""What pruning costs and saves: multiply-accumulates, time and memory."""

from .latency import Timing, speedup, speedup_bound, time_interleaved
from .macs import MacCount, count_macs
from .memory import peak_memory


__all__ = ["MacCount", "Timing", "count_macs", "peak_memory", "speedup", "speedup_bound", "time_interleaved"]
