"""The job of `run_profile.py`: what a model costs here as it is and pruned, in one folder."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from .arguments import ProfileArguments
from .energy import open_meters
from .report import Report
from .session import Session
from .subject import load_subject


PICTURES = (
    *("time_per_layer.png", "tokens_per_layer.png", "memory.png", "latency_over_batch_size.png"),
    "accuracy_over_macs.png",
)


def run_profile(arguments: ProfileArguments, draw: Callable[[Report, Path], object]) -> Report | None:
    """Profiles the stock model, our engine with nothing pruned and the pruned model, and writes all into a folder.

    The folder gets its files when all of them are there. Of several processes the main one does all, and the others
    get None when it is done.

    Args:
        draw: makes pictures of the report in a folder.

    Raises:
        ImportError: energy is asked for and zeus is missing.
        OSError, TypeError, ValueError: as `load_subject` has them; a device that is not there.
        RuntimeError: out of memory with one input.
    """
    accelerator = accelerator_on(arguments.device)
    with _others_asleep(accelerator):
        return _profile(arguments, draw, accelerator) if accelerator.is_main_process else None


def _profile(arguments: ProfileArguments, draw: Callable[[Report, Path], object], accelerator: Accelerator) -> Report:
    meters = open_meters() if arguments.energy else None
    subject = load_subject(arguments, accelerator.device)
    processes, tried = accelerator.num_processes, []
    notes = [f"Measured by the first of {processes} processes, while the others waited."] if processes > 1 else []

    def halve() -> int:
        return tried[-1] // 2

    @find_executable_batch_size(starting_batch_size=arguments.batch_size, reduce_batch_size_fn=halve)
    def measure(size: int) -> Report:
        tried.append(size)
        halved = [f"Out of memory in batches of {tried[0]}: halved to {size}."] if tried[1:] else []
        with _whole_folder(Path(arguments.output_dir)) as folder:
            session = Session(replace(arguments, batch_size=size), subject, accelerator, folder, meters)
            report = session.run([*notes, *halved])
            draw(report, folder)
            (folder / "report.md").write_text(report.to_markdown())
            (folder / "report.json").write_text(report.to_json())
        return report

    return measure()


def accelerator_on(device: str | None) -> Accelerator:
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device ({device!r}) must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device ('cuda') must be there, and torch finds no CUDA device here")
    return Accelerator(cpu=device == "cpu")


@contextmanager
def _others_asleep(accelerator: Accelerator) -> Iterator[None]:
    """The other processes wait here until the main one leaves, however long it takes.

    By gloo, which sleeps meanwhile: a barrier of nccl keeps a processor and a device busy, and gives up.
    """
    if accelerator.num_processes == 1:
        yield
        return
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        torch.distributed.barrier(group)


@contextmanager
def _whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, whose files go to `final` at the end, or nowhere; pictures of before go from there."""
    final = final.resolve()
    final.mkdir(parents=True, exist_ok=True)  # or an error, before anything is measured
    partial = final.with_name(f".{final.name}.{uuid4().hex}.partial")
    partial.mkdir()
    try:
        yield partial
        for name in PICTURES:
            if not (partial / name).exists():
                (final / name).unlink(missing_ok=True)
        for path in sorted(partial.rglob("*"), key=lambda path: path.name == "report.json"):  # the report comes last
            target = final / path.relative_to(partial)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
