"""What becomes of the tokens that do not stay: pure functions from a selection to what the new rows are made of.

Shapes: B samples, K rows before, K' after, R rows that do not stay, D features.
"""

import torch

from .saliency import nearest
from .selection import Scores
from .token_layout import Blend, Selection
from .token_state import TokenState


def fuse(scores: Scores, state: TokenState, selection: Selection, normalized: bool) -> Blend:
    """All that do not stay in the last row, weighted by their saliency (EViT, ICLR 2022).

    Differentiable in the saliency.
    """
    home, last = selection.home, _last(selection)
    fused = last & selection.fused
    own = torch.where(fused, scores.saliency.gather(1, home), 1.0)
    target = last.long().argmax(dim=1, keepdim=True)
    if selection.rest is None:
        target, share = target[:, :0], own[:, :0]
    else:
        target, share = target.expand_as(selection.rest), _at_rest(scores.saliency, selection)
    if normalized:
        total = torch.where(fused, own, 0.0).sum(dim=1, keepdim=True) + share.sum(dim=1, keepdim=True)
        total = torch.where(total > 0, total, 1.0)
        own, share = torch.where(fused, own / total, own), share / total
    if state.size is None:
        return Blend(own, target, share, None)
    size = _summed(state.size.gather(1, home), target, _at_rest(state.size, selection))
    return Blend(own, target, share, size)


@torch.no_grad()
def merge(scores: Scores, state: TokenState, selection: Selection, hidden: torch.Tensor, mean: bool) -> Blend:
    """Each of the rest into the row it is most like, among those that stay and are not protected.

    Args:
        state: knows the sizes of its rows.
        hidden: [.., D] laid out as those rows; compared by cosine where the scores know no match.
        mean: DiffRate (ICCV 2023): plain mean; the size that is added is multiplied by the similarity. Otherwise ToMe
            (ICLR 2023): mean weighted by size; sizes are added.
    """
    home, rest = selection.home, selection.rest
    own_size = state.size.gather(1, home)
    if rest is None:
        return Blend(torch.ones_like(own_size), home[:, :0], own_size[:, :0], own_size)
    target, similarity = _targets(scores, state, selection, hidden)
    there = target >= 0
    rest_size = state.size.gather(1, rest).masked_fill(~there, 0.0)
    if not mean:
        size = _summed(own_size, target, rest_size)
        return Blend(own_size / size, target, rest_size / size.gather(1, target.clamp(min=0)), size)
    members = _summed(torch.ones_like(own_size), target, there.to(own_size.dtype))
    share = there / members.gather(1, target.clamp(min=0))
    # Unlike tokens may have a negative similarity, and no attention has the logarithm of a size below zero.
    size = _summed(own_size, target, rest_size * similarity.to(rest_size.dtype)).clamp(min=1e-6)
    return Blend(1 / members, target, share, size)


def _targets(
    scores: Scores, state: TokenState, selection: Selection, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new row that each of the rest goes into, long [B, R], -1: none; and how alike they are, [B, R]."""
    home, rest = selection.home, selection.rest
    if scores.match is not None:
        rows = torch.arange(home.shape[1], device=home.device).expand_as(home)
        moved = torch.full_like(scores.match, -1).scatter(1, home, rows)
        target, similarity = moved.gather(1, scores.match.gather(1, rest)), -scores.saliency.gather(1, rest)
    else:
        there = torch.ones_like(home, dtype=torch.bool) if selection.alive is None else selection.alive
        candidates = there & ~state.held.expand(home.shape[0], -1).gather(1, home)
        target, similarity = nearest(state.layout.spread(hidden), rest, home, candidates)
    if selection.rest_alive is not None:
        target = target.masked_fill(~selection.rest_alive, -1)
    return target, similarity.masked_fill(target < 0, 0.0)


def _last(selection: Selection) -> torch.Tensor:
    """Each sample's last new row."""  # bool [B, K']
    home = selection.home
    rows = torch.arange(home.shape[1], device=home.device)
    if selection.alive is None:
        return (rows == home.shape[1] - 1).expand_as(home)
    return rows == selection.alive.sum(dim=1, keepdim=True) - 1


def _at_rest(values: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Per-row values of the rest, 0 where there is none.  [B, R]"""
    if selection.rest is None:
        return values[:, :0]
    values = values.gather(1, selection.rest)
    return values if selection.rest_alive is None else values.masked_fill(~selection.rest_alive, 0.0)


def _summed(own: torch.Tensor, target: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """own [B, K'] plus `more` [B, R], each at its target."""
    return own.scatter_add(1, target.clamp(min=0), more)
