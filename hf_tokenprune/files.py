"""Writing files so that a reader never sees half of one."""

import os
from pathlib import Path
from uuid import uuid4


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
