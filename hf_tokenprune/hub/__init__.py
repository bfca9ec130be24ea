"""Checkpoints on their way out: what a stranger needs to load them."""

from .fresh_process import run_in_fresh_process


__all__ = ["run_in_fresh_process"]
