"""Who is alive, where each token lies, and how rows move when tokens are reduced.

Decisions are taken in *rows*: `[B, K]`, the alive tokens of each sample in order, K at least as many as the longest
sample has. How rows lie in memory is the business of a layout, one per execution:

    PackedRows   [1, T, D]  all alive tokens of the batch, sample after sample: no padding anywhere
    PaddedRows   [B, K, D]  the rows themselves, with a mask
    MaskedRows   [B, N, D]  every token stays where it was; reduced ones are hidden

Shapes: B samples, N input length, K rows, T alive tokens of the batch, D features, H heads.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class Selection:
    """Which rows stay.

    home: the row each kept row comes from, no row twice, dead rows included.  # long [B, K']
    alive: which of the K' rows are tokens.                                    # bool [B, K']
    full: known to be alive throughout, without looking at the tensor.
    """

    home: torch.Tensor
    alive: torch.Tensor
    full: bool
    known_lengths: list[int] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens per sample, on the host."""
        if self.full:
            return [self.alive.shape[1]] * self.alive.shape[0]
        return self.alive.sum(dim=1).tolist() if self.known_lengths is None else self.known_lengths


@dataclass(frozen=True)
class Run:
    """Neighbouring samples with equal query and key lengths, which one attention call serves."""

    samples: slice
    queries: slice
    keys: slice
    count: int


class PackedRows:
    """All alive tokens of the batch in one row `[1, T, D]`, sample after sample."""

    def __init__(self, lengths: list[int], device: torch.device, entry: torch.Tensor | None = None):
        """lengths: alive tokens per sample. entry: where the tokens lay in the flattened padded input, long [T]."""
        self.lengths = lengths
        self.device = device
        self._entry = entry
        self.rows = max(lengths)
        self.full = min(lengths) == self.rows

    @cached_property
    def ends(self) -> torch.Tensor:
        """Cumulative lengths from 0, as varlen kernels take them."""  # int32 [B + 1]
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0, dtype=torch.int32)

    @cached_property
    def starts(self) -> torch.Tensor:  # [B]
        return self.ends[:-1].long()

    @cached_property
    def alive(self) -> torch.Tensor:  # [B, K]
        counts = torch.tensor(self.lengths, device=self.device)
        return torch.arange(self.rows, device=self.device) < counts[:, None]

    @cached_property
    def row_index(self) -> torch.Tensor:
        """Where row k of sample b lies in the packed row; dead rows point at a token of the next sample."""  # [B, K]
        index = self.starts[:, None] + torch.arange(self.rows, device=self.device)
        return index if self.full else index.clamp(max=sum(self.lengths) - 1)

    def runs(self, keys: "PackedRows") -> list[Run]:
        """Groups neighbouring samples whose lengths agree, here (the queries) and in `keys`."""
        runs: list[Run] = []
        query_start = key_start = first = 0
        for sample, pair in enumerate(zip(self.lengths, keys.lengths)):
            last = sample + 1 == len(self.lengths)
            if not last and pair == (self.lengths[sample + 1], keys.lengths[sample + 1]):
                continue
            count = sample + 1 - first
            query_end, key_end = query_start + count * pair[0], key_start + count * pair[1]
            runs.append(Run(slice(first, sample + 1), slice(query_start, query_end), slice(key_start, key_end), count))
            query_start, key_start, first = query_end, key_end, sample + 1
        return runs

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Brings a padded input `[B, N, ...]` into this layout."""
        flat = x.flatten(0, 1)
        return (flat if self._entry is None else flat.index_select(0, self._entry))[None]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """The rows `[B, K, ...]`; dead rows hold anything finite."""
        if self.full:
            return x.view(len(self.lengths), self.rows, *x.shape[2:])
        return x[0, self.row_index]

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Reads `x` at rows `[B, M]`: `[B, M, ...]`."""
        return x[0, (rows + self.starts[:, None]).clamp(0, x.shape[1] - 1)]

    def take(self, x: torch.Tensor, selection: Selection) -> torch.Tensor:
        """Only the rows that stay, packed again."""
        index = selection.home + self.starts[:, None]
        index = index.flatten() if selection.full else index[selection.alive]
        return x.index_select(1, index)

    def after(self, selection: Selection) -> "PackedRows":
        return PackedRows(selection.lengths, self.device)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Each sample's first token as `[1, B, ...]`."""
        return x.index_select(1, self.starts)

    def only_first(self) -> "PackedRows":
        return PackedRows([1] * len(self.lengths), self.device)


class PaddedRows:
    """The rows themselves, `[B, K, D]`, with a mask."""

    def __init__(self, alive: torch.Tensor, full: bool):
        self.alive = alive  # [B, K]
        self.full = full
        self.rows = alive.shape[1]

    @property
    def first_row(self) -> torch.Tensor:  # [B, 1]
        return self.alive.to(torch.int32).argmax(dim=1, keepdim=True)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        index = rows.clamp(min=0).view(*rows.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def take(self, x: torch.Tensor, selection: Selection) -> torch.Tensor:
        return self.gather(x, selection.home)

    def after(self, selection: Selection) -> "PaddedRows":
        return PaddedRows(selection.alive, selection.full)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Each sample's first token as `[B, 1, ...]`."""
        return x[:, :1] if self.full else self.gather(x, self.first_row)

    def only_first(self) -> "PaddedRows":
        return PaddedRows(self.alive.new_ones(self.alive.shape[0], 1), full=True)


class MaskedRows:
    """Every token stays at its place in `[B, N, D]`; `slots` says where the rows are."""

    def __init__(self, slots: torch.Tensor, alive: torch.Tensor, length: int):
        self.slots = slots  # [B, K]
        self.alive = alive  # [B, K]
        self.length = length
        self.rows = alive.shape[1]
        self.full = False

    @property
    def visible(self) -> torch.Tensor:
        """Which of the N places hold a token that is still there."""  # [B, N]
        hidden = self.alive.new_zeros(self.alive.shape[0], self.length)
        return hidden.scatter(1, self.slots, self.alive)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        return PaddedRows(self.alive, self.full).gather(x, self.slots)

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return PaddedRows(self.alive, self.full).gather(x, self.slots.gather(1, rows.clamp(min=0)))

    def take(self, x: torch.Tensor, selection: Selection) -> torch.Tensor:
        return x

    def after(self, selection: Selection) -> "MaskedRows":
        # All K homes are kept distinct, so that `visible` never writes one place twice.
        return MaskedRows(self.slots.gather(1, selection.home), selection.alive, self.length)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Each sample's first token as `[B, 1, ...]`."""
        return self.gather(x, PaddedRows(self.alive, self.full).first_row)

    def only_first(self) -> PaddedRows:
        return PaddedRows(self.alive, self.full).only_first()


Layout = PackedRows | PaddedRows | MaskedRows


@dataclass(frozen=True)
class TokenState:
    """The tokens of a batch on their way through the layers. Holds no differentiable tensor and is never changed.

    layout: how the rows lie in memory, and which are alive.
    length: N, the padded length of the input.
    uniform_length: the tokens of every sample at the input, where all have as many and that is known on the host.
    initial: tokens of each sample at the input, prefix included.                            # long [B]
    prefix: structural tokens at the front of each sample ([CLS], registers, distillation).
    protected: rows that every method keeps.                                                 # bool [B, K]
    fixed_protection: protection is the prefix alone, so counts follow from lengths.
    positions: the original position of each row; None where nobody asks.                    # long [B, K]
    carrier: the row that carries each original position, -1 where it is gone; None likewise. # long [B, N]
    """

    layout: Layout
    length: int
    uniform_length: int | None
    initial: torch.Tensor
    prefix: int
    protected: torch.Tensor
    fixed_protection: bool
    positions: torch.Tensor | None
    carrier: torch.Tensor | None

    @property
    def alive(self) -> torch.Tensor:
        return self.layout.alive

    @property
    def counts(self) -> torch.Tensor:
        """Alive tokens per sample."""  # [B]
        return self.alive.sum(dim=1)

    def after(self, selection: Selection) -> "TokenState":
        """The state once only the selected rows are left."""
        return replace(
            self,
            layout=self.layout.after(selection),
            protected=self.protected.gather(1, selection.home) & selection.alive,
            positions=None if self.positions is None else self.positions.gather(1, selection.home),
            carrier=None if self.carrier is None else _follow(self.carrier, self.alive, selection),
        )

    def only_first(self) -> "TokenState":
        """The state once only each sample's first token is left, with nothing followed any more."""
        layout = self.layout.only_first()
        return replace(self, layout=layout, protected=layout.alive, positions=None, carrier=None)

    def ranked_carrier(self) -> torch.Tensor:
        """`carrier` in ranks among the alive tokens of the own sample, -1 where the token is gone."""  # [B, N]
        ranks = self.alive.cumsum(dim=1) - 1
        return torch.where(self.carrier >= 0, ranks.gather(1, self.carrier.clamp(min=0)), -1)


def _follow(carrier: torch.Tensor, alive: torch.Tensor, selection: Selection) -> torch.Tensor:
    rows = torch.arange(selection.home.shape[1], device=carrier.device).expand_as(selection.home)
    target = torch.full(alive.shape, -1, dtype=torch.long, device=carrier.device)
    target = target.scatter(1, selection.home, torch.where(selection.alive, rows, -1))  # [B, K]
    return torch.where(carrier >= 0, target.gather(1, carrier.clamp(min=0)), -1)


def start_state(
    mask: torch.Tensor | None,
    batch: int,
    length: int,
    *,
    execution: str,
    prefix: int,
    device: torch.device,
    protected_tokens: torch.Tensor | None = None,
    track: bool = False,
) -> TokenState:
    """The state at the input of the first layer.

    Args:
        mask: bool [B, N], True where a token is; None: everywhere. A sample without any token counts its first place.
        execution: `"packed"`, `"padded"` or `"masked"`.
        prefix: structural tokens at the front of each sample.
        protected_tokens: bool [B, N], further tokens that every method keeps.
        track: whether positions are followed, for traces, restored sequences and maps.
    """
    positions = torch.arange(length, device=device).expand(batch, length)
    if mask is None:
        alive = torch.ones(batch, length, dtype=torch.bool, device=device)
    else:
        none_alive = ~mask.any(dim=1, keepdim=True)
        alive = mask | (none_alive & (positions == 0))
    ranks = alive.cumsum(dim=1)  # from 1
    protected = alive & (ranks <= prefix)
    if protected_tokens is not None:
        protected = protected | (alive & protected_tokens)

    uniform_length = length if mask is None else None
    if execution != "packed":
        layout = PaddedRows(alive, mask is None) if execution == "padded" else MaskedRows(positions, alive, length)
        carrier = torch.where(alive, positions, -1)
    elif mask is None:
        layout, carrier = PackedRows([length] * batch, device), positions
    else:
        layout = PackedRows(alive.sum(dim=1).tolist(), device, entry=alive.flatten().nonzero().squeeze(1))
        uniform_length = layout.rows if layout.full else None
        carrier = torch.where(alive, ranks - 1, -1)
        positions = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : layout.rows]
        protected = protected.gather(1, positions)
    return TokenState(
        layout=layout,
        length=length,
        uniform_length=uniform_length,
        initial=alive.sum(dim=1),
        prefix=prefix,
        protected=protected,
        fixed_protection=protected_tokens is None,
        positions=positions if track else None,
        carrier=carrier if track else None,
    )
