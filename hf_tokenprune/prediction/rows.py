"""The rows that go in: any data set as a stream of Arrow tables of a fixed number of rows.

A table's place in the stream depends on the data and on `rows_per_shard` alone. With each comes the position of the
stream before it, from which it can be read again without what goes before.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .. import packaged
from ..data import check_column
from ..file_kinds import FILE_KINDS, check_folder, check_one_kind, is_saved, one_kind
from .arguments import PredictionArguments, PredictionError, one_line


_UNTYPED = datasets.Value("null")
_TEXT = datasets.Value("string")
_PARQUET_BLOCK = 1000
_SPLIT = re.compile(r"(?P<name>\w+(\.\w+)*)(\[(?P<first>\d*):(?P<end>\d*)\])?")


@dataclass(frozen=True)
class Rows:
    """A stream of the columns that are needed.

    Args:
        stream: it; of CSV, whole numbers and truth values come as text.
        features: of these columns in the tables.
        column: the one that the model reads.
        count: how many rows there are, None if only the end will tell.
        first: the place of the first in the data, where only a part of a split is asked for.
    """

    stream: datasets.IterableDataset
    features: datasets.Features
    column: str
    count: int | None
    first: int = 0

    @property
    def images(self) -> bool:
        return isinstance(self.features[self.column], datasets.Image)

    def tables(self, size: int, position: dict | None = None) -> Iterator[tuple[pa.Table, dict]]:
        """Tables of `size` rows (the last may be shorter), each with the position before it.

        Raises:
            PredictionError: the data cannot be read.
        """
        stream = self.stream.with_format("arrow")
        if position is not None:
            stream.load_state_dict(position)
        before, tables = stream.state_dict(), stream.iter(batch_size=size)
        while (table := _next_table(tables)) is not None:
            yield self._typed(table), before
            before = stream.state_dict()

    def _typed(self, table: pa.Table) -> pa.Table:
        for index, name in enumerate(table.column_names):
            if self.stream.features is None or self.stream.features[name] == self.features[name]:
                continue
            # pandas, which found the type, takes blanks and a plus.
            text = pc.replace_substring_regex(pc.utf8_trim_whitespace(table[name]), r"^\+", "")
            field = self.features.arrow_schema.field(name)
            try:
                table = table.set_column(index, field, text.cast(field.type))
            except pa.ArrowInvalid as error:
                raise PredictionError(
                    f"column {name!r} must be {field.type} in every row, as in the first ones: {one_line(error)}. "
                    "Leave it out, or write Parquet, where a column has one type"
                ) from error
        return table


def _next_table(tables: Iterator[pa.Table]) -> pa.Table | None:
    try:
        return next(tables, None)
    except Exception as error:  # a builder for each kind of data, each with errors of its own
        raise PredictionError(f"the data cannot be read on: {type(error).__name__}: {one_line(error)}") from error


def _first_row(stream: datasets.IterableDataset) -> pa.Table | None:
    return _next_table(stream.with_format("arrow").iter(batch_size=1))


def open_rows(arguments: PredictionArguments) -> Rows:
    """The data as asked for. Only its first rows are read.

    Raises:
        ValueError: no rows, a column that is not there or holds neither text nor images.
        OSError: no such data set.
    """
    split, part = _part(arguments.split)
    stream, known, count = _open(arguments, split)
    if part.start:
        stream = stream.skip(part.start)
    if part.stop is not None:
        stream = stream.take(max(0, part.stop - part.start))
    count = None if count is None else len(range(count)[part])
    if arguments.max_rows is not None:
        stream = stream.take(arguments.max_rows)
        count = None if count is None else min(count, arguments.max_rows)
    first = _first_row(stream)
    if first is None:
        raise ValueError(_no_rows(arguments))
    column = arguments.image_column or arguments.text_column
    wanted = list(dict.fromkeys([column, *copied_columns(arguments)]))
    for wish in wanted:
        if wish not in first.column_names:
            raise ValueError(f"column {wish!r} is not in {_name(arguments)}; it has {first.column_names}")
    known = known or datasets.Features.from_arrow_schema(first.schema)
    features = datasets.Features({wish: known[wish] for wish in wanted})
    check_column(column, features[column], images=arguments.image_column is not None)
    return Rows(stream.select_columns(wanted), features, column, count, part.start)


def _part(text: str) -> tuple[str, slice]:
    """A split's name, and which of its rows.

    Raises:
        ValueError: a part that a stream, which does not know its end, cannot give.
    """
    read = _SPLIT.fullmatch(text)
    if read is None:
        raise ValueError(f"split ({text!r}) must be a split's name, or rows of it by number as in 'train[10:20]'")
    return read["name"], slice(int(read["first"] or 0), int(read["end"]) if read["end"] else None)


def copied_columns(arguments: PredictionArguments) -> list[str]:
    """The columns of the data that go to the output, in their order there."""
    wishes = [arguments.id_column, *(arguments.keep_columns or [])]
    return list(dict.fromkeys(name for name in wishes if name is not None))


def digest(table: pa.Table) -> str:
    """Of the values alone: the same however Arrow holds them."""
    hasher = hashlib.sha256()
    for name in sorted(table.column_names):
        for value in table[name].to_pylist():
            hasher.update(repr(value).encode("utf-8", "surrogatepass") + b"\n")
    return hasher.hexdigest()


def check_values(values: list[Any], column: str, start: int) -> None:
    """Types are told by the column; this is about rows without a value.

    Raises:
        PredictionError: naming the first such row, counted from the beginning of the data.
    """
    for row, value in enumerate(values, start):
        if value is None:
            raise PredictionError(
                f"row {row}: {column} (None) must have a value; an empty text is one, but CSV tells neither it nor NA "
                "from no value: write JSON lines or Parquet"
            )


def _open(
    arguments: PredictionArguments, split: str
) -> tuple[datasets.IterableDataset, datasets.Features | None, int | None]:
    """The stream of all columns, their features, and how many rows it has; the last two None if they are not known."""
    name = arguments.dataset_name
    if name in packaged.available_datasets():
        return _one_split(packaged.load_dataset(name), name, split)
    if name is not None and is_saved(name):
        return _one_split(datasets.load_from_disk(name), name, split)
    files = arguments.data_files
    if name is None or Path(name).is_file():
        files = files or [name]
        name = one_kind(files)
    elif files:
        known = name if name in FILE_KINDS.values() else None
        check_one_kind(files, known, name if known is None and Path(name).is_dir() else "")
    elif Path(name).is_dir():
        check_folder(name)
    wish = {
        # One kind of local files, whatever they are called, is the split that was asked for.
        "data_files": {split: files} if files and name in FILE_KINDS.values() else files,
        "revision": arguments.dataset_revision,
    }
    try:
        stream, kind = _stream(name, arguments.dataset_config, split, wish)
    except StopIteration:  # of the first file's first block
        raise ValueError(_no_rows(arguments)) from None
    features = stream.features
    if features is None and kind == "csv" and (first := _first_row(stream)) is not None:
        features = datasets.Features.from_arrow_schema(first.schema)
    if features and (kind == "csv" or _UNTYPED in features.values()):
        # A column without any value in the first block; later ones may have text there.
        features = {key: _TEXT if feature == _UNTYPED else feature for key, feature in features.items()}
        features = datasets.Features(features)
        read = {key: _TEXT if kind == "csv" and _whole(feature) else feature for key, feature in features.items()}
        stream, _ = _stream(name, arguments.dataset_config, split, wish | {"features": datasets.Features(read)})
    known = (stream.info.splits or {}).get(split)
    return stream, features, known and known.num_examples


def _stream(name: str, config: str | None, split: str, wish: dict) -> tuple[datasets.IterableDataset, str]:
    """A data set's rows, and the kind of its files."""
    builder = datasets.load_dataset_builder(name, config, **wish)
    if builder.name == "parquet":
        # By default a block is as long as the first group of rows, which in an empty file is no length for one.
        builder.config.batch_size = _PARQUET_BLOCK
    return builder.as_streaming_dataset(split=split), builder.name


def _whole(feature: Any) -> bool:
    """Whether pandas gives it another type in a block with a missing value: float, which rounds what is large."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("bool", "int", "uint"))


def _one_split(data: Any, name: str, split: str) -> tuple[datasets.IterableDataset, datasets.Features, int]:
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{name} has no split {split!r}; it has {sorted(data)}")
        data = data[split]
    return data.with_format(None).to_iterable_dataset(), data.features, len(data)


def _name(arguments: PredictionArguments) -> str:
    return arguments.dataset_name or arguments.data_files[0]


def _no_rows(arguments: PredictionArguments) -> str:
    return f"{_name(arguments)}, split {arguments.split!r}, has no rows at its beginning; it must have at least one"
