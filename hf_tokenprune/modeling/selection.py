"""Selection rules: pure functions from scores to the rows that stay.

One meaning for every execution: rows are the alive tokens of a sample in order, so a rule never sees the batch, the
padding or the layout. Counts are integers; ties go to the earlier row.

Shapes: B samples, K rows.
"""

from functools import lru_cache
from typing import Any

import torch

from .pruning_config import PruningConfig, Site, keep_count
from .token_state import Selection, TokenState, on_device, shapes_only


# Steps of a millionth of the average token: ten times the rounding error of a float32 softmax, a thousandth of the
# usual gap between scores.
_GRID = 2.0**20


def select(scores: torch.Tensor, state: TokenState, site: Site, config: PruningConfig) -> Selection:
    """The rows that stay at a site.

    Args:
        scores: float32 [B, K], one per row; dead rows are ignored.
    """
    keys = _keys(scores, state)
    if site.rule == "keep_rate":
        return _best(keys, state, site.ratio, config.min_tokens)
    return _above(keys, state, site.value, config.min_tokens)


def _keys(scores: torch.Tensor, state: TokenState) -> torch.Tensor:  # [B, K]
    """Length-invariant scores in whole steps of the grid, so that scores which differ by rounding errors are ties and
    uniform attention scores the same at every length. Protected rows are above all others, dead rows below."""
    layout = state.layout
    average = layout.rows * _GRID if layout.full else layout.counts[:, None] * _GRID
    keys = (scores * average).round_().nan_to_num_(nan=-1.0)
    if not layout.full:
        keys.masked_fill_(~layout.alive, -torch.inf)
    if state.protected is not None:
        return keys.masked_fill_(state.protected, torch.inf)
    prefix = state.input.prefix
    if layout.full:
        keys[:, :prefix].fill_(torch.inf)
        return keys
    return keys.masked_fill_(layout.alive & (layout.alive.cumsum(dim=1) <= prefix), torch.inf)


def _best(keys: torch.Tensor, state: TokenState, ratio: tuple[int, int], min_tokens: int) -> Selection:
    """Each sample's budget of best rows."""
    rows, budgets = _budgets(state, ratio, min_tokens)
    best = _order(keys, rows)
    if budgets is None:
        lengths = None if state.layout.lengths is None else (rows,) * keys.shape[0]
        return Selection(best.sort(dim=1).values, None, lengths)
    lengths = budgets if isinstance(budgets, tuple) else None
    budgets = on_device(budgets, keys.device)
    alive = torch.arange(rows, device=keys.device) < budgets[:, None]
    total = keys.shape[1]
    home = torch.where(alive, best, best + total).sort(dim=1).values  # the rest goes to the end
    return Selection(torch.where(home < total, home, home - total), alive, lengths)


def _above(keys: torch.Tensor, state: TokenState, threshold: float, min_tokens: int) -> Selection:
    """The rows that reach the threshold; protected rows and the `min_tokens` best are always among them."""
    keep = keys >= threshold * _GRID
    if min_tokens > 1:
        keep |= _order(keys, keys.shape[1]).argsort(dim=1) < min_tokens
    if not state.layout.full:
        keep &= state.layout.alive
    if shapes_only():
        home = _order(keep.float(), keep.shape[1])
        return Selection(home, keep.gather(1, home), None)
    lengths = tuple(keep.sum(dim=1).tolist())  # a synchronisation on an accelerator
    home = _order(keep.to(torch.int8), max(lengths))
    return Selection(home, None if min(lengths) == max(lengths) else keep.gather(1, home), lengths)


def _order(keys: torch.Tensor, rows: Any) -> torch.Tensor:
    """The `rows` rows of highest key, falling; ties in the order of their positions."""  # long [B, rows]
    if shapes_only():  # exporters know no stable sort: with its position in it, each key is unique
        total = keys.shape[1]
        return (keys.double() * total - torch.arange(total, device=keys.device)).topk(rows, dim=1).indices
    return keys.argsort(dim=1, descending=True, stable=True)[:, :rows]


def _budgets(
    state: TokenState, ratio: tuple[int, int], min_tokens: int
) -> tuple[int, tuple[int, ...] | torch.Tensor | None]:
    """How many rows hold every sample's budget, and each sample's own, None: just as many."""
    layout, (length, prefix, initial, protected, uniform) = state.layout, state.input
    rule = prefix, ratio, min_tokens
    if uniform and layout.full:
        return _known_budget(initial[0], protected and protected[0], layout.rows, *rule), None
    if layout.lengths is not None:
        samples = zip(initial, protected or (None,) * len(initial), layout.lengths)
        budgets = tuple(_known_budget(*sample, *rule) for sample in samples)
        return max(budgets), None if min(budgets) == max(budgets) else budgets
    rows = _budget(length, None, layout.rows, *rule)
    if layout.full and protected is None:
        return rows, None
    return rows, _budget(initial, protected, state.counts, *rule).clamp(max=rows)


def _budget(initial: Any, protected: Any, alive: Any, prefix: int, ratio: tuple[int, int], min_tokens: int) -> Any:
    """The one integer function: rows that a sample of `initial` tokens keeps of `alive` ones, the prefix included."""
    prefix = _least(initial, prefix)
    kept = _most(prefix + keep_count(initial - prefix, ratio), min_tokens)
    return _least(kept if protected is None else _most(kept, protected), alive)


_known_budget = lru_cache(maxsize=4096)(_budget)


def _least(a: Any, b: Any) -> Any:
    """The smaller of two ints, symbolic sizes or integer tensors (the first, if one is a tensor)."""
    if isinstance(a, torch.Tensor):
        return a.minimum(b) if isinstance(b, torch.Tensor) else a.clamp(max=b)
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _most(a: Any, b: Any) -> Any:
    """The larger one, likewise."""
    if isinstance(a, torch.Tensor):
        return a.maximum(b) if isinstance(b, torch.Tensor) else a.clamp(min=b)
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)
