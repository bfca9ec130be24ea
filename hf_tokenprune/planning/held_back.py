"""What a pruning that was found does on inputs that it was not found on, beside others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..checkpoints import problem_of
from ..convert import prune
from ..labels import CLASSES
from ..metrics import JUDGEMENTS, answers, bootstrap, paired_bootstrap
from ..modeling.pruning_config import PruningConfig
from ..modeling.token_outputs import EncoderCall
from ..profiling.linear_macs import evaluating, linear_macs
from ..profiling.macs import count_call
from ..training.distillation import difference_to_teacher
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
    several = logits.ndim != 2 or logits.shape[1] < 2 or problem_of(model.config) != CLASSES
    if several or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"logits ({list(logits.shape)}) and labels ({list(labels.shape)}, {labels.dtype}) of "
            f"{type(model).__name__} must be [n, C] with C > 1 and integers [n]: accuracy is of one class an input; "
            f"problem_type is {problem_of(model.config)!r}, and metric may be one of planning.search.METRICS"
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
    """Quality and cost of several prunings on labelled inputs.

    Args:
        batches: with `labels`.
        prunings: by name; all others are compared with the first.

    Returns:
        A row for each: MAC ratio, accuracy in percent, mean KL to the logits of the unpruned model; and the points to
        the first with their 95 % interval, by a paired bootstrap over inputs. Of numbers and of several labels
        `metric`, `score` and `difference`, in the metric's units, in place of accuracy and points.
    """
    labels = torch.cat([batch["labels"] for batch in batches]).cpu().numpy()
    whole, problem = run_pruned(model, None, batches)[1], problem_of(model.config)
    rows, first = [], None
    for name, pruning in prunings.items():
        macs, logits = run_pruned(model, pruning, batches)
        given = answers(problem, logits.numpy())
        first = given if first is None else first
        row = {"pruning": name, "macs": macs, "inputs": len(labels), "divergence": divergence(model, logits, whole)}
        rows.append(row | _judged(problem, given, first, labels))
    return rows


def divergence(model: PreTrainedModel, logits: torch.Tensor, whole: torch.Tensor) -> float:
    """Of logits from those of the unpruned model: the mean KL of classes, the sum of that of each of several labels, or
    the squared error of numbers."""
    return difference_to_teacher(logits, whole, 1.0, problem=problem_of(model.config)).item()


def _judged(problem: str, given: np.ndarray, first: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    if problem == CLASSES:
        right, others = ((each == labels).astype(float) for each in (given, first))
        return {
            "accuracy": 100 * right.mean(),
            "points": 100 * (right - others).mean(),
            "interval": [100 * end for end in paired_bootstrap(right, others)],
        }
    name = JUDGEMENTS[problem].names[0]
    score, before = (JUDGEMENTS[problem](each, labels)[name] for each in (given, first))
    interval = bootstrap(name, given[None], labels, first[None])
    return {"metric": name, "score": score, "difference": score - before, "interval": list(interval)}
