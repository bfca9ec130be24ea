"""Selection rules: pure functions from scores to the rows that stay.

One meaning for every execution: rows are the alive tokens of a sample in order, so a rule never sees the batch, the
padding or the layout. Every rule says how many of a sample's best rows stay. Counts are integers; ties go to the
earlier row.

Shapes: B samples, K rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .pruning_stage import FUSIONS, Site, keep_count
from .token_layout import Ints, PackedRows, Selection, on_cpu, on_device, shapes_only
from .token_state import TokenState


# Steps of a millionth of the average token, or of a similarity: ten times the rounding error of a float32 softmax, a
# thousandth of the usual gap between scores.
GRID = 2.0**20
_FAR = 2.0**38  # beyond every score on the grid
_BEHIND = 2**32  # beyond every row


class Scores(NamedTuple):
    """What a site knows of its rows.

    saliency: one per row, dead rows 0; sums to 1 over the alive rows of a sample, but for a similarity, where the
        higher stays.                                                                  # float32 or wider [B, K]
    match: the row that each row is most like, where similarity decides.               # long [B, K]
    arrangement: the order in which rows go on; None: as they lie if the others are dropped, else the best first.
        # long [B, K]
    ranking: all rows, the best first, where the scores bring an order of their own; rows go on in it.  # long [B, K]
    """

    saliency: torch.Tensor
    match: torch.Tensor | None = None
    arrangement: torch.Tensor | None = None
    ranking: torch.Tensor | None = None

    def after(self, home: torch.Tensor) -> "Scores":
        """The scores of the rows of a cut, which no match goes with."""
        ranking = None if self.ranking is None else self.ranking.argsort(dim=1).gather(1, home).argsort(dim=1)
        return self._replace(saliency=self.saliency.gather(1, home), ranking=ranking)


class Kept(NamedTuple):
    """How many of each sample's best rows stay.

    rows: enough for every sample; an int or a symbolic size.
    each: one number per sample: on the host, or where the scores are, long [B]; None: `rows`, all.
    """

    rows: Any
    each: Ints | torch.Tensor | None = None


@torch.no_grad()
def select(scores: Scores, state: TokenState, site: Site, min_tokens: int) -> Selection:
    """The rows that stay at a site, and those that are to go into them."""
    keys = _keys(scores, state)
    budget = BUDGETS.get(site.rule)
    kept = _reached(keys, scores, state, site, min_tokens) if budget is None else _budgets(state, site, min_tokens)
    return _split(keys, scores, state, kept, site)


@torch.no_grad()
def cut(scores: Scores, state: TokenState, site: Site, min_tokens: int) -> Selection:
    """The rows that are not dropped outright at a site with a cut."""
    only = replace(site, rule="keep_count", value=site.cut, reduction="drop", cut=None)
    return select(scores, state, only, min_tokens)


def _keys(scores: Scores, state: TokenState) -> torch.Tensor:  # [B, K]
    """Length-invariant scores in whole steps of the grid, so that scores which differ by rounding errors are ties and
    uniform attention scores the same at every length. Protected rows are above all others, dead rows below."""
    layout = state.layout
    average = GRID if scores.match is not None else GRID * (layout.rows if layout.full else layout.counts[:, None])
    keys = scores.saliency.detach() * average
    keys = (keys.round_() if scores.ranking is None else keys).nan_to_num_(nan=-1.0)
    if state.protected is None and (layout.full or isinstance(layout, PackedRows)):  # the prefix comes first
        keys[:, : state.input.prefix].fill_(torch.inf)
    else:
        keys.masked_fill_(state.held, torch.inf)
    return keys if layout.full else keys.masked_fill_(~layout.alive, -torch.inf)


# How many rows stay, the prefix included


def _keep_rate(tokens: "_Tokens", site: Site) -> Any:
    return tokens.prefix + keep_count(tokens.initial - tokens.prefix, site.ratio)


def _site_keep_rate(tokens: "_Tokens", site: Site) -> Any:
    numerator, denominator = site.ratio
    return tokens.prefix + ((tokens.alive - tokens.prefix) * numerator + denominator - 1) // denominator


def _keep_count(tokens: "_Tokens", site: Site) -> Any:
    return site.value


def _remove_count(tokens: "_Tokens", site: Site) -> Any:
    return tokens.alive - _least((tokens.alive - tokens.held) // 2, site.value)


class _Tokens(NamedTuple):
    """Tokens of a sample, or of each: ints, symbolic sizes or integer tensors."""

    initial: Any
    alive: Any
    prefix: Any
    held: Any


BUDGETS: MappingProxyType[str, Callable[[_Tokens, Site], Any]] = MappingProxyType(
    {
        "keep_rate": _keep_rate,
        "site_keep_rate": _site_keep_rate,
        "keep_count": _keep_count,
        "remove_count": _remove_count,
    }
)


def _budget(initial: Any, held: Any, alive: Any, prefix: int, site: Site, min_tokens: int) -> Any:
    """The one integer function: rows that a sample of `initial` tokens keeps of `alive` ones."""
    prefix = _least(initial, prefix)
    held = prefix if held is None else held
    kept = BUDGETS[site.rule](_Tokens(initial, alive, prefix, held), site)
    return _least(_most(_most(kept, held), min_tokens), alive)


@lru_cache(maxsize=256)
def _known_budget(prefix: int, site: Site, min_tokens: int) -> Callable[..., int]:
    """`_budget` at one site, of host numbers alone: lengths come back, and a site takes longer to hash than they."""

    @lru_cache(maxsize=4096)
    def budget(initial: int, held: int | None, alive: int) -> int:
        return _budget(initial, held, alive, prefix, site, min_tokens)

    return budget


def _budgets(state: TokenState, site: Site, min_tokens: int) -> Kept:
    layout, (length, prefix, initial, held, uniform, _) = state.layout, state.input
    rule = prefix, site, min_tokens
    if uniform and layout.full:
        return Kept(_known_budget(*rule)(initial[0], held and held[0], layout.rows))
    if layout.lengths is not None:
        each = map(_known_budget(*rule), initial, held or repeat(None), layout.lengths)
        return _of_host(tuple(each), layout.full)
    if site.removed is not None:
        rows = layout.rows if held is not None else _enough_rows(length, prefix, site, min_tokens)
        return Kept(rows, _budget(initial, held, state.counts, *rule))
    rows = layout.rows if held is not None else _budget(length, None, layout.rows, *rule)
    if layout.full and held is None:
        return Kept(rows)
    return Kept(rows, _budget(initial, held, state.counts, *rule).clamp(max=rows))


def _enough_rows(length: Any, prefix: int, site: Site, min_tokens: int) -> Any:
    """Rows for what is left of `length` tokens or fewer once so many were removed at each site, if there were so many.

    No more than needed where there were; and not a minimum of a minimum of ..., which symbolic sizes do not bear.
    """
    removed, most = site.removed
    few = max(2 * most + prefix + 1, min_tokens)
    return _most(length - removed, _least(length, few))


def _of_host(each: Ints, full: bool) -> Kept:
    return Kept(max(each), None if full and min(each) == max(each) else each)


# How many rows reach a score


def _reached(keys: torch.Tensor, scores: Scores, state: TokenState, site: Site, min_tokens: int) -> Kept:
    """Protected rows and the `min_tokens` best are always among them."""
    if site.rule == "top_p":
        counts = _mass_counts(keys, scores, state, site.value)
    else:
        counts = (keys >= _least_key(keys, state, site)).sum(dim=1)
    counts = counts.clamp(min=min_tokens).minimum(state.counts)
    if state.layout.lengths is None or not on_cpu(keys):
        return Kept(keys.shape[1], counts)
    return _of_host(tuple(counts.tolist()), state.layout.full)


def middle(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The upper median of each sample's counted values [B, K], 0 where none is: [B, 1]."""
    falling = values.masked_fill(~counted, -torch.inf).sort(dim=1, descending=True).values
    place = (counted.sum(dim=1, keepdim=True) - 1).clamp(min=0) // 2
    return falling.gather(1, place).clamp(min=0.0)


def relative_scores(scores: Scores, state: TokenState, rule: str) -> torch.Tensor:
    """What a rule compares with its threshold, for each row [B, K]."""
    if rule == "median_threshold":
        return scores.saliency / middle(scores.saliency, state.alive & ~state.held)
    return scores.saliency * (state.counts[:, None] if rule == "relative_threshold" else 1)


def _least_key(keys: torch.Tensor, state: TokenState, site: Site) -> Any:
    if site.rule == "median_threshold":
        return site.value * middle(keys, state.alive & ~state.held)
    if site.rule == "relative_threshold":
        return site.value * GRID
    if site.rule == "padded_threshold":
        return site.value * GRID * state.input.length
    return site.value * GRID * state.counts[:, None]


def _mass_counts(keys: torch.Tensor, scores: Scores, state: TokenState, share: float) -> torch.Tensor:  # [B]
    """The fewest rows, protected ones first, whose saliency sums to `share` of all."""
    best = scores.saliency.detach().gather(1, _order(keys, scores, keys.shape[1])).nan_to_num(nan=0.0)
    # Integers add up alike in every order, and some devices know no float64.
    units = (best * GRID * GRID).round().long()
    before = units.cumsum(dim=1) - units
    wanted = units.sum(dim=1, keepdim=True) * int(share * GRID) // int(GRID)
    needed = (before < wanted).sum(dim=1)
    return needed.maximum(state.held.sum(dim=1))


# The rows themselves


def _split(keys: torch.Tensor, scores: Scores, state: TokenState, kept: Kept, site: Site) -> Selection:
    fuse, drop = site.reduction in FUSIONS, site.reduction == "drop"
    if kept.each is None and state.layout.full:
        return _split_alike(keys, scores, kept.rows, fuse, drop, state.layout.lengths is not None)
    total = keys.shape[1]
    known = isinstance(kept.each, tuple)
    alive = state.layout.lengths if known else state.counts
    new, fused = kept.each, False
    if fuse:
        gone = tuple(min(a - k, 1) for a, k in zip(alive, new)) if known else (alive - new).clamp(max=1)
        new = tuple(k + g for k, g in zip(new, gone)) if known else new + gone
        fused = (on_device(gone, keys.device) if known else gone)[:, None] > 0
    rows = max(new) if known else _least(kept.rows + fuse, total)
    counts = on_device(new, keys.device) if known else new
    order = _order(keys, scores, rows if drop else total)
    there = torch.arange(rows, device=keys.device) < counts[:, None]
    home = _arranged(order[:, :rows], scores, drop, there)
    if state.layout.lengths is None:
        lengths, most = None, total
    else:
        lengths = new if known else tuple(counts.tolist())  # an accelerator is waited for, with all else begun
        most = max(a - n for a, n in zip(state.layout.lengths, lengths))
        home, there = home[:, : max(lengths)], there[:, : max(lengths)]
        there = None if min(lengths) == max(lengths) else there
    selection = Selection(home, there, lengths, fused, counts=counts)
    if drop or not most:
        return selection
    index = counts[:, None] + torch.arange(most, device=keys.device)
    rest = order.gather(1, index.clamp(max=total - 1))
    return selection._replace(rest=rest, rest_alive=index < state.counts[:, None])


def _split_alike(keys: torch.Tensor, scores: Scores, kept: Any, fuse: bool, drop: bool, known: bool) -> Selection:
    """Every sample has as many rows and keeps as many; known: on the host."""
    total = keys.shape[1]
    fused = fuse and (kept < total if known else (torch.arange(1, device=keys.device) < total - kept)[None])
    new = _least(kept + 1, total) if fuse else kept
    order = _order(keys, scores, new if drop else total)
    lengths = (new,) * keys.shape[0] if known else None
    home = _arranged(order[:, :new], scores, drop, None)
    if drop or (known and new == total):
        return Selection(home, None, lengths, fused)
    return Selection(home, None, lengths, fused, order[:, new:])


def _arranged(best: torch.Tensor, scores: Scores, drop: bool, there: torch.Tensor | None) -> torch.Tensor:
    """The new rows in the order in which they go on; dead ones at the end."""
    if scores.arrangement is not None:
        place = scores.arrangement.gather(1, best)
    elif drop and scores.ranking is None:
        place = best
    else:
        return best
    if place is best and there is None:
        return best.sort(dim=1).values
    if there is not None:
        place = torch.where(there, place, place + _BEHIND)
    return best.gather(1, place.argsort(dim=1))


def _order(keys: torch.Tensor, scores: Scores, rows: Any) -> torch.Tensor:  # long [B, rows]
    return best_rows(keys, rows) if scores.ranking is None else scores.ranking[:, :rows]


def best_rows(keys: torch.Tensor, rows: Any) -> torch.Tensor:
    """The `rows` rows of highest key, falling; ties in the order of their positions."""  # long [B, rows]
    if shapes_only():  # exporters know no stable sort: with its position in it, each key is unique
        total = keys.shape[1]
        keys = keys.double().clamp(-_FAR, _FAR)
        return (keys * total - torch.arange(total, device=keys.device)).topk(rows, dim=1).indices
    return keys.argsort(dim=1, descending=True, stable=True)[:, :rows]


def _least(a: Any, b: Any) -> Any:
    """The smaller of two ints, symbolic sizes or integer tensors."""
    if isinstance(b, torch.Tensor):
        a, b = b, a
    if isinstance(a, torch.Tensor):
        return a.minimum(b) if isinstance(b, torch.Tensor) else a.clamp(max=b)
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _most(a: Any, b: Any) -> Any:
    """The larger one, likewise."""
    if isinstance(b, torch.Tensor):
        a, b = b, a
    if isinstance(a, torch.Tensor):
        return a.maximum(b) if isinstance(b, torch.Tensor) else a.clamp(min=b)
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)
