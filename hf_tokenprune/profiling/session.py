"""What a profile measures, one thing after the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..convert import prune
from ..modeling.token_outputs import EncoderCall
from .arguments import ProfileArguments
from .baselines import time_against_baselines
from .energy import measure_energy, typical
from .latency import Timing, time_interleaved
from .machine import describe_machine
from .macs import MacCount, count_call
from .memory import peak_memory, peak_resident
from .operators import FlopCounts, count_flops, profile_operators
from .report import Measured, Report, times, verdict
from .subject import Batch, Subject


MACS = "multiply-accumulates of an input"
CURVE = (0.0, 0.25, 0.5, 0.75, 1.0)  # how far on the way from nothing pruned to all of the pruning


class Session:
    """The measurements, in the order of `run`.

    Args:
        meters: as `open_meters` gives them; None: energy is not asked for.
    """

    def __init__(
        self,
        arguments: ProfileArguments,
        subject: Subject,
        accelerator: Accelerator,
        folder: Path,
        meters: Any | None = None,
    ):
        self.arguments, self.subject, self.accelerator, self.folder = arguments, subject, accelerator, folder
        self.meters = meters
        self.size = min(arguments.batch_size, len(subject.inputs))
        self.models = subject.models
        self.batch = subject.batch(list(range(self.size)))

    def run(self, notes: list[str]) -> Report:
        layer_seconds = self.operators()
        work = {name: self.work(self.models[name]) for name in ("unpadded", "pruned")}
        macs = {name: counts for name, (counts, _) in work.items()}
        flops, flop_notes = self.flops()
        memory = self.memory()
        timings = self.latency()
        by_batch_size, size_notes = self.latency_by_batch_size()
        energy, energy_notes = self.energy()
        left = _total(macs["pruned"]) / _total(macs["unpadded"])
        inputs = len(self.subject.inputs)
        measured = [
            Measured(MACS, "stock", _total(macs["unpadded"], "unpruned") / inputs, "", inputs),
            *(Measured(MACS, name, _total(each) / inputs, "", inputs) for name, each in macs.items()),
            Measured("multiply-accumulates left", "pruned over unpadded", left, "", inputs),
            *times(timings, inputs),
            *memory,
            *flops,
            *energy,
        ]
        device = describe_machine(self.subject.device)
        return Report(
            subject={
                "model": self.arguments.model_name_or_path,
                "pruning": self.models["pruned"].config.pruning.to_dict(),
                "inputs": inputs,
                "batch_size": self.size,
                "arguments": vars(self.arguments),
            },
            where=device | {"dtype": self.arguments.dtype, "attention": self.arguments.attn_implementation},
            measured=measured,
            layer_seconds=layer_seconds,
            alive={name: alive for name, (_, alive) in work.items()},
            by_batch_size=by_batch_size,
            curve=self.curve(),
            verdict=verdict(timings, by_batch_size, left, self.size, str(device["device"])),
            notes=[*notes, *_of_the_cpu(self.subject.device), *size_notes, *flop_notes, *energy_notes],
        )

    def operators(self) -> dict[str, list[float]]:
        """Tables and traces of one batch."""
        seconds = {}
        for name, model in self.models.items():
            done = profile_operators(model, self.batch, self.accelerator, self.folder / "traces" / name)
            (self.folder / f"profiling_{name}.txt").write_text(done.table)
            seconds[name] = done.layer_seconds
        return seconds

    @torch.inference_mode()
    def work(self, model: PreTrainedModel) -> tuple[list[MacCount], list[float]]:
        """What each batch costs, and the mean tokens of an input that leave each layer."""
        counts, tokens = [], torch.zeros(model.config.num_hidden_layers)
        for batch in self.subject.batches(self.size):
            call = EncoderCall(work=True)
            model(**batch, encoder_call=call)
            counts.append(count_call(call, model.config))
            tokens += torch.tensor([work.feed_forward.sum().item() for work in call.layer_work])
        return counts, (tokens / len(self.subject.inputs)).tolist()

    def flops(self) -> tuple[list[Measured], list[str]]:
        """Of the first batch, three ways."""
        figures, notes = [], []
        for name, model in self.models.items():
            counts = count_flops(model, self.batch)
            for way, value in vars(counts).items():
                figures.append(Measured(f"FLOPs of the first batch by {way}", name, value, ""))
            if not _agree(counts) and name == "baseline":
                notes.append("Counter and profiler have the stock model's padding in its FLOPs, the formula has not.")
            elif not _agree(counts):
                notes.append(f"The three counts of the {name} model's FLOPs differ by more than 1 %: {counts}.")
        return figures, notes

    def memory(self) -> list[Measured]:
        figures = []
        for name, model in self.models.items():

            @torch.inference_mode()
            def call(model: PreTrainedModel = model) -> None:
                model(**self.batch)

            call()
            peak = peak_memory(call, self.subject.device)
            figures.append(Measured("peak memory allocated by the first batch", name, peak / 2**20, "MiB"))
            if self.subject.device.type == "cpu":
                resident = peak_resident(call)
                figures.append(Measured("growth of resident memory in the first batch", name, resident / 2**20, "MiB"))
            else:
                reserved = torch.accelerator.max_memory_reserved(self.subject.device)
                figures.append(Measured("peak memory reserved", name, reserved / 2**20, "MiB"))
        return figures

    def energy(self) -> tuple[list[Measured], list[str]]:
        """Of an input of the first batch, where it is asked for."""
        if self.meters is None:
            return [], []
        calls = {name: self._finished(model) for name, model in self.models.items()}
        with torch.inference_mode():
            joules = measure_energy(self.meters, calls)
        if not joules:
            return [], ["Energy was not measured: zeus finds no meter on this machine."]
        inputs, figures = len(next(iter(self.batch.values()))), []
        for name, each in joules.items():
            middle, spread = typical(each)
            low, high = (value / inputs for value in spread)
            figures.append(Measured("energy of an input", name, middle / inputs, "J", len(each), (low, high)))
        return figures, []

    def _finished(self, model: PreTrainedModel) -> Callable[[], None]:
        """A call of the first batch that returns when the device is done."""

        def call() -> None:
            model(**self.batch)
            if self.subject.device.type != "cpu":
                torch.accelerator.synchronize(self.subject.device)

        return call

    def latency(self) -> dict[str, Timing]:
        arrival, by_length = (self.subject.batches(self.size, by_length=order) for order in (False, True))
        return time_against_baselines(
            self.models["baseline"],
            self.models["pruned"],
            arrival,
            by_length,
            rounds=self.arguments.rounds,
            seconds=self.arguments.seconds,
            progress=lambda steps: tqdm(steps, desc="rounds"),
        )

    def latency_by_batch_size(self) -> tuple[dict[int, dict[str, Timing]], list[str]]:
        """Of one batch of each size that there are inputs and memory for; and what there is no memory for, in words."""
        sizes = sorted(size for size in {*self.arguments.batch_sizes, self.size} if size <= len(self.subject.inputs))
        timings: dict[int, dict[str, Timing]] = {}
        for place, size in enumerate(sizes):
            try:
                timings[size] = self._latency_of_size(size)
            except RuntimeError as error:
                if size <= self.size or not should_reduce_batch_size(error):
                    raise
                left_out = sizes[place:]
                break
        else:
            return timings, []
        clear_device_cache(garbage_collection=True)  # out here, where the error no longer holds the tensors
        listed = " and ".join(map(str, left_out))
        return timings, [f"Out of memory in batches of {left_out[0]}: latency over batch size is without {listed}."]

    @torch.inference_mode()
    def _latency_of_size(self, size: int) -> dict[str, Timing]:
        batch = self.subject.batch(list(range(size)))
        calls = {name: _call(model, batch) for name, model in self.models.items()}
        calls["padded"] = calls.pop("baseline")
        return time_interleaved(
            calls,
            rounds=self.arguments.rounds,
            seconds=self.arguments.seconds,
            progress=lambda steps: tqdm(steps, desc=f"batches of {size}"),
            device=self.subject.device,
        )

    @torch.inference_mode()
    def curve(self) -> list[dict[str, float]]:
        """Accuracy and MACs on the way from nothing pruned to all of the pruning, where there are labels."""
        if self.subject.labels is None:
            return []
        pruned, labels = self.models["pruned"], torch.tensor(self.subject.labels)
        pruning, longest = pruned.config.pruning, pruned.base_model.longest_input
        points = []
        for progress in CURVE:
            model = prune(pruned, replace(pruning, budgets=(), objective=None).eased(progress, longest)).eval()
            predicted, macs = [], 0
            for batch in self.subject.batches(self.size):
                call = EncoderCall(work=True)
                predicted.append(model(**batch, encoder_call=call).logits.argmax(dim=-1).cpu())
                macs += count_call(call, model.config).total
            right = (torch.cat(predicted) == labels).float().mean().item()
            points.append({"progress": progress, "macs": macs / len(labels), "accuracy": right, "n": len(labels)})
        return points


def _of_the_cpu(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return []
    why = "CUDA was not asked for" if torch.cuda.is_available() else "No CUDA device"
    return [f"{why}: times and memory are of the {device.type.upper()}."]


def _call(model: PreTrainedModel, batch: Batch) -> Callable[[], object]:
    return lambda: model(**batch)


def _total(counts: list[MacCount], which: str = "total") -> int:
    return sum(getattr(count, which) for count in counts)


def _agree(counts: FlopCounts) -> bool:
    values = list(vars(counts).values())
    return max(values) <= 1.01 * min(values)
