"""Loading a checkpoint as a stranger does: in a new process in which this package cannot be imported."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


_CHILD = Path(__file__).with_name("stranger.py")


def run_in_fresh_process(
    folder: str | os.PathLike, inputs: dict[str, Any], auto_classes: list[str], *, timeout: float = 300.0
) -> dict[str, dict[str, Any]]:
    """Loads `folder` with `trust_remote_code=True` in a process without this package, and calls what was loaded.

    Args:
        inputs: the model's inputs as nested lists.
        auto_classes: `["AutoModel", "AutoModelForSequenceClassification", ...]`.

    Returns:
        Per Auto class: `class` (the loaded class's name), `output` (logits, or the last hidden state, as nested lists)
        and `counts` (alive tokens after each site).

    Raises:
        RuntimeError: the process failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        question = json.dumps({"folder": os.path.abspath(folder), "inputs": inputs, "auto_classes": auto_classes})
        done = subprocess.run(
            [sys.executable, "-I", str(_CHILD)],
            input=question,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
            cwd=cache,
        )
    if done.returncode:
        raise RuntimeError(f"{folder} does not load without the package:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
