"""How long a model takes at different keep rates, here: measured once for a device, a model's shape and a batch."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..convert import prune
from ..families import native_to_pruned
from ..files import write_atomically
from ..modeling.pruning_config import PruningConfig
from ..packaged import cache_dir
from ..profiling.latency import Timing, speedup, time_interleaved
from ..profiling.linear_macs import evaluating
from ..profiling.machine import describe_machine


logger = logging.get_logger(__name__)

ENGINE = Path(__file__).parents[1] / "modeling"  # a curve is of this code, too
RATES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.15)
STEADY = 0.9  # of the speed-up at a higher rate: what a lower one comes to at least, unless the clock is wrong


@dataclass(frozen=True)
class LatencyCurve:
    """Measured in one interleaved run.

    Args:
        rates: keep rates, falling from 1.0, at which nothing is pruned.
        speedups: of our engine with nothing pruned over each, medians of ratios of the same round.
        seconds: medians for the whole batch.
        unpadded_over_padded: what the engine saves with nothing pruned; None where the stock model was not given.
    """

    rates: tuple[float, ...]
    speedups: tuple[float, ...]
    seconds: tuple[float, ...]
    unpadded_over_padded: float | None

    @property
    def steady(self) -> bool:
        """Whether the clock can be believed: less work does not take clearly longer."""
        pruned = self.speedups[1:]
        return all(later >= STEADY * best for later, best in zip(pruned, accumulate(pruned, max)))

    def rate_for(self, wanted: float) -> float | None:
        """The keep rate at which the speed-up is at least `wanted`; None: nowhere on the curve.

        By linear interpolation, but for rates above the first that prunes: what sites cost comes all at once.
        """
        pairs = list(zip(self.rates, self.speedups))[1:]
        if wanted <= pairs[0][1]:
            return pairs[0][0]
        for (rate, fast), (later, faster) in pairwise(pairs):
            if fast <= wanted <= faster:
                share = (wanted - fast) / (faster - fast) if faster > fast else 0.0
                return rate + share * (later - rate)
        return None


def measure_curve(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    layers: Sequence[int],
    *,
    common: Mapping[str, Any] | None = None,
    rounds: int = 9,
    progress: Callable = iter,
    use_cache: bool = True,
) -> LatencyCurve:
    """Times the stock model, our engine with nothing pruned, and `top_k` at `layers` with each of `RATES`, in turn.

    Once more where the clock was too unsteady; what is so even then is returned, and not kept.

    Args:
        model: a native model; one of ours is timed without the stock model beside it.
        inputs: a batch as the model will meet it; its lengths are part of the cache's key.
        common: what goes with the preset: `protected_token_ids`, `min_tokens`, `execution`.
        use_cache: whether an earlier measurement of the same device, shapes and versions is taken.
    """
    common = dict(common or {})
    path = cache_dir() / "latency" / f"{_key(model, inputs, layers, common)}.json"
    if use_cache and path.exists():
        stored = json.loads(path.read_text())
        return LatencyCurve(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})
    models = {1.0: prune(model, None)}
    for rate in RATES:
        models[rate] = prune(model, PruningConfig.preset("top_k", layers=layers, keep_rate=rate, **common))
    calls = {rate: _call(one, inputs) for rate, one in models.items()}
    if type(model) in native_to_pruned():
        calls["stock"] = _call(model, inputs)
    with torch.inference_mode(), ExitStack() as modes:
        for one in (model, *models.values()):
            modes.enter_context(evaluating(one))
        for _ in range(2):
            curve = _curve(time_interleaved(calls, rounds=rounds, warmup=2, progress=progress, device=model.device))
            if curve.steady:
                _keep(curve, path)
                break
    return curve


def _keep(curve: LatencyCurve, path: Path) -> None:
    try:
        write_atomically(path, json.dumps(asdict(curve), indent=1).encode())
    except OSError as error:
        logger.warning_once(
            f"{path.parent} ({error.strerror or error}) cannot be written: curves are measured again next time"
        )


def _curve(timings: Mapping[Any, Timing]) -> LatencyCurve:
    rates = (1.0, *RATES)
    return LatencyCurve(
        rates,
        tuple(speedup(timings[1.0], timings[rate]) for rate in rates),
        tuple(timings[rate].median for rate in rates),
        speedup(timings["stock"], timings[1.0]) if "stock" in timings else None,
    )


def _call(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: model(**inputs)


def _key(model: PreTrainedModel, inputs: Mapping[str, Any], layers: Sequence[int], common: Mapping[str, Any]) -> str:
    config = {k: v for k, v in model.config.to_dict().items() if isinstance(v, int | float | str) and k[0] != "_"}
    mask = inputs.get("attention_mask")
    lengths = sorted(mask.sum(dim=1).tolist()) if mask is not None else None
    shapes = {name: list(value.shape) if hasattr(value, "shape") else value for name, value in inputs.items()}
    # Adapters and quantised layers are not in the config.
    parts = [(name, type(module).__name__) for name, module in model.named_modules()]
    weights = [(name, list(weight.shape)) for name, weight in model.named_parameters()]
    kernel, machine = [str(model.dtype), model.config._attn_implementation], describe_machine(model.device)
    shape = [type(model).__name__, config, parts, weights, shapes, lengths]
    key = [shape, list(layers), common, kernel, machine, RATES, _digest_of_code(ENGINE)]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _digest_of_code(folder: Path) -> str:
    files = [path.name.encode() + path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(files)).hexdigest()
