"""Which of the readers of `datasets` a local file is for; and that files which are read together are of one kind."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DataFilesNotFoundError
from datasets.load import infer_module_for_data_files
from huggingface_hub import DatasetCard


FILE_KINDS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
BESIDE_IMAGES = "metadata"  # a table of this name says more of the images in a folder


def file_kind(file: str | Path) -> str:
    """The builder of `datasets` that reads a file, packed or not.

    Raises:
        ValueError: another ending.
    """
    kind = _known_kind(file)
    if kind is None:
        raise ValueError(f"{file}: its ending must be one of {', '.join(FILE_KINDS)}")
    return kind


def one_kind(patterns: Iterable[str]) -> str:
    """The kind of files, or of those that patterns match.

    Raises:
        ValueError: another ending, or files of two kinds.
    """
    files = _matched(patterns)
    check_one_kind(files)
    return file_kind(files[0])


def check_one_kind(patterns: Iterable[str], asked: str | None = None, where: str | Path = "") -> None:
    """Raises a ValueError that names a file of another kind: it would be left out, or end the reading halfway.

    Args:
        asked: what all must be, or end in .txt; None: what the first is whose ending tells.
        where: a folder that the patterns are relative to.
    """
    kind, first = asked, None
    for file in _matched(patterns, where):
        own = _known_kind(file)
        if own is None or (asked and own == "text"):
            continue
        kind, first = kind or own, first or file
        if own != kind:
            like = f"{kind}, as it was asked for" if asked else f"{kind}, as {first} is"
            raise ValueError(f"{file} ({own}) must be {like}: files that are read together are of one kind")


def is_saved(folder: str | Path) -> bool:
    """Whether `save_to_disk` wrote it, which `load_from_disk` alone reads."""
    return any((Path(folder) / file).is_file() for file in ("state.json", "dataset_dict.json"))


def check_folder(folder: str | Path) -> None:
    """Raises a ValueError where `datasets` would read tables of a local folder and leave out those of another kind.

    One whose README says which files are read is as that has it; tables beside pictures are not read at all.
    """
    names = (name for _, _, files in os.walk(folder) for name in files)
    if len({_known_kind(name) for name in names if _is_table(name)}) < 2:  # what takes long need not be asked
        return
    readme = Path(folder) / "README.md"
    if readme.is_file() and DatasetCard.load(readme, ignore_metadata_errors=True).data.get("configs"):
        return
    try:
        base = str(Path(folder).resolve())
        splits = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        read, _ = infer_module_for_data_files(splits, base)
    except (EmptyDatasetError, DataFilesNotFoundError):  # the reader says so in its own words
        return
    except ValueError:  # another kind in each split
        read = None
    if read is not None and read not in FILE_KINDS.values():
        return
    check_one_kind(sorted({file for files in splits.values() for file in files if _is_table(file)}))


def _is_table(file: str) -> bool:
    """Texts are not: notes lie beside tables."""
    return _known_kind(file) not in (None, "text") and Path(file).name.partition(".")[0] != BESIDE_IMAGES


def _known_kind(file: str | Path) -> str | None:
    for suffix in reversed(Path(file).suffixes):  # data.json.gz
        if suffix.lower() in FILE_KINDS:
            return FILE_KINDS[suffix.lower()]
    return None


def _matched(patterns: Iterable[str], where: str | Path = "") -> list[str]:
    """The files that patterns match here; those of elsewhere, and names that nothing matches, as they are."""
    found = []
    for pattern in patterns:
        files = sorted(glob.glob(os.path.join(glob.escape(str(where)), pattern), recursive=True))
        found += [file for file in files if os.path.isfile(file)] or [pattern]
    return found
