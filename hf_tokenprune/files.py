"""Writing files so that a reader never sees half of one."""

import os
from pathlib import Path
from uuid import uuid4


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes an output folder, or raises OSError before any work is done."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir ({folder}) must be a folder that can be written to")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Replace `path` in one step; the folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
