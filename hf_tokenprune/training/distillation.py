"""What a student learns from a teacher: pure functions from their outputs to losses.

Shapes: B samples, N input length, D features, C classes.
"""

from typing import Any

import torch
from torch.nn import functional as F

from ..labels import MULTI_LABEL, REGRESSION
from ..modeling.token_state import TokenState


def difference_to_teacher(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    counted: torch.Tensor | None = None,
    problem: str | None = None,
) -> torch.Tensor:
    """temperature^2 KL(teacher || student), mean over samples or counted tokens: a scalar.

    Args:
        student, teacher: logits [B, C] or [B, N, C]; no gradient goes to the teacher.
        counted: bool [B, N], for logits of tokens.
        problem: as a config's `problem_type` has it. Of several labels the KL is that of each label by itself, summed;
            a regression has no distribution: the squared error, summed, without temperature.
    """
    student, teacher = student.float(), teacher.detach().float()
    if problem == REGRESSION:
        each = (student - teacher).square().sum(dim=-1)
    else:
        each = temperature**2 * _kl(student / temperature, teacher / temperature, problem)
    if counted is None:
        return each.mean()
    return each.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def _kl(student: torch.Tensor, teacher: torch.Tensor, problem: str | None) -> torch.Tensor:
    """KL(teacher || student) of logits [.., C] -> [..]"""
    if problem == MULTI_LABEL:  # there, or not: two classes for each label
        student, teacher = (torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (student, teacher))
    wanted, given = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    each = F.kl_div(given, wanted, reduction="none", log_target=True).sum(dim=-1)
    return each.sum(dim=-1) if problem == MULTI_LABEL else each


def kept_token_mse(student: torch.Tensor, teacher: torch.Tensor, state: TokenState) -> torch.Tensor:
    """The mean squared error of last states [B, N, D] over what is left of each token: a scalar.

    Args:
        state: the student's, after its last layer, with positions followed. DynamicViT, NeurIPS 2021.
    """
    left = state.weights.gather(1, state.carrier.clamp(min=0)).masked_fill(state.carrier < 0, 0.0)  # [B, N]
    errors = (student.float() - teacher.detach().float()).square().mean(dim=-1)
    return (left * errors).sum() / left.sum().clamp(min=1e-6)


def check_teacher(student: Any, teacher: Any, states: bool) -> None:
    """Raises a ValueError where the teacher's labels, their order or vocabulary are not the student's, or its width.

    student, teacher: model configs. states: whether hidden states are compared, which alone asks for one width.
    """
    for name in ("num_labels", "vocab_size", *(["hidden_size"] if states else [])):
        ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if ours != theirs:
            raise ValueError(f"the teacher's {name} ({theirs!r}) must be the student's ({ours!r})")
    ours, theirs = student.problem_type, teacher.problem_type
    if ours != theirs and ours and theirs:  # without one, labels tell it
        raise ValueError(f"the teacher's problem_type ({theirs!r}) must be the student's ({ours!r})")
    ours, theirs = (list((config.id2label or {}).values()) for config in (student, teacher))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ValueError(f"the teacher's labels ({theirs}) must be in the student's order ({ours})")
