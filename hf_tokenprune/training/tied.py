"""Runs a script that ends when the process that started it ends, killed or not: `tied.py PARENT SCRIPT ARGUMENTS...`.

A file to be run, of the standard library alone: what comes before `tie` is time in which a killed parent is not seen.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time


SET_DEATH_SIGNAL = 1  # of prctl(2)
EVERY = 1.0  # seconds between two looks, where the system tells nobody


def tie(parent: int) -> None:
    """Ends this process when its parent, of that id, does."""
    if not _told_by_system():
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _told_by_system() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0) == 0


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    script, own = sys.argv[2], os.path.dirname(os.path.abspath(__file__))
    sys.argv = sys.argv[2:]
    # As Python has it for a script: its own folder first, and not this file's, whose names are others'.
    sys.path[:] = [os.path.dirname(os.path.abspath(script)), *(path for path in sys.path if path != own)]
    runpy.run_path(script, run_name="__main__")
