"""What a pruning that was found does on inputs that it was not found on, beside others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert import prune
from ..metrics import paired_bootstrap
from ..modeling.pruning_config import PruningConfig
from ..modeling.token_outputs import EncoderCall
from ..profiling.linear_macs import evaluating, linear_macs
from ..profiling.macs import count_call
from .plan import closest_rate


Batches = Sequence[Mapping[str, Any]]

SAMPLE = 64  # inputs on which keep rates are found


def all_batches(batches: Iterable[Mapping[str, Any]]) -> Batches:
    """The batches, to be gone through more than once.

    Raises:
        TypeError: a batch in place of several.
    """
    if isinstance(batches, Mapping):
        raise TypeError(f"batches ({type(batches).__name__} of {', '.join(batches)}) must be several batches: [batch]")
    return list(batches)


def sample(batches: Batches, inputs: int = SAMPLE) -> Batches:
    """As many batches as hold about so many inputs, from all over; all where there are no more."""
    held = sum(len(next(iter(batch.values()))) for batch in batches)
    count = min(len(batches), -(-len(batches) * inputs // held))
    return [batches[index * len(batches) // count] for index in range(count)]


@torch.no_grad()
def run_pruned(model: PreTrainedModel, pruning: PruningConfig | None, batches: Batches) -> tuple[float, torch.Tensor]:
    """The MAC ratio over all inputs together, and the logits [n, C] on the host.

    Raises:
        TypeError: a model without logits.
    """
    twin, logits, cost, whole = prune(model, pruning), [], 0, 0
    linear = linear_macs(twin)
    with evaluating(twin):
        for batch in batches:
            call = EncoderCall(work=True, linear_macs=linear)
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            output = twin(**inputs, encoder_call=call)
            if "logits" not in output:
                raise TypeError(f"{type(model).__name__} must be a classifier to be searched for: it has no logits")
            logits.append(output["logits"].float().cpu())
            count = count_call(call, twin.config)
            cost, whole = cost + count.total, whole + count.unpruned
    return cost / whole, torch.cat(logits)


def check_classifier(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raises unless accuracy, and a divergence of the logits, is defined on a labelled batch.

    Raises:
        TypeError: a model without logits.
        ValueError: logits or labels that are not of classes: regression, several labels of an input, labels of tokens.
    """
    logits, labels = run_pruned(model, None, [batch])[1], batch["labels"]
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"logits ({list(logits.shape)}) and labels ({list(labels.shape)}, {labels.dtype}) of "
            f"{type(model).__name__} must be [n, C] with C > 1 and integers [n]: accuracy is of one class an input"
        )


def top_k_of_same_cost(
    model: PreTrainedModel, batches: Batches, pruning: PruningConfig | None, layers: Sequence[int], **given: Any
) -> tuple[PruningConfig, float, float]:
    """`top_k` at other layers that costs on these inputs what a pruning does, or as closely as thousandths come.

    Args:
        given: further hyper-parameters of `top_k`: `saliency`, `protected_token_ids` and the like.

    Returns:
        With its MAC ratio, and the pruning's.
    """

    def top_k(thousandths: int) -> PruningConfig:
        return PruningConfig.preset("top_k", layers=layers, keep_rate=thousandths / 1000, **given)

    target = run_pruned(model, pruning, batches)[0]
    rate, macs = closest_rate(lambda rate: run_pruned(model, top_k(rate), batches)[0], target)
    return top_k(rate), macs, target


def compare_held_back(
    model: PreTrainedModel, batches: Batches, prunings: Mapping[str, PruningConfig | None]
) -> list[dict[str, Any]]:
    """Accuracy and cost of several prunings on labelled inputs.

    Args:
        batches: with `labels`.
        prunings: by name; all others are compared with the first.

    Returns:
        A row for each: MAC ratio, accuracy in percent, mean KL to the logits of the unpruned model; and the points to
        the first with their 95 % interval, by a paired bootstrap over inputs.
    """
    labels = torch.cat([batch["labels"] for batch in batches]).cpu()
    whole = run_pruned(model, None, batches)[1].log_softmax(dim=-1)
    rows, first = [], None
    for name, pruning in prunings.items():
        macs, logits = run_pruned(model, pruning, batches)
        right = (logits.argmax(dim=-1) == labels).numpy().astype(float)
        first = right if first is None else first
        divergence = (whole.exp() * (whole - logits.log_softmax(dim=-1))).sum(dim=-1).mean().item()
        rows.append(
            {
                "pruning": name,
                "macs": macs,
                "inputs": len(labels),
                "accuracy": 100 * right.mean(),
                "divergence": divergence,
                "points": 100 * (right - first).mean(),
                "interval": [100 * end for end in paired_bootstrap(right, first)],
            }
        )
    return rows
