"""What a profile says: every figure with its unit, count and spread, and a verdict in words."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .latency import Timing, speedup, speedup_bound


WORTH_IT = 1.03  # a speed-up below this is not told from the clock's own spread


@dataclass(frozen=True)
class Measured:
    """One figure.

    Args:
        what: what was measured. model: of which model, or over which ("pruned over unpadded").
        n: how many measurements it comes from. spread: their quartiles, or the lower 95 % bound of a ratio.
    """

    what: str
    model: str
    value: float
    unit: str
    n: int = 1
    spread: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Report:
    """A whole profile.

    Args:
        where: machine, device, dtype and versions, which all figures are of.
        layer_seconds: time inside each layer by model, of one profiled call.
        alive: mean tokens that leave each layer, unpadded and pruned.
        by_batch_size: seconds of one batch, by model and number of inputs.
        curve: accuracy over MACs per input, from nothing pruned to all of the pruning; where there are labels.
    """

    subject: dict[str, Any]
    where: dict[str, Any]
    measured: list[Measured]
    layer_seconds: dict[str, list[float]]
    alive: dict[str, list[float]]
    by_batch_size: dict[int, dict[str, Timing]]
    curve: list[dict[str, float]]
    verdict: str
    notes: list[str]

    def to_json(self) -> str:
        content = asdict(self)
        content["by_batch_size"] = [
            asdict(Measured(f"time of a batch of {size}", name, 1e3 * timing.median, "ms", len(timing.seconds)))
            | {"spread": [1e3 * second for second in timing.spread]}
            | {f"p{percent}": 1e3 * timing.percentile(percent) for percent in (50, 99)}
            for size, timings in self.by_batch_size.items()
            for name, timing in timings.items()
        ]
        return json.dumps(content, indent=1)

    def to_markdown(self) -> str:
        lines = [f"# {self.subject['model']}, as it is and pruned", "", self.verdict, ""]
        lines += [f"- {note}" for note in self.notes] + ([""] if self.notes else [])
        lines += ["| what | model | value | spread | n |", "| --- | --- | --- | --- | --- |"]
        for each in self.measured:
            spread = "" if each.spread is None else " ... ".join(f"{value:.4g}" for value in each.spread)
            lines.append(f"| {each.what} | {each.model} | {each.value:.4g} {each.unit} | {spread} | {each.n} |")
        for title, table in (("ms inside each layer", self._layers()), ("tokens that leave each layer", self.alive)):
            lines += ["", f"| {title} | {' | '.join(str(i) for i in range(len(next(iter(table.values())))))} |"]
            lines.append("| --- " * (1 + len(next(iter(table.values())))) + "|")
            lines += [f"| {name} | {' | '.join(f'{v:.3g}' for v in row)} |" for name, row in table.items()]
        where = self.where
        lines += [
            "",
            f"{where['processor']}, {where['threads']} threads, {where['device']}, {where['dtype']}, torch "
            f"{where['torch']}, transformers {where['transformers']}. Pruning: `{json.dumps(self.subject['pruning'])}`",
        ]
        return "\n".join(lines) + "\n"

    def _layers(self) -> dict[str, list[float]]:
        return {name: [1e3 * second for second in row] for name, row in self.layer_seconds.items()}


def times(timings: dict[str, Timing], inputs: int) -> list[Measured]:
    """Milliseconds per input and inputs per second of each model, and the speed-ups between them."""
    figures = []
    for name, timing in timings.items():
        n = len(timing.seconds)
        low, high = timing.spread
        each = 1e3 / inputs
        figures.append(Measured("time of an input", name, each * timing.median, "ms", n, (each * low, each * high)))
        figures.append(
            Measured("throughput", name, inputs / timing.median, "inputs/s", n, (inputs / high, inputs / low))
        )
    for slow, fast in (("padded", "unpadded"), ("padded", "pruned"), ("unpadded", "pruned")):
        bound = (speedup_bound(timings[slow], timings[fast]),)
        ratio = speedup(timings[slow], timings[fast])
        n = len(timings[fast].seconds)
        figures.append(Measured("speed-up", f"{fast} over {slow}", ratio, "x", n, bound))
    return figures


def verdict(
    timings: dict[str, Timing], by_batch_size: dict[int, dict[str, Timing]], macs: float, size: int, device: str
) -> str:
    """Whether it is worth it, in words.

    Args:
        macs: what is left of the unpadded model's multiply-accumulates.
    """
    gain, least = (measure(timings["unpadded"], timings["pruned"]) for measure in (speedup, speedup_bound))
    padding = speedup(timings["padded"], timings["unpadded"])
    words = (
        f"{'Worth it' if least > WORTH_IT else 'Not worth it'}: in batches of {size} on {device} pruning gains "
        f"{gain:.2f}x (at least {least:.2f}x) over the unpadded model, for {macs:.2f} of its multiply-accumulates "
        f"(realised: {gain * macs:.2f})."
    )
    words += f" Not to compute padding gains {padding:.2f}x over the stock model and is not counted here."
    losing = [n for n, each in by_batch_size.items() if speedup(each["unpadded"], each["pruned"]) < WORTH_IT]
    if losing and least > WORTH_IT:
        words += f" At {_listed(losing)} inputs a batch it gains nothing: leave it off there."
    return words


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(str(number) for number in sorted(numbers))
