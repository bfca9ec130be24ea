"""The run: every process reads the stream of rows and computes the shards that fall to it.

The shards that are missing go to the processes in turn, so that a run can go on with another number of processes.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from tqdm.auto import tqdm

from ..files import check_writable
from ..packaged import PackagedFileError
from ..profiling.machine import describe_machine
from .arguments import DECISIVE, PredictionArguments, PredictionError, one_line
from .inputs import Encoded
from .predictor import Predictor, describe_model, load_predictor
from .rows import Rows, check_values, copied_columns, digest, open_rows
from .shards import (
    ShardInfo,
    check_complete,
    read_shards,
    start_run,
    stored_schema,
    write_shard,
    write_summary,
)


# The processes wait for the slowest at the end; the usual half hour would not do.
_PATIENCE = timedelta(days=30)
# While the run is set up nearly every error is about what was asked for. Later, others are faults, with a traceback.
_SETUP_ERRORS = (
    PredictionError,
    PackagedFileError,
    OSError,
    TypeError,
    ValueError,
    KeyError,
    ImportError,
    datasets.exceptions.DatasetsError,
)
_ERRORS = (PredictionError, OSError, pa.ArrowException, datasets.exceptions.DatasetsError)


@dataclass(frozen=True)
class Task:
    """A shard to be computed.

    table: its rows. encoded: the same for the model. position: of the stream before it. passed: rows just before it
    that others compute.
    """

    number: int
    table: pa.Table
    encoded: Encoded
    position: dict
    passed: int


@dataclass(frozen=True)
class Job:
    """All that a process needs to compute shards. copied: name in the data -> name in the output."""

    arguments: PredictionArguments
    folder: Path
    rows: Rows
    predictor: Predictor
    copied: dict[str, str]
    schema: pa.Schema
    state: PartialState


def predict_dataset(arguments: PredictionArguments) -> dict[str, Any]:
    """Computes what is missing in the output folder, together with the other processes of `accelerate launch`.

    Returns:
        The summary, which is also in `summary.json`.

    Raises:
        SystemExit: with one sentence, for whatever the user can mend.
    """
    state = PartialState(cpu=_on_cpu(), timeout=_PATIENCE)
    try:
        job = prepare(arguments, state)
        shards = find_shards(job)
    except _SETUP_ERRORS as error:
        raise SystemExit(f"{type(error).__name__}: {one_line(error)}") from error
    try:
        started = time.perf_counter()
        total, rows, tokens = compute(job, shards)
        state.wait_for_everyone()
        done = gather_object([(rows, tokens)])
        return _finish(job, total, done, time.perf_counter() - started)
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"out of memory with max_tokens_per_batch ({arguments.max_tokens_per_batch}): start again with less, the "
            "finished shards stay"
        ) from error
    except _ERRORS as error:
        raise SystemExit(f"{type(error).__name__}: {one_line(error)}") from error


def _on_cpu() -> bool:
    """Whether the processes talk as CPUs do; PartialState asks for no accelerator's library then."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def prepare(arguments: PredictionArguments, state: PartialState) -> Job:
    """Loads what was asked for, or raises before anything is computed."""
    folder = Path(arguments.output_dir)
    check_writable(folder)
    rows = open_rows(arguments)
    predictor = load_predictor(arguments, rows, state.device)
    results = {"row": datasets.Value("int64"), **predictor.features}
    copied = {name: f"input_{name}" if name in results else name for name in copied_columns(arguments)}
    features = {"row": results.pop("row"), **{new: rows.features[old] for old, new in copied.items()}, **results}
    schema = stored_schema(datasets.Features(features).arrow_schema)
    if len(features) != 1 + len(copied) + len(results):
        raise ValueError(f"the columns of the output ({[*copied.values(), *results]}) must have different names")
    return Job(arguments, folder, rows, predictor, copied, schema, state)


def find_shards(job: Job) -> dict[int, ShardInfo]:
    """The shards that need not be computed; one process looks, so that all see the same."""
    answer = [None]
    if job.state.is_main_process:
        try:
            answer = [_look(job)]
        except _SETUP_ERRORS as error:
            answer = [error]
    (found,) = broadcast_object_list(answer)
    if isinstance(found, Exception):
        raise found
    return found


def _look(job: Job) -> dict[int, ShardInfo]:
    asked = {name: getattr(job.arguments, name) for name in DECISIVE}
    asked |= describe_model(job.predictor, job.arguments)
    resumed = start_run(job.folder, asked)
    shards, complaints = read_shards(job.folder, job.schema, job.arguments.rows_per_shard, job.rows.first)
    for complaint in complaints:
        print(complaint)
    if resumed:
        print(f"going on in {job.folder}: {len(shards)} shards are there")
    return shards


def compute(job: Job, shards: dict[int, ShardInfo]) -> tuple[int, int, int]:
    """Computes this process's part of the missing shards.

    Returns:
        How many rows the data has; how many rows and tokens were computed here.
    """
    there = sum(info.rows for info in shards.values())
    rows, tokens, total, started = 0, 0, 0, time.perf_counter()
    bar = tqdm(total=job.rows.count, initial=there, unit=" rows", disable=not job.state.is_main_process)

    def progress(more_rows: int, more_tokens: int) -> None:
        nonlocal rows, tokens
        rows, tokens = rows + more_rows, tokens + more_tokens
        rate = tokens * job.state.num_processes / (time.perf_counter() - started)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update(more_rows)

    with bar:
        for task in ahead(tasks(job, shards)):
            if isinstance(task, int):
                total = task
                break
            bar.update(task.passed)
            begun = time.perf_counter()
            table = _compute_shard(job, task, progress)
            info = ShardInfo(
                rows=len(table),
                tokens=sum(task.encoded.lengths),
                seconds=time.perf_counter() - begun,
                digest=digest(task.table),
                position=task.position,
            )
            write_shard(job.folder, task.number, table, info)
        bar.update(max(0, total - bar.n))
    return total, rows, tokens


def _compute_shard(job: Job, task: Task, progress: Any) -> pa.Table:
    start = _first_row(job, task.number)
    columns = {"row": pa.array(range(start, start + len(task.table)), pa.int64())}
    columns |= {new: task.table[old] for old, new in job.copied.items()}
    columns |= job.predictor(
        task.encoded, job.arguments.max_tokens_per_batch, job.arguments.max_rows_per_batch, progress
    )
    return pa.table(columns).cast(job.schema)


def _first_row(job: Job, number: int) -> int:
    """The place in the data of a shard's first row."""
    return job.rows.first + number * job.arguments.rows_per_shard


def tasks(job: Job, shards: dict[int, ShardInfo]) -> Iterator[Task | int]:
    """The shards that fall to this process, ready for the model; then the number of rows of the data."""
    size, missing, passed, total = job.arguments.rows_per_shard, 0, 0, 0
    for number, table, position in _tables(job, shards):
        total = number * size + len(table)
        if number in shards:
            continue
        missing += 1
        if (missing - 1) % job.state.num_processes != job.state.process_index:
            passed += len(table)
            continue
        values, first = table[job.rows.column].to_pylist(), _first_row(job, number)
        check_values(values, job.rows.column, first)
        yield Task(number, table, job.predictor.encode(values, first), position, passed)
        passed = 0
    yield total


def _tables(job: Job, shards: dict[int, ShardInfo]) -> Iterator[tuple[int, pa.Table, dict]]:
    """The tables with their numbers, from the last one before which nothing is missing, or from the first.

    Raises:
        PredictionError: the data is not what a finished shard was computed from.
    """
    size = job.arguments.rows_per_shard
    last = next(number for number in range(len(shards) + 1) if number not in shards) - 1
    start, position = 0, None
    if last > 0 and shards[last].usable_position:
        found = next(job.rows.tables(size, shards[last].position), None)
        if found is not None and digest(found[0]) == shards[last].digest:
            start, position = last, shards[last].position
    for number, (table, before) in enumerate(job.rows.tables(size, position), start):
        if number in shards and digest(table) != shards[number].digest:
            raise PredictionError(
                f"the rows from {_first_row(job, number)} on have changed since shard {number} was computed: take "
                "another output_dir"
            )
        yield number, table, before


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, the next one made in a thread while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _finish(job: Job, total: int, done: list[tuple[int, int]], seconds: float) -> dict[str, Any]:
    """Checks on the main process that every row is there once, and writes the summary."""
    size, summary = job.arguments.rows_per_shard, [None]
    if job.state.is_main_process:
        shards, _ = read_shards(job.folder, job.schema, size, job.rows.first)
        check_complete(shards, total, size)
        infos = shards.values()
        rows, tokens = (sum(part) for part in zip(*done))
        summary = [
            {
                "rows": total,
                "tokens": sum(info.tokens for info in infos),
                "shards": len(shards),
                "process_seconds": sum(info.seconds for info in infos),
                "this_run": {
                    "processes": job.state.num_processes,
                    "rows": rows,
                    "tokens": tokens,
                    "seconds": seconds,
                    "rows_per_second": rows / seconds,
                    "tokens_per_second": tokens / seconds,
                },
                "arguments": asdict(job.arguments),
                "run": json.loads((job.folder / "run.json").read_text()),
                "machine": describe_machine(job.state.device) | {"datasets": datasets.__version__},
            }
        ]
        write_summary(job.folder, summary[0])
    return broadcast_object_list(summary)[0]
