"""What pruning costs and saves: multiply-accumulates and time."""

from .latency import Timing, speedup, time_interleaved
from .macs import MacCount, count_macs


__all__ = ["MacCount", "Timing", "count_macs", "speedup", "time_interleaved"]
