"""Saliencies: pure functions from what a layer has at hand to one score per row.

All are computed in float32 or wider, outside autocast; no score sees another sample or padding.

Shapes: B samples, K rows, H heads, d features of a head, A = H * d; b samples of n rows are scored at a time. `..` is
how the rows of the call lie in memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import initialization as init

from .selection import GRID, Scores, best_rows
from .token_layout import Layout, PackedRows, gather_rows, halves_on_ampere, on_cpu, parted, shapes_only
from .token_state import TokenState


def first_token_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    keys: Layout,
    scaling: float,
    heads: int,
    bias: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    gradient: bool = False,
) -> torch.Tensor:
    """The class token's attention to the alive rows of its sample, mean over heads.

    Args:
        query: each sample's first query [B, A].
        key: [.., A] laid out as `keys`.
        bias: added to the logits of each key, [..].
        value: [.., A]: each head's attention is multiplied by the norm of what it would fetch (ATS, ECCV 2022).
        gradient: whether one may be asked for, now or when the layer is recomputed, which must give the same scores.

    Returns:
        [B, K], rows of alive tokens sum to 1, dead rows 0.
    """
    alive = None if keys.full else keys.alive
    with without_autocast(key):
        logits = _first_token_logits(query, key, keys, scaling, heads, gradient)  # [B, K, H]
        if bias is not None:
            logits = logits + keys.spread(bias)[..., None]
        if alive is not None:
            logits = logits.masked_fill(~alive[:, :, None], -torch.inf)
        weights = logits.softmax(dim=1)
        if value is None:
            return weights.mean(dim=2)
        return _shares((weights * keys.spread(_head_norms(value, heads))).sum(dim=2), alive)


def _first_token_logits(
    query: torch.Tensor, key: torch.Tensor, keys: Layout, scaling: float, heads: int, gradient: bool
) -> torch.Tensor:
    """Each sample's query [B, A] times its keys, head by head, scaled: [B, K, H], dead rows anything finite."""
    if not (on_cpu(key) or shapes_only() or _rounded_products(key)):
        return _product_of_matrices(query, keys.spread(key), heads, gradient) * scaling
    query = _wide(query) * scaling

    def product(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # One row for each head: multiplied and summed as the keys lie, which no product of matrices does as fast on a
        # CPU, nor in a compiled kernel; half keys are widened on the way, by the wide query.
        return (key * query).unflatten(-1, (heads, -1)).sum(dim=-1)

    if keys.full or not isinstance(keys, PackedRows) or not on_cpu(key) or shapes_only():
        return product(query[:, None], keys.spread(key))
    samples = zip(query[:, None, None], key.split(keys.lengths, dim=1))
    return keys.spread(torch.cat([product(*sample) for sample in samples], dim=1))


def _product_of_matrices(query: torch.Tensor, key: torch.Tensor, heads: int, gradient: bool) -> torch.Tensor:
    """query [B, A] times key [B, K, A], head by head, in float32 or wider: [B, K, H].

    Every head's query is a column of its own, zero outside its head: H times the multiplications, but an accelerator
    reads the keys once and writes little.
    """
    columns = torch.diag_embed(query.unflatten(-1, (heads, -1)).mT, dim1=1, dim2=3).flatten(1, 2)  # [B, A, H]
    gradient = gradient or torch.is_grad_enabled()
    if not gradient and query.dtype is key.dtype and halves_on_ampere(key) and not is_in_torch_dispatch_mode():
        return torch.bmm(key, columns, out_dtype=torch.float32)  # torch's FLOP counter has no formula for it
    return _wide(key) @ _wide(columns)


def _rounded_products(x: torch.Tensor) -> bool:
    """Whether the user lets products of matrices in float32 be rounded: scores are not. Halves are exact even then."""
    return x.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def received_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: Layout,
    scaling: float,
    heads: int,
    bias: torch.Tensor | None = None,
    diagonal: bool = True,
    votes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention each alive row receives from the alive rows of its sample, mean over heads and rows.

    Args:
        query, key: [.., A] laid out as `rows`.
        bias: added to the logits of each key, [..].
        diagonal: whether what a row gives itself counts (it does not in PoWER-BERT, ICML 2020).
        votes: how much each row's attention counts, [..]; None: alike.

    Returns:
        [B, K], rows of alive tokens sum to 1, dead rows 0.
    """

    def score(_: slice, alive: torch.Tensor | None, *parts: torch.Tensor) -> torch.Tensor:
        query, key = (_wide(x.unflatten(-1, (heads, -1)).transpose(1, 2)) for x in parts[:2])  # [b, H, n, d]
        logits = (query * scaling) @ key.mT  # [b, H, n, n]
        if bias is not None:
            logits = logits + parts[2][:, None, None]
        if alive is not None:
            logits = logits.masked_fill(~alive[:, None, None], -torch.inf)
        weights = logits.softmax(dim=-1).mean(dim=1)  # [b, n, n]
        if alive is not None:
            weights = weights.masked_fill(~alive[:, :, None], 0.0)
        if votes is not None:
            weights = weights * _shares(parts[-1], alive)[:, :, None]
            return weights.sum(dim=1) if diagonal else _shares(weights.sum(dim=1) - _diagonal(weights), alive)
        if not diagonal:
            return _shares(weights.sum(dim=1) - _diagonal(weights), alive)
        return weights.sum(dim=1) / (weights.shape[1] if alive is None else alive.sum(dim=1, keepdim=True))

    return _scores(score, rows, query, key, *(x for x in (bias, votes) if x is not None))


def key_norm_scores(key: torch.Tensor, rows: Layout, heads: int) -> torch.Tensor:
    """The norm of each row's key, mean over heads, as a share of its sample's: [B, K]."""
    with without_autocast(key):
        return _shares_of(_head_norms(key, heads).sum(dim=-1), rows)


def shift_scores(before: torch.Tensor, after: torch.Tensor, rows: Layout) -> torch.Tensor:
    """How far each row moved, ||after - before||, as a share of its sample's: [B, K]. before, after: [.., D]."""

    with without_autocast(after):
        return _shares_of(torch.linalg.vector_norm(_wide(after) - _wide(before), dim=-1), rows)


class TokenPredictor(nn.Module):
    """How likely each token is to stay, from itself and the mean of its sample. DynamicViT, NeurIPS 2021.

    Names and shapes are the reference's.

    Args:
        width: D, a multiple of 4.
    """

    def __init__(self, width: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities to stay and to go.

        Args:
            x: [b, n, D].
            counted: the rows that the mean is over, bool [b, n], or how much each of them counts; None: all.

        Returns:
            [b, n, 2], in float32 for half weights, too.
        """
        if self.in_conv[0].weight.dtype in (torch.float16, torch.bfloat16):
            wide = {name: parameter.float() for name, parameter in self.named_parameters()}
            return torch.func.functional_call(self, wide, (x, counted))
        x = x.to(self.in_conv[0].weight.dtype)  # hidden states may be narrower
        local, whole = self.in_conv(x).chunk(2, dim=-1)
        if counted is None:
            mean = whole.sum(dim=1, keepdim=True) / max(whole.shape[1], 1)
        else:
            share = counted[..., None]
            there = whole.masked_fill(~share, 0.0) if share.dtype == torch.bool else whole * share.to(whole.dtype)
            total = there.sum(dim=1, keepdim=True)
            mean = total / counted.sum(dim=1).clamp(min=1)[:, None, None].to(whole.dtype)
        return self.out_conv(torch.cat([local, mean.expand_as(whole)], dim=-1))


def learned_scores(predictor: TokenPredictor, hidden: torch.Tensor, state: TokenState) -> Scores:
    """The probability that each row behind the structural prefix stays, as a share of its sample's.

    An untrained predictor tells tokens apart by no more than rounding. To keep the reference's tokens even then, rows
    are ranked as it ranks them, ties as torch sorts them, and go on in that order, in which the next mean is summed.
    How torch sorts ties depends on how many rows there are, so each sample is scored without what pads it.

    hidden: [.., D] laid out as the state's rows.
    """
    prefix = state.input.prefix

    def score(_: slice, alive: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        if alive is None:
            stays = predictor(hidden[:, prefix:])[..., 0]
        else:
            counted = alive & (alive.cumsum(dim=1) > prefix)
            stays = predictor(hidden, counted)[..., 0].masked_fill(~counted, -torch.inf)
        place = stays.detach().argsort(dim=1, descending=True).argsort(dim=1)
        both = torch.stack([_shares(stays.exp(), alive), place.to(stays.dtype)], dim=-1)
        return nn.functional.pad(both, (0, 0, prefix if alive is None else 0, 0))

    shares, place = _scores(score, state.layout, hidden, alone=not shapes_only()).unbind(dim=-1)
    place = place.detach().masked_fill(~state.alive, torch.inf).masked_fill(state.held, -torch.inf)
    return Scores(shares, ranking=best_rows(-place, shares.shape[1]))


class TokenPrior(nn.Module):
    """What a token is worth before anything is known but its id: a table, filled by `fit_token_prior`. Empty: NaN.

    Args:
        entries: ids that there are, V.
    """

    def __init__(self, entries: int):
        super().__init__()
        self.register_buffer("worth", torch.full((entries,), torch.nan))
        self._seen_filled = False

    def reset_parameters(self) -> None:
        init.constant_(self.worth, torch.nan)
        self._seen_filled = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen_filled = False  # what was loaded may be empty

    @property
    def empty(self) -> bool:
        """Asks the device until it was filled once, and never after."""
        self._seen_filled = self._seen_filled or not bool(self.worth[0].isnan())
        return not self._seen_filled

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [..] -> [..], float32 or wider"""
        return _wide(self.worth[token_ids])


def prior_scores(prior: TokenPrior, state: TokenState) -> torch.Tensor:
    """The worth of each row's id as a share of its sample's: [B, K]. At the input alone."""
    return _shares_of(prior(state.input.token_ids), state.layout)


def random_scores(state: TokenState, layer: int, seed: int) -> torch.Tensor:
    """Chance: a function of seed, layer, the row's place in its sample and the sample's length, so that neither batch
    nor padding has a say. [B, K]"""
    prime = 2**31 - 1
    ranks = state.alive.cumsum(dim=1)
    mixed = (ranks * 48_271 + state.counts[:, None] * 69_621 + (seed % prime) * 16_807 + layer * 950_706_376) % prime
    for _ in range(4):  # squares stay below 2^62
        mixed = (mixed * mixed + mixed * 3 + 1_013_904_223) % prime
    return _shares(mixed.float() / prime, None if state.layout.full else state.alive)


def key_similarity(key: torch.Tensor, state: TokenState, heads: int) -> Scores:
    """ToMe's matching: the unprotected rows take turns as sources and targets; each source has a most similar target.

    The saliency of a source is minus that similarity, so that the most alike go first; everyone else stays. Rows go on
    as protected ones, sources, targets: the next turns depend on it. ToMe, ICLR 2023.

    Args:
        key: [.., A] laid out as the state's rows; the metric is the mean over heads.
    """
    is_source, is_target = _turns(state)
    batch, rows = is_source.shape
    half = (rows + 1) // 2
    source, target = (best_rows(which.float(), half) for which in (is_source, is_target))
    with without_autocast(key):
        keys = _wide(state.layout.spread(key)).unflatten(-1, (heads, -1))
        metric = nn.functional.normalize(keys.mean(dim=2), dim=-1)
        likeness = gather_rows(metric, source) @ gather_rows(metric, target).mT  # [B, half, half]
    best, partner = _best_of(likeness, is_target.gather(1, target))
    saliency = metric.new_full((batch, rows), torch.inf)
    saliency = saliency.scatter(1, source, torch.where(is_source.gather(1, source), -best, torch.inf))
    match = source.new_zeros(batch, rows).scatter(1, source, target.gather(1, partner))
    row = torch.arange(rows, device=key.device)
    return Scores(saliency, match, row + rows * (is_source.long() + 2 * is_target.long()))


def _turns(state: TokenState) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are sources and which are targets; protected and dead ones are neither.  bool [B, K]"""
    free = state.alive & ~state.held
    turn = free.cumsum(dim=1) - 1 + state.input.prefix
    return free & (turn % 2 == 0), free & (turn % 2 == 1)


def nearest(
    rows: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar target of each source by cosine.

    Args:
        rows: [B, K, D]. sources [B, R] and targets [B, K']: rows. candidates: targets that may be chosen, bool [B, K'].

    Returns:
        Places among the targets, long [B, R], -1 where there is no candidate; and the similarities [B, R].
    """
    with without_autocast(rows):
        rows = nn.functional.normalize(_wide(rows), dim=-1)
        likeness = gather_rows(rows, sources) @ gather_rows(rows, targets).mT  # [B, R, K']
        best, place = _best_of(likeness, candidates)
    found = candidates.any(dim=1, keepdim=True)
    return torch.where(found, place, -1), torch.where(found, best, 0.0)


def _best_of(likeness: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar candidate [B, T] of each row of likeness [B, S, T], and how similar; on the grid, so that
    rounding errors are ties, which go to the earlier one."""
    place = (likeness * GRID).round_().masked_fill_(~candidates[:, None], -torch.inf).argmax(dim=2)
    return likeness.gather(2, place[..., None])[..., 0], place


def _diagonal(maps: torch.Tensor) -> torch.Tensor:  # [b, n, n] -> [b, n]
    return maps.diagonal(dim1=1, dim2=2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _head_norms(x: torch.Tensor, heads: int) -> torch.Tensor:  # [.., A] -> [.., H]
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.unflatten(-1, (heads, -1)), dim=-1, dtype=wide)


def _shares(x: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    """x [b, n] >= 0 as shares of the alive rows' sum; equal ones where that is 0."""
    there = torch.ones_like(x) if alive is None else alive.to(x.dtype)
    x = x if alive is None else x.masked_fill(~alive, 0.0)
    total = x.sum(dim=1, keepdim=True)
    return torch.where(total > 0, x, there) / torch.where(total > 0, total, there.sum(dim=1, keepdim=True))


def _shares_of(x: torch.Tensor, rows: Layout) -> torch.Tensor:
    """x [..] >= 0, laid out as `rows`, as shares of each sample's sum: [B, K]."""
    return _shares(rows.spread(x), None if rows.full else rows.alive)


def _scores(score: Callable[..., torch.Tensor], rows: Layout, *x: torch.Tensor, alone: bool = False) -> torch.Tensor:
    """Scores [B, K] of ragged rows that see each other: a run of equal lengths at a time on a CPU, padded for the score
    alone elsewhere.

    Args:
        alone: every sample without padding wherever it lies.
        score: `(samples, alive [b, n] or None, *parts [b, n, ..]) -> [b, n, ..]`.
        x: laid out as `rows`.
    """
    everyone = slice(None)
    with without_autocast(x[0]):
        if rows.full:
            return score(everyone, None, *map(rows.spread, x))
        if alone and not isinstance(rows, PackedRows):
            return _scores_alone(score, rows.alive, *map(rows.spread, x))
        if not isinstance(rows, PackedRows) or not (alone or on_cpu(x[0])):
            return score(everyone, rows.alive, *map(rows.spread, x))
        runs = rows.runs(rows)
        given = zip(*(parted(part, runs, "keys") for part in x))
        parts = [score(run.samples, None, *each) for run, each in zip(runs, given)]
        behind = (0, 0) * (parts[0].dim() - 2)
        return torch.cat([nn.functional.pad(part, (*behind, 0, rows.rows - part.shape[1])) for part in parts])


def _scores_alone(score: Callable[..., torch.Tensor], alive: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
    """`score` of each sample's alive rows; dead rows have none, 0. x: [B, K, ..]."""
    parts = []
    for sample, rows in enumerate(alive):
        one = slice(sample, sample + 1)
        (own,) = score(one, None, *(each[one, rows] for each in x))
        parts.append(own.new_zeros(rows.shape[0], *own.shape[1:]).index_put((rows.nonzero()[:, 0],), own))
    return torch.stack(parts)


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Autocast would take float32 scores down to half precision again."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
