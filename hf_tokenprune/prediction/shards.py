"""The folder of a run: `part-000012.parquet` for the rows 12 n to 13 n - 1 of those that are asked for, `run.json` with
what was asked for, and a `README.md` that tells `datasets` which of the files are the data.

A shard appears whole, by one rename, or not at all; so what is there is done. Each tells in its metadata where in the
data it came from, how many tokens it had and how long it took.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_atomically
from .arguments import PredictionError, one_line


_METADATA = b"hf_tokenprune"
_PATTERN = "part-*.parquet"
# Without it, datasets takes the folder for the kind that most of its files are: with one shard, JSON.
_CARD = f"---\nconfigs:\n- config_name: default\n  data_files: {_PATTERN}\n---\n"


@dataclass(frozen=True)
class ShardInfo:
    """What a shard knows about itself.

    Args:
        rows, tokens, seconds: how much it was, and how long it took its process.
        digest: of the rows that went in.
        position: of the stream of rows before it.
        datasets: the release whose position it is.
    """

    rows: int
    tokens: int
    seconds: float
    digest: str
    position: dict
    datasets: str = datasets.__version__

    @property
    def usable_position(self) -> bool:
        return self.datasets == datasets.__version__


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"


def write_shard(folder: Path, number: int, table: pa.Table, info: ShardInfo) -> None:
    """Writes a shard in one step."""
    metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(asdict(info)).encode()}
    write_atomically(shard_path(folder, number), _parquet(table.replace_schema_metadata(metadata)))


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """The types that come back from a file: Parquet has not all of Arrow's, such as times in seconds."""
    return pq.read_schema(pa.BufferReader(_parquet(schema.empty_table())))


def read_shards(folder: Path, schema: pa.Schema, size: int, first: int = 0) -> tuple[dict[int, ShardInfo], list[str]]:
    """The shards that are whole, by number; and a sentence for each that is not and has to be computed again.

    Args:
        first: the place in the data of the run's first row.
    """
    shards, complaints = {}, []
    for path in sorted(folder.glob(_PATTERN)):
        try:
            number = int(path.stem.removeprefix("part-"))
            shards[number] = _read_shard(path, number, schema, size, first)
        except (OSError, KeyError, TypeError, ValueError) as error:
            complaints.append(f"{path.name} is computed again: {one_line(error)}")
    return shards, complaints


def _read_shard(path: Path, number: int, schema: pa.Schema, size: int, first: int) -> ShardInfo:
    file = pq.ParquetFile(path)
    if not file.schema_arrow.equals(schema):
        raise ValueError(f"its columns ({file.schema_arrow.names}) must be {schema.names}, with the same types")
    info = ShardInfo(**json.loads(file.schema_arrow.metadata[_METADATA]))
    rows = file.read(columns=["row"])["row"].to_numpy()
    first += number * size
    if len(rows) != info.rows or len(rows) > size or not np.array_equal(rows, first + np.arange(len(rows))):
        raise ValueError(f"its rows must be {first} onwards, at most {size}")
    return info


def check_complete(shards: Mapping[int, ShardInfo], total: int, size: int) -> None:
    """Every row once.

    Raises:
        PredictionError: naming the first shard that is missing, too many, or too short.
    """
    for number in range(max(-(-total // size), len(shards))):
        expected = min(size, total - number * size)
        found = shards[number].rows if number in shards else 0
        if found != max(expected, 0):
            raise PredictionError(f"shard {number} has {found} rows; of {total} rows it must have {max(expected, 0)}")


def start_run(folder: Path, asked: dict[str, Any]) -> bool:
    """Writes `run.json`, or finds the one that is there. Whether there was one.

    Raises:
        ValueError: naming the first difference to the run that is there.
    """
    path = folder / "run.json"
    for remains in folder.glob(f".{_PATTERN}.*.tmp"):  # of a process that was killed while it wrote
        remains.unlink(missing_ok=True)
    if not path.exists():
        if next(folder.glob(_PATTERN), None) is not None:
            raise ValueError(f"output_dir ({folder}) has shards but no run.json; take another output_dir")
        write_atomically(path, json.dumps(asked, indent=2).encode())
        _write_card(folder)
        return False
    found, asked = json.loads(path.read_text()), json.loads(json.dumps(asked))
    for name in [*asked, *found]:
        if found.get(name) != asked.get(name):
            raise ValueError(
                f"output_dir ({folder}) holds a run with {name} {json.dumps(found.get(name))}, now "
                f"{json.dumps(asked.get(name))} is asked for: go on with the same, or take another output_dir"
            )
    _write_card(folder)
    return True


def _write_card(folder: Path) -> None:
    """Writes `README.md`, unless there is one: its user may have described the data in it."""
    card = folder / "README.md"
    if not card.exists():
        write_atomically(card, _CARD.encode())


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2).encode())
