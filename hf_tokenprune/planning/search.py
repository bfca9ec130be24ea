"""`search_schedule`: which layers prune, and how fast, for the best accuracy at a given cost. Training-free."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from transformers import PreTrainedModel

from ..convert import prune
from ..files import write_atomically
from ..labels import CLASSES, MULTI_LABEL, REGRESSION
from ..metrics import JUDGEMENTS, answers
from ..modeling.pruning_config import PruningConfig, default_layers
from ..training.budget import MISSED
from .held_back import Batches, all_batches, check_classifier, divergence, run_pruned, sample


Metric = Callable[[torch.Tensor, torch.Tensor], float]

SALIENCIES = ("cls_attention", "cls_value_norm")
FRONT = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # MAC ratios at which the best schedules are measured, too
BEST = 3  # schedules that the front is made of
CLOSE = 0.005


@dataclass(frozen=True)
class Point:
    """A pruning, measured.

    Args:
        pruning: as `PruningConfig.from_dict` takes it; None: nothing. macs: the MAC ratio.
        score: of the metric; higher is better.
        divergence: of the logits from those of the unpruned model, as `held_back.divergence` has it: it tells schedules
            of one score apart.
    """

    pruning: dict[str, Any] | None
    macs: float
    score: float
    divergence: float


@dataclass(frozen=True)
class Search:
    """What was found.

    Args:
        chosen: the best point at the target, or the unpruned model where that costs no more. points: all that were
            measured, once each, the unpruned model first. met: whether what was chosen costs the target, or less where
            it is the unpruned model; texts so short that counts are coarse may have no schedule that does.
    """

    chosen: Point
    points: list[Point]
    met: bool

    @property
    def pruning(self) -> PruningConfig | None:
        return None if self.chosen.pruning is None else PruningConfig.from_dict(self.chosen.pruning)

    @property
    def front(self) -> list[Point]:
        """The points that no other is better than and cheaper, by rising cost."""
        front: list[Point] = []
        for point in sorted(self.points, key=lambda point: (point.macs, -point.score, point.divergence)):
            if not front or point.score > front[-1].score:
                front.append(point)
        return front


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of classes [n, C], labels [n]."""
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def pearson(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of numbers [n, 1], labels [n]."""
    return JUDGEMENTS[REGRESSION](answers(REGRESSION, logits.numpy()), labels.reshape(len(labels)).numpy())["pearson"]


def f1_micro(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of several labels [n, C], labels [n, C]."""
    return JUDGEMENTS[MULTI_LABEL](answers(MULTI_LABEL, logits.numpy()), labels.numpy())["f1_micro"]


METRICS = {CLASSES: accuracy, REGRESSION: pearson, MULTI_LABEL: f1_micro}


def search_schedule(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    target_macs: float,
    metric: Metric = accuracy,
    saliencies: Sequence[str] = SALIENCIES,
    resume_from: str | Path | None = None,
    progress: Callable = iter,
    **common: Any,
) -> Search:
    """Measures `top_k` at many sets of layers, each at the keep rate that costs the target, and takes the best.

    Args:
        model: a classifier of a supported family, or one of ours.
        batches: a few hundred labelled inputs: batches with `labels`, on the model's device.
        target_macs: multiply-accumulates of the pruned encoder / of the stock encoder on the same unpadded tokens.
        metric: from logits and labels to a number, higher is better; accuracy wants one class for each input, and
            `METRICS` has what fits other heads.
        saliencies: scores that are tried.
        resume_from: a JSON file with what was found before; it is written after every measurement. Metrics are told
            apart by name, not by what they compute: one that has changed under its name wants a new file.
        progress: wraps the iteration over schedules, and then that over the front, for example `tqdm`.
        common: `protected_token_ids`, `min_tokens`, `execution`.

    Raises:
        TypeError: a model of an unsupported family or without logits, or one batch in place of several.
        ValueError: a target outside (0, 1] or out of reach of all schedules, batches without labels, none at all,
            logits or labels that accuracy is not defined on, a file of another search, or one together with a metric
            that has no name of its own (lambdas, local functions, bound methods and other objects).
    """
    if isinstance(target_macs, bool) or not isinstance(target_macs, int | float) or not 0 < target_macs <= 1:
        raise ValueError(f"target_macs ({target_macs!r}) must be in (0, 1]")
    prune(model, None)  # or an error, before a config of a family that is not supported is asked for anything
    batches = all_batches(batches)
    if not batches or any("labels" not in batch for batch in batches):
        raise ValueError(f"batches ({len(batches)}) must be at least one, each with labels")
    if metric is accuracy:
        check_classifier(model, batches[0])
    searcher = _Searcher(model, batches, metric, common, None if resume_from is None else Path(resume_from))
    whole = searcher.measure(None)
    if whole.macs <= target_macs:
        return Search(whole, [whole], met=True)
    schedules = list(_schedules(model.config.num_hidden_layers, saliencies))
    found = [searcher.at(*schedule, target_macs) for schedule in progress(schedules)]
    reached = [(point, schedule) for point, schedule in zip(found, schedules) if point is not None]
    if not reached:
        rule = f"must be in reach: none of {len(schedules)} schedules costs it, and nothing pruned {whole.macs:.3f}"
        raise ValueError(f"target_macs ({target_macs}) {rule}")
    best = sorted(reached, key=lambda pair: (-pair[0].score, pair[0].divergence))
    front = [(*schedule, macs) for _, schedule in best[:BEST] for macs in FRONT]
    more = [searcher.at(*wish) for wish in progress(front)]
    points = [whole, *(point for point, _ in reached), *(point for point in more if point is not None)]
    off = min(abs(point.macs - target_macs) for point, _ in reached)
    chosen = next(point for point, _ in best if abs(point.macs - target_macs) <= max(off, MISSED))
    return Search(chosen, list({json.dumps(point.pruning): point for point in points}.values()), off <= MISSED)


def _schedules(depth: int, saliencies: Sequence[str]) -> Iterator[tuple[list[int], str]]:
    """One, two or three sites near one another, the usual three, and all layers from one on."""
    sets = {tuple(default_layers(depth))}
    for first in range(depth - 1):
        runs = [(first,), (first, first + 1), (first, first + 2), (first, first + 1, first + 2)]
        sets |= {sites for sites in runs if sites[-1] < depth - 1}
        sets.add(tuple(range(first, depth - 1)))
    for sites in sorted(sets):
        for saliency in saliencies:
            yield list(sites), saliency


def _name_of(metric: Metric) -> str:
    """The qualified name under which a metric is found again.

    Raises:
        ValueError: it has none, so that nobody could tell it from another one.
    """
    module, name = getattr(metric, "__module__", None), getattr(metric, "__qualname__", type(metric).__qualname__)
    try:
        found = attrgetter(name)(sys.modules[module])
    except (AttributeError, KeyError):
        found = None
    if found is not metric:
        raise ValueError(f"metric ({name}) must be a function of a module to resume a search of it: a name tells it")
    return f"{module}.{name}"


def _digest(value: torch.Tensor | bool) -> str:
    value = torch.as_tensor(value)
    return hashlib.sha256(value.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()


class _Searcher:
    """Measures, and remembers what it found."""

    def __init__(
        self, model: PreTrainedModel, batches: Batches, metric: Metric, common: dict[str, Any], path: Path | None
    ):
        self.model, self.batches, self.metric, self.common, self.path = model, batches, metric, common, path
        self.sample = sample(batches)  # on which keep rates are found
        self.known: dict[str, Point] = {}  # by pruning
        self.rates: dict[str, float | None] = {}  # by sites, saliency and target
        if path is not None:
            self.key = self._key()
        if path is not None and path.exists():
            stored = json.loads(path.read_text())
            if stored.get("of") != self.key:
                rule = "must be of a search with the same model, inputs, metric and options, and is of another"
                mend = "remove the file or take another (of run_plan.py: another output_dir)"
                raise ValueError(f"resume_from ({path}) {rule}: {mend}")
            self.known = {json.dumps(point["pruning"]): Point(**point) for point in stored["points"]}
            self.rates = stored["rates"]

    def _key(self) -> str:
        usual = self.top_k(default_layers(self.model.config.num_hidden_layers), SALIENCIES[0], 1.0)
        weights = [(name, _digest(value)) for name, value in sorted(self.model.state_dict().items())]
        inputs = [[(name, _digest(value)) for name, value in sorted(batch.items())] for batch in self.batches]
        of = [_name_of(self.metric), usual.to_dict(), weights, inputs]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]

    def _write(self) -> None:
        if self.path is not None:
            points = [asdict(point) for point in self.known.values()]
            stored = {"of": self.key, "points": points, "rates": self.rates}
            write_atomically(self.path, json.dumps(stored, indent=1).encode())

    @cached_property
    def unpruned_logits(self) -> torch.Tensor:  # [n, C]
        return run_pruned(self.model, None, self.batches)[1]

    def top_k(self, layers: list[int], saliency: str, rate: float) -> PruningConfig:
        return PruningConfig.preset("top_k", layers=layers, keep_rate=round(rate, 3), saliency=saliency, **self.common)

    def at(self, layers: list[int], saliency: str, target: float) -> Point | None:
        """These sites at the keep rate that costs the target; None: no rate does."""
        wish = json.dumps([layers, saliency, target])
        if wish not in self.rates:
            self.rates[wish] = self._rate(layers, saliency, target)
            self._write()
        rate = self.rates[wish]
        return None if rate is None else self.measure(self.top_k(layers, saliency, rate))

    def _rate(self, layers: list[int], saliency: str, target: float) -> float | None:
        def excess(rate: float) -> float:
            off = run_pruned(self.model, self.top_k(layers, saliency, rate), self.sample)[0] - target
            return 0.0 if abs(off) < CLOSE else off

        if excess(0.001) > 0 or excess(1.0) < 0:
            return None
        return brentq(excess, 0.001, 1.0, xtol=0.001)

    def measure(self, pruning: PruningConfig | None) -> Point:
        written = None if pruning is None else pruning.to_dict()
        known = self.known.get(json.dumps(written))
        if known is not None:
            return known
        macs, logits = run_pruned(self.model, pruning, self.batches)
        labels = torch.cat([batch["labels"] for batch in self.batches]).cpu()
        far = divergence(self.model, logits, self.unpruned_logits)
        point = Point(written, macs, self.metric(logits, labels), far)
        self.known[json.dumps(written)] = point
        self._write()
        return point
