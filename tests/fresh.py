"""Runs code in a fresh process that has torch and transformers, but neither this package nor this repository."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Refuses the package under every way it may be installed, editable ones included.
PRELUDE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_tokenprune":
            raise ModuleNotFoundError(f"no module named {name!r}: this process goes without it")

sys.meta_path.insert(0, Refuse())
ARGUMENTS, RESULT = json.loads(sys.argv[1]), {}
import torch
torch.set_num_threads(1)
"""
EPILOGUE = """
assert not [name for name in sys.modules if name.partition(".")[0] == "hf_tokenprune"]
with open(sys.argv[2], "w") as file:
    json.dump(RESULT, file)
"""


@dataclass
class Finished:
    """What the script put into `RESULT`, and all that it printed."""

    result: dict[str, Any]
    printed: str


def run_fresh(
    script: str,
    folder: Path,
    *,
    python: str = sys.executable,
    variables: dict[str, str] | None = None,
    **arguments: Any,
) -> Finished:
    """Runs `script`, which reads the dict `ARGUMENTS` and fills the dict `RESULT`, both JSON.

    Args:
        folder: where it runs and where the code of models is cached; better empty.
        python: of another environment. variables: of the environment, further ones.

    Raises:
        AssertionError: with everything it printed, if it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {
        "HF_HOME": str(folder / "hf_home"),
        "HF_MODULES_CACHE": str(folder / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "warning",
    } | (variables or {})
    answer = folder / "result.json"
    answer.unlink(missing_ok=True)
    program = folder / "script.py"
    program.write_text(PRELUDE + textwrap.dedent(script) + EPILOGUE)
    command = [python, str(program), json.dumps(arguments), str(answer)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return Finished(json.loads(answer.read_text()), printed)
