"""What a profile says: every figure with its unit, count and spread, and a verdict in words."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .figures import SHOWN, Figure, Value, batch_times
from .latency import FEWEST, Timing, speedup, speedup_bound
from .machine import machine_line


# Figures that pictures look for.
LAYER_TIME = "time inside each layer"
LAYER_TOKENS = "tokens that leave each layer"
ALLOCATED = "peak memory allocated by the first batch"

WORTH_IT = 1.03  # a speed-up below this is not told from the clock's own spread
NOTHING_PRUNED = 0.999  # of the multiply-accumulates: above it a speed-up is not the pruning's


@dataclass(frozen=True)
class CurvePoint:
    """What is left of cost and quality at some part of the pruning, from 0 to 1.

    Args:
        score: accuracy, or what else answers of the model's kind are judged by.
    """

    progress: float
    macs: Figure
    score: Figure


@dataclass(frozen=True)
class Report:
    """A whole profile.

    Args:
        where: machine, device, dtype and versions, which all figures are of.
        by_layer: figures with a value for each layer.
        by_batch_size: seconds of one batch, by number of inputs and model.
        curve: from nothing pruned to all of the pruning; where there are labels.
    """

    subject: dict[str, Any]
    where: dict[str, Any]
    measured: list[Figure]
    by_layer: list[Figure]
    by_batch_size: dict[int, dict[str, Timing]]
    curve: list[CurvePoint]
    verdict: str
    notes: list[str]

    def values(self, what: str) -> dict[str, Value]:
        """Of all figures of one thing, its mean or median, by model."""
        figures = (*self.measured, *self.by_layer)
        return {figure.model: figure.value for figure in figures if figure.what in (f"mean {what}", f"median {what}")}

    def to_json(self) -> str:
        content = asdict(self)
        figures = [figure for size, timings in self.by_batch_size.items() for figure in batch_times(size, timings)]
        content["by_batch_size"] = [asdict(figure) for figure in figures]
        content["curve"] = [
            {"progress": point.progress, "macs": asdict(point.macs), point.score.what: asdict(point.score)}
            for point in self.curve
        ]
        return "{\n" + ",\n".join(f' "{name}": {_one_a_line(value)}' for name, value in content.items()) + "\n}\n"

    def to_markdown(self) -> str:
        lines = [f"# {self.subject['model']}, as it is and pruned", "", self.verdict, ""]
        lines += [f"- {note}" for note in self.notes] + ([""] if self.notes else [])
        lines += ["| what | model | value | spread | n |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {each.what} | {each.model} | {' | '.join(each.shown())} |" for each in self.measured]
        for what in dict.fromkeys(figure.what for figure in self.by_layer):
            lines += _layer_table([figure for figure in self.by_layer if figure.what == what])
        pruning = json.dumps(self.subject["pruning"])
        return "\n".join([*lines, "", f"{machine_line(self.where)}. Pruning: `{pruning}`"]) + "\n"


def _one_a_line(value: Any) -> str:
    """JSON, a list with each of its items on a line."""
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"


def _layer_table(figures: list[Figure]) -> list[str]:
    scale, unit = SHOWN.get(figures[0].unit, (1, figures[0].unit))
    depth = len(figures[0].value)
    head = f"| {figures[0].what} ({unit}; {figures[0].n} {figures[0].of}) | {' | '.join(map(str, range(depth)))} |"
    rows = [f"| {each.model} | {' | '.join(f'{scale * value:.3g}' for value in each.value)} |" for each in figures]
    return ["", head, "| --- " * (1 + depth) + "|", *rows]


def verdict(
    timings: dict[str, Timing], by_batch_size: dict[int, dict[str, Timing]], macs: float, size: int, device: str
) -> str:
    """Whether it is worth it, in words.

    Args:
        macs: what is left of the unpadded model's multiply-accumulates.
    """
    gain, least = (measure(timings["unpadded"], timings["pruned"]) for measure in (speedup, speedup_bound))
    padding = speedup(timings["padded"], timings["unpadded"])
    rounds = len(timings["pruned"].seconds)
    bound = f"at least {least:.2f}x" if rounds >= FEWEST else f"rounds: {rounds}, too few for a bound"
    pays = least > WORTH_IT and macs < NOTHING_PRUNED
    shown = "Worth it" if pays else "Not worth it" if rounds >= FEWEST else "Not shown to be worth it"
    words = (
        f"{shown}: in batches of {size} on {device} pruning gains {gain:.2f}x ({bound}) over the unpadded model, for "
        f"{macs:.2f} of its multiply-accumulates (realised: {gain * macs:.2f})."
    )
    if macs >= NOTHING_PRUNED:
        words += " It took nothing away from these inputs: no gain here is its own."
    words += (
        " This engine with nothing pruned (no padding, no last-layer tokens that nobody reads) gains "
        f"{padding:.2f}x over the stock model and is not counted here."
    )
    others = {n: each for n, each in by_batch_size.items() if n != size}  # of `size` all batches were timed above
    losing = [n for n, each in others.items() if speedup(each["unpadded"], each["pruned"]) < WORTH_IT]
    if losing and pays:
        words += f" At {_listed(losing)} inputs a batch it gains nothing: leave it off there."
    return words


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(str(number) for number in sorted(numbers))
