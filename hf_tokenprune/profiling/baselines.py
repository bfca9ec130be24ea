"""The three baselines that a speed-up is over: padded (in arrival order and by length), unpadded, pruned."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..convert import prune
from ..families import native_to_pruned
from .latency import Timing, speedup, speedup_bound, time_interleaved


Batches = Sequence[Mapping[str, torch.Tensor]]


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """The native model with the same weights and adapters, copied; a native one as it is.

    Raises:
        ValueError: weights that it needs and the model has not, which would be random.
    """
    native = {ours: native for native, ours in native_to_pruned().items()}.get(type(model))
    if native is None:
        return model
    stock = native(model.config).to(device=model.device, dtype=model.dtype)
    _take_replaced(stock, model, {})
    missing = stock.load_state_dict(model.state_dict(), strict=False).missing_keys  # token predictors stay behind
    if missing:
        raise ValueError(f"{type(model).__name__} must have all weights of {native.__name__}, and has no {missing[0]}")
    return stock.train(model.training)


def _take_replaced(stock: nn.Module, model: nn.Module, memo: dict) -> None:
    """Copies what stands in the place of a native part and is another class: adapters around it, or quantised weights.
    What has all parts of the native one is our own class of it.

    memo: of all copies, so that what is tied stays tied.
    """
    for name, part in stock.named_children():
        given = model._modules.get(name)
        inside = None if given is None else given._modules.keys()
        if type(given) is type(part) or (part._modules and inside and part._modules.keys() <= inside):
            _take_replaced(part, given, memo)
        else:
            stock._modules[name] = copy.deepcopy(given, memo)


@torch.inference_mode()
def time_against_baselines(
    stock: PreTrainedModel,
    pruned: PreTrainedModel,
    arrival: Batches,
    by_length: Batches,
    *,
    rounds: int,
    others: Mapping[str, tuple[PreTrainedModel, Batches]] | None = None,
    seconds: float = float("inf"),
    progress: Callable = iter,
) -> dict[str, Timing]:
    """Times the same inputs through each model in turn.

    Args:
        stock: for the padded batches; one of ours is made native. The unpadded baseline has the pruned model's weights.
        arrival, by_length: batches of the inputs, without labels, as they come and sorted by length.
        others: by name, further models, each with the inputs as it takes them.
        seconds: no round is begun after so long, except the first three.
        progress: wraps the iteration over rounds, for example `tqdm`.
    """
    stock, unpadded = stock_model(stock), prune(pruned, None).eval()
    candidates = {
        "padded": lambda: [stock(**batch) for batch in arrival],
        "padded, sorted by length": lambda: [stock(**batch) for batch in by_length],
        "unpadded": lambda: [unpadded(**batch) for batch in arrival],
        "pruned": lambda: [pruned(**batch) for batch in arrival],
    }
    for name, (model, batches) in (others or {}).items():
        candidates[name] = lambda model=model, batches=batches: [model(**batch) for batch in batches]
    return time_interleaved(candidates, rounds=rounds, seconds=seconds, progress=progress, device=pruned.device)


def speed_table(timings: Mapping[str, Timing], inputs: int, mac_ratios: Mapping[str, float]) -> list[dict[str, Any]]:
    """Milliseconds per input and speed-ups, each against a named baseline of the same interleaved run.

    Args:
        inputs: how many were timed.
        mac_ratios: by name, what they cost over the unpadded baseline; for `realised`.
    """
    rows = []
    for name, timing in timings.items():
        row = {
            "model": name,
            "inputs": inputs,
            "rounds": len(timing.seconds),
            "milliseconds_per_input": 1e3 * timing.median / inputs,
            "quartiles": [1e3 * seconds / inputs for seconds in timing.spread],
        }
        for other, slow in timings.items():
            row[f"speedup_to_{other}"] = speedup(slow, timing)
            row[f"speedup_to_{other}_at_least"] = speedup_bound(slow, timing)
        if name in mac_ratios:
            ratio = mac_ratios[name]
            row |= {"mac_ratio_to_unpadded": ratio, "realised": row["speedup_to_unpadded"] * ratio}
        rows.append(row)
    return rows
