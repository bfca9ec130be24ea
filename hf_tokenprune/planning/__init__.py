"""From a target to a pruning: what to take away so that a model costs, or takes, just so much."""

from .calibrate import Calibration, calibrate
from .latency_curve import LatencyCurve, measure_curve
from .plan import Plan, plan
from .search import Search, search_schedule


__all__ = ["Calibration", "LatencyCurve", "Plan", "Search", "calibrate", "measure_curve", "plan", "search_schedule"]
