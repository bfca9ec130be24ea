"""Which checkpoint a killed training goes on from."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The furthest checkpoint in a folder that was written to its end, or None.

    `Trainer` writes a checkpoint's state last: where it is not there or breaks off, the process was killed before, and
    the checkpoint before that one holds.
    """
    steps = {path: _steps(path) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    whole = [path for path in steps if steps[path] is not None]
    return str(max(whole, key=steps.get)) if whole else None


def _steps(checkpoint: Path) -> int | None:
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
    except (OSError, json.JSONDecodeError):
        return None
