"""What a profile measures, one thing after the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints import problem_of
from ..convert import prune
from ..labels import CLASSES
from ..metrics import JUDGEMENTS, TITLES, answers
from ..modeling.token_outputs import EncoderCall
from .arguments import ProfileArguments
from .baselines import time_against_baselines
from .energy import measure_energy
from .figures import Figure, batch_times, mean_of_inputs, median_of, quartiles, score_of_inputs, share_of_inputs, times
from .latency import FEWEST, Timing, time_interleaved
from .linear_macs import linear_macs
from .machine import describe_machine, machine_line
from .macs import MacCount, count_call
from .memory import peak_memory, peak_resident
from .operators import FlopCounts, count_flops, profile_operators
from .report import ALLOCATED, LAYER_TIME, LAYER_TOKENS, CurvePoint, Report, verdict
from .subject import Batch, Subject


COUNTED = 8  # inputs whose FLOPs are counted, at most: each is run alone
READINGS = 3  # of memory
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
        kind = {"dtype": arguments.dtype, "attention": arguments.attn_implementation}
        self.where = describe_machine(subject.device) | kind

    def run(self, notes: list[str]) -> Report:
        layer_seconds = self.operators()
        macs, tokens, left = self.work()
        flops, flop_notes = self.flops()
        memory = self.memory()
        timings = self.latency()
        by_batch_size, size_notes = self.latency_by_batch_size()
        energy, energy_notes = self.energy()
        main = by_batch_size[self.size]
        return Report(
            subject={
                "model": self.subject.name,
                "pruning": self.models["pruned"].config.pruning.to_dict(),
                "inputs": len(self.subject.inputs),
                "batch_size": self.size,
                "arguments": vars(self.arguments),
            },
            where=self.where,
            measured=[
                *macs,
                *times(timings, len(self.subject.inputs)),
                *batch_times(self.size, main),
                *memory,
                *flops,
                *energy,
            ],
            by_layer=[*layer_seconds, *tokens],
            by_batch_size=by_batch_size,
            curve=self.curve(),
            verdict=verdict(timings, by_batch_size, left, self.size, str(self.where["device"])),
            notes=[
                *notes,
                *self._judged(),
                *_of_the_cpu(self.subject.device),
                *self._too_large(),
                *size_notes,
                *_too_few(timings),
                *_few(main),
                *flop_notes,
                *energy_notes,
            ],
        )

    def _judged(self) -> list[str]:
        """By what, where it is no accuracy; or why by nothing."""
        problem = problem_of(self.models["pruned"].config)
        title = TITLES[JUDGEMENTS[problem].names[0]]
        if self.subject.unlabelled:
            return [f"No {title}: {self.subject.unlabelled}."]
        if self.subject.labels is None or problem == CLASSES:
            return []
        return [f"Labels are of a {problem}: the curve is of {title}."]

    def _too_large(self) -> list[str]:
        """Sizes of batches that there are too few inputs for, in words."""
        inputs, notes = len(self.subject.inputs), []
        if self.arguments.batch_size > inputs:
            notes.append(f"Too few inputs ({inputs}) for batches of {self.arguments.batch_size}: they are of {inputs}.")
        larger = sorted({size for size in self.arguments.batch_sizes if size > inputs})
        if larger:
            listed = " and ".join(map(str, larger))
            notes.append(f"Too few inputs ({inputs}) for latency over batch size at {listed}.")
        return notes

    def operators(self) -> list[Figure]:
        """Tables and traces of one batch, and the time inside each layer."""
        figures = []
        for name, model in self.models.items():
            done = profile_operators(model, self.batch, self.accelerator, self.folder / "traces" / name)
            head = f"{self.subject.name}, {name}, a batch of {self.size}. {machine_line(self.where)}"
            (self.folder / f"profiling_{name}.txt").write_text(f"{head}\n\n{done.table}")
            figures.append(median_of(LAYER_TIME, name, done.layer_seconds, "seconds", "calls under the profiler"))
        return figures

    def work(self) -> tuple[list[Figure], list[Figure], float]:
        """What an input costs, the tokens of an input that leave each layer, and the share of the cost that is left."""
        counts, tokens = {}, []
        for name in ("unpadded", "pruned"):
            counts[name], leaving = self._work(self.models[name])
            tokens.append(mean_of_inputs(LAYER_TOKENS, name, leaving, "tokens"))
        stock = [macs for count in counts["unpadded"] for macs in count.unpruned_per_sample]
        ours = {name: [macs for count in each for macs in count.per_sample] for name, each in counts.items()}
        models = {"stock": stock} | ours
        macs = [mean_of_inputs("MACs of an input", name, each, "MACs") for name, each in models.items()]
        left = sum(ours["pruned"]) / sum(ours["unpadded"])
        ratios = quartiles([after / before for after, before in zip(ours["pruned"], ours["unpadded"])])
        n = len(stock)
        share = Figure("MACs left of all inputs", "pruned over unpadded", left, "ratio", n, "inputs", ratios)
        return [*macs, share], tokens, left

    @torch.inference_mode()
    def _work(self, model: PreTrainedModel) -> tuple[list[MacCount], list[list[float]]]:
        """What each batch costs, and for each input the tokens that leave each layer."""
        counts, tokens, linear = [], [], linear_macs(model)
        for batch in self.subject.batches(self.size):
            call = EncoderCall(work=True, linear_macs=linear)
            model(**batch, encoder_call=call)
            counts.append(count_call(call, model.config))
            tokens += torch.stack([work.feed_forward for work in call.layer_work], dim=1).tolist()
        return counts, tokens

    def flops(self) -> tuple[list[Figure], list[str]]:
        """Three ways, of some inputs, each alone; and of the first batch, as it is run."""
        figures, notes = [], []
        for name, model in self.models.items():
            counts = [count_flops(model, self.subject.batch([row])) for row in range(min(COUNTED, self.size))]
            for way in ("formula", "counter", "profiler"):
                values = [getattr(count, way) for count in counts]
                figures.append(mean_of_inputs(f"FLOPs of an input by {way}", name, values, "FLOPs"))
            apart = max(map(_apart, counts))
            if apart > 0.01:
                notes.append(
                    f"The three counts of the {name} model's FLOPs of an input lie up to {100 * apart:.0f} % apart."
                )
            batch = count_flops(model, self.batch)
            figures.append(Figure("FLOPs of the first batch by counter", name, batch.counter, "FLOPs", 1, "batch"))
            if batch.counter > 1.01 * batch.formula:
                masked = name == "pruned" and model.config.pruning.execution == "masked"
                what = "padding, or pruned tokens that masked execution computes" if masked else "padding"
                share = 100 * (1 - batch.formula / batch.counter)
                notes.append(f"{share:.0f} % of the {name} model's FLOPs of the first batch by counter are {what}.")
        return figures, notes

    def memory(self) -> list[Figure]:
        figures = []
        for name, model in self.models.items():

            @torch.inference_mode()
            def call(model: PreTrainedModel = model) -> None:
                model(**self.batch)

            call()
            figures += [
                median_of(what, name, values, "bytes", "readings") for what, values in self._memory(call).items()
            ]
        return figures

    def _memory(self, call: Callable[[], None]) -> dict[str, list[int]]:
        """Bytes of each reading, by what was read."""
        device = self.subject.device
        if device.type == "cpu":
            allocated = [peak_memory(call) for _ in range(READINGS)]
            resident = [peak_resident(call) for _ in range(READINGS)]
            return {
                ALLOCATED: allocated,
                "growth of resident memory in the first batch": [reading.growth for reading in resident],
                "peak resident memory of the process": [reading.peak for reading in resident],
            }
        readings = [(peak_memory(call, device), torch.accelerator.max_memory_reserved(device)) for _ in range(READINGS)]
        allocated, reserved = map(list, zip(*readings))
        return {ALLOCATED: allocated, "peak memory reserved, weights included": reserved}

    def energy(self) -> tuple[list[Figure], list[str]]:
        """Of an input of the first batch, where it is asked for."""
        if self.meters is None:
            return [], []
        calls = {name: self._finished(model) for name, model in self.models.items()}
        with torch.inference_mode():
            joules = measure_energy(self.meters, calls)
        if not joules:
            return [], ["Energy was not measured: zeus finds no meter on this machine."]
        figures = [
            median_of("energy of an input", name, [each / self.size for each in read], "joules", "rounds")
            for name, read in joules.items()
        ]
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
        calls = {"padded" if name == "baseline" else name: _call(model, batch) for name, model in self.models.items()}
        return time_interleaved(
            calls,
            rounds=self.arguments.batch_rounds,
            seconds=self.arguments.seconds,
            progress=lambda steps: tqdm(steps, desc=f"batches of {size}"),
            device=self.subject.device,
        )

    @torch.inference_mode()
    def curve(self) -> list[CurvePoint]:
        """Quality and MACs on the way from nothing pruned to all of the pruning, where there are labels."""
        if self.subject.labels is None:
            return []
        pruned = self.models["pruned"]
        pruning, longest = pruned.config.pruning, pruned.base_model.longest_input
        points = []
        for progress in CURVE:
            model = prune(pruned, replace(pruning, budgets=(), objective=None).eased(progress, longest)).eval()
            predicted, macs, linear = [], [], linear_macs(model)
            for batch in self.subject.batches(self.size):
                call = EncoderCall(work=True, linear_macs=linear)
                predicted.append(model(**batch, encoder_call=call).logits.float().cpu())
                macs += count_call(call, model.config).per_sample
            score = self._score(torch.cat(predicted).numpy())
            points.append(CurvePoint(progress, mean_of_inputs("MACs of an input", "pruned", macs, "MACs"), score))
        return points

    def _score(self, logits: np.ndarray) -> Figure:
        """Of the pruned model, by what answers of its kind are compared by."""
        problem, labels = problem_of(self.models["pruned"].config), np.array(self.subject.labels)
        given = answers(problem, logits)
        if problem == CLASSES:
            return share_of_inputs("accuracy", "pruned", int((given == labels).sum()), len(labels))
        name = JUDGEMENTS[problem].names[0]
        return score_of_inputs(name, "pruned", given, labels, JUDGEMENTS[problem](given, labels)[name])


def _of_the_cpu(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return []
    why = "CUDA was not asked for" if torch.cuda.is_available() else "No CUDA device"
    return [f"{why}: times and memory are of the {device.type.upper()}."]


def _call(model: PreTrainedModel, batch: Batch) -> Callable[[], object]:
    return lambda: model(**batch)


def _too_few(timings: dict[str, Timing]) -> list[str]:
    rounds = len(timings["pruned"].seconds)
    if rounds >= FEWEST:
        return []
    return [f"{rounds} rounds are too few for the bounds of the speed-ups, which are 0 here: they take {FEWEST}."]


def _few(timings: dict[str, Timing]) -> list[str]:
    rounds = len(timings["pruned"].seconds)
    return [f"p99 of {rounds} rounds is about the slowest of them: 100 were not reached."] if rounds < 100 else []


def _apart(counts: FlopCounts) -> float:
    """By how much the lowest count is below the highest."""
    values = vars(counts).values()
    return 1 - min(values) / max(values)
