"""Selection rules: pure functions from scores to the rows that stay.

One meaning for every execution: rows are the alive tokens of a sample in order, so a rule never sees the batch, the
padding or the layout. Counts are integers; ties go to the earlier row.

Shapes: B samples, K rows.
"""

import torch

from .pruning_config import PruningConfig, Site, keep_count
from .token_state import Selection, TokenState


# Steps of a millionth: ten times the rounding error of a float32 softmax, a thousandth of the usual gap between scores.
_GRID = 2.0**20


def shapes_only() -> bool:
    """Whether sizes must follow from shapes alone: under compile, export and tracing."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def select(scores: torch.Tensor, state: TokenState, site: Site, config: PruningConfig) -> Selection:
    """The rows that stay at a site.

    Args:
        scores: float32 [B, K], one per row; dead rows are ignored.
    """
    relative = _relative(scores, state)
    ranks = _ranks(relative, state)
    if site.rule == "keep_rate":
        keep = ranks < _budgets(state, site.value, config.min_tokens)[:, None]
        return _selection(keep, state, *_bound(state, site.value, config.min_tokens))
    keep = (relative >= site.value) | state.protected | (ranks < config.min_tokens)
    return _selection(keep & state.alive, state, state.layout.rows if shapes_only() else None)


def _relative(scores: torch.Tensor, state: TokenState) -> torch.Tensor:
    """Length-invariant scores: 1 is the average token's share. Scores closer than rounding errors become equal, so that
    ties are ties and uniform attention scores 1 at every length."""  # [B, K]
    return (scores * state.counts[:, None] * _GRID).round() / _GRID


def _ranks(scores: torch.Tensor, state: TokenState) -> torch.Tensor:
    """0 for the best row of each sample; protected rows first, dead rows last."""  # [B, K]
    worst = torch.finfo(scores.dtype).min
    keys = scores.nan_to_num(nan=worst).masked_fill(state.protected, torch.inf).masked_fill(~state.alive, -torch.inf)
    return keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _budgets(state: TokenState, rate: float, min_tokens: int) -> torch.Tensor:
    """Rows that each sample keeps, its structural prefix included; protected rows never overrun."""  # [B]
    prefix = state.initial.clamp(max=state.prefix)
    budgets = prefix + keep_count(state.initial - prefix, rate)
    return budgets.clamp(min=min_tokens).maximum(state.protected.sum(dim=1)).minimum(state.counts)


def _bound(state: TokenState, rate: float, min_tokens: int) -> tuple[int | None, bool]:
    """How many rows hold every sample's budget, where that is known without looking at tensors (None where it is not),
    and whether every budget is just that."""
    uniform = state.uniform_length is not None and state.layout.full and state.fixed_protection
    if not uniform and not shapes_only():
        return None, False
    length = state.uniform_length if uniform else state.length
    prefix = min(state.prefix, length)
    return min(max(prefix + keep_count(length - prefix, rate), min_tokens), state.layout.rows), uniform


def _selection(keep: torch.Tensor, state: TokenState, rows: int | None, full: bool = False) -> Selection:
    """The kept rows in their order.

    Args:
        keep: bool [B, K]. rows: how many rows the result has, where that is known; full: whether all will be alive.
    """
    lengths = None
    if rows is None:
        lengths = keep.sum(dim=1).tolist()  # a synchronisation on an accelerator
        rows = max(lengths)
        full = min(lengths) == rows
    home = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :rows]
    return Selection(home=home, alive=keep.gather(1, home), full=full, known_lengths=lengths)
