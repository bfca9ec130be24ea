"""Runs in processes of their own that do not outlive this one."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


TIED = Path(__file__).with_name("tied.py")
PATIENCE = 10.0  # seconds that a process has to end by itself


class Children:
    """Starts scripts, and ends those that run when its `with` block is left by an exception, as by Ctrl-C.

    Whatever else ends this process, a SIGKILL too, ends them as well: see `tied.py`. `run` may be called by several
    threads, each of which must outlive what it runs.
    """

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, script: Path, arguments: Sequence[str], **given: Any) -> int:
        """The exit status of a script.

        Raises:
            RuntimeError: the block was left already.
        """
        with self.lock:
            if self.stopped:
                raise RuntimeError(f"{script.name} was not begun: the others were stopped")
            command = [sys.executable, str(TIED), str(os.getpid()), str(script), *arguments]
            child = subprocess.Popen(command, **given)
            self.running.add(child)
        try:
            return child.wait()
        finally:
            with self.lock:
                self.running.discard(child)

    def stop(self) -> None:
        """Ends all that run, and lets nothing begin."""
        with self.lock:
            self.stopped, running = True, list(self.running)
        for child in running:
            child.terminate()
        for child in running:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.stop()
