"""How rows lie in memory, one layout per execution, and how they move when tokens are reduced.

    PackedRows   [1, T, D]  all alive tokens of the batch, sample after sample: no padding anywhere
    PaddedRows   [B, K, D]  the rows themselves, with a mask
    MaskedRows   [B, N, D]  every token stays where it was; reduced ones are hidden

Shapes: B samples, N input length, K rows, T alive tokens of the batch, D features.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import record_function


Ints = tuple[int, ...]


def shapes_only() -> bool:
    """Whether sizes must follow from shapes alone: under compile, export and tracing."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def named(what: str) -> AbstractContextManager:
    """Names what is done inside, where a profile is being taken."""
    if shapes_only() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return record_function(f"tokenprune: {what}")


def on_cpu(x: torch.Tensor) -> bool:
    """Where many small calls on what lies near cost less than one on padded rows; elsewhere it is the other way."""
    return x.device.type == "cpu"


def halves_on_ampere(x: torch.Tensor) -> bool:
    """Whether this is half precision on CUDA that knows bfloat16 and flash attention."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.version.cuda is not None and _capability(x.device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on_device(numbers: Any, device: torch.device) -> torch.Tensor:
    """Host numbers as a tensor, without waiting for the device: CUDA waits for all that was begun before it copies from
    memory that is not pinned."""
    numbers = torch.as_tensor(numbers, device="cpu")  # whatever the default device is
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


class Selection(NamedTuple):
    """Which rows stay, and which may go into them.

    home: the row each new row comes from, no row twice.                               # long [B, K']
    alive: which of the K' rows are tokens, None: all.                                 # bool [B, K']
    lengths: tokens per sample, on the host; None under compile and export.
    counts: the same on the device, where they are there.                              # long [B]
    fused: in which samples the last new row stands for all that do not stay; it comes from the best of them. One bool,
        where they agree.                                                              # bool [B, 1]
    rest: the other rows that do not stay, None: none, or they are dropped.            # long [B, R]
    rest_alive: which of the R are tokens, None: all.                                  # bool [B, R]
    """

    home: torch.Tensor
    alive: torch.Tensor | None
    lengths: Ints | None
    fused: torch.Tensor | bool = False
    rest: torch.Tensor | None = None
    rest_alive: torch.Tensor | None = None
    counts: torch.Tensor | None = None


class Blend(NamedTuple):
    """What new rows are made of: `own` times the row each comes from, plus `share` times each of the rest.

    own: [B, K']. target: the new row that each of the rest goes into, -1: it is dropped; long [B, R]. share: [B, R].
    size: how many input tokens each new row stands for, as attention weighs it; None where that is not followed.
        # [B, K']
    """

    own: torch.Tensor
    target: torch.Tensor
    share: torch.Tensor
    size: torch.Tensor | None


class Run(NamedTuple):
    """Neighbouring samples with equal query and key lengths, which one attention call serves.

    queries, keys: tokens of all its samples together.
    """

    samples: slice
    count: int
    queries: int
    keys: int


def parted(x: torch.Tensor, runs: list[Run], side: str) -> list[torch.Tensor]:
    """Each run's rows of packed x [1, T, ...], views [b, n, ...]. By one split: a slice's gradient is as long as x.

    side: "queries" or "keys".
    """
    parts = x[0].split([getattr(run, side) for run in runs])
    return [part.unflatten(0, (run.count, -1)) for part, run in zip(parts, runs)]


class PackedRows:
    """All alive tokens of the batch in one row `[1, T, D]`, sample after sample."""

    def __init__(
        self,
        lengths: Ints,
        device: torch.device,
        origin: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        alive: torch.Tensor | None = None,
    ):
        """lengths: alive tokens per sample; counts: the same on the device, and alive: as rows, where they are there.
        origin: where each row lay before, in the flattened padded input or in the packed row that these rows were taken
        from, long [B, K]; None: in the same place."""
        self.lengths = lengths
        self.device = device
        self._origin = origin
        self._counts = counts
        self._alive = alive
        self.samples = len(lengths)
        self.rows = max(lengths)
        self.full = min(lengths) == self.rows
        self.tokens = sum(lengths)

    @cached_property
    def counts(self) -> torch.Tensor:
        """Alive tokens per sample."""  # long [B]
        return on_device(self.lengths, self.device) if self._counts is None else self._counts

    @cached_property
    def ends(self) -> torch.Tensor:
        """Cumulative lengths from 0, as varlen kernels take them."""  # int32 [B + 1]
        return nn.functional.pad(self.counts.cumsum(0, dtype=torch.int32), (1, 0))

    @cached_property
    def starts(self) -> torch.Tensor:  # [B]
        if self.full:
            return torch.arange(0, self.tokens, self.rows, device=self.device)
        return self.ends[:-1].long()

    @cached_property
    def alive(self) -> torch.Tensor:  # bool [B, K]
        if self._alive is not None:
            return self._alive
        return torch.arange(self.rows, device=self.device) < self.counts[:, None]

    @cached_property
    def cells(self) -> torch.Tensor:
        """Where each token lies in the flattened rows [B * K]."""  # long [T]
        alive = self.alive.flatten()
        if self.device.type == "cuda":
            return torch.nonzero_static(alive, size=self.tokens)[:, 0]  # of known size: no wait for the device
        return alive.nonzero()[:, 0]

    @cached_property
    def row_index(self) -> torch.Tensor:
        """Where row k of sample b lies in the packed row; dead rows point at a token of the next sample."""  # [B, K]
        index = self.starts[:, None] + torch.arange(self.rows, device=self.device)
        return index if self.full else index.clamp(max=self.tokens - 1)

    def runs(self, keys: "PackedRows") -> list[Run]:
        """Groups neighbouring samples whose lengths agree, here (the queries) and in `keys`."""
        runs: list[Run] = []
        first = 0
        for pair, group in groupby(zip(self.lengths, keys.lengths)):
            count = len(list(group))
            runs.append(Run(slice(first, first + count), count, count * pair[0], count * pair[1]))
            first += count
        return runs

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Brings a padded input `[B, N, ...]` into this layout."""
        return self.take(x.flatten(0, 1)[None])

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Brings what lies in the layout that these rows were taken from into this one."""
        return x if self._origin is None else x.index_select(1, self._index)

    @cached_property
    def _index(self) -> torch.Tensor:
        """Where each token lay before."""  # long [T]
        origin = self._origin.flatten()
        return origin if self.full else origin.index_select(0, self.cells)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """The rows `[B, K, ...]`; dead rows hold anything finite."""
        if self.full:
            return x.view(self.samples, self.rows, *x.shape[2:])
        return x[0, self.row_index]

    def lay(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[B, K, ...]` as they lie in memory: the inverse of `spread`."""
        flat = rows.flatten(0, 1)
        return (flat if self.full else flat.index_select(0, self.cells))[None]

    def read(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What `x` [B, N, ...] holds at the rows' positions [B, K], in this layout."""
        index = _flat(positions, x.shape[1]).flatten()
        return x.flatten(0, 1).index_select(0, index if self.full else index.index_select(0, self.cells))[None]

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        """Where rows `[B, M]` lie in the flattened memory, long [B, M]."""
        return (rows + self.starts[:, None]).clamp(0, self.tokens - 1)

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Reads `x` at rows `[B, M]`: `[B, M, ...]`."""
        return x[0, self.places(rows)]

    def after(self, selection: Selection) -> "PackedRows":
        home = selection.home
        origin = home if self.samples == 1 else home + self.starts[:, None]
        return PackedRows(selection.lengths, self.device, origin, selection.counts, selection.alive)

    def only_first(self) -> "PackedRows":
        return PackedRows((1,) * self.samples, self.device, self.starts[:, None])

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Each sample's first token, `[B, ...]`."""
        return self.spread(x)[:, 0] if self.full else x[0].index_select(0, self.starts)


class PaddedRows:
    """The rows themselves, `[B, K, D]`, with a mask."""

    def __init__(self, alive: torch.Tensor, full: bool, lengths: Ints | None = None, index: torch.Tensor | None = None):
        """alive: bool [B, K]. full: known to be True throughout. lengths: alive tokens per sample, None under compile
        and export. index: the rows that these were taken from, long [B, K]; None: the same."""
        self.alive = alive
        self.full = full
        self.lengths = lengths
        self._index = index
        self.rows = alive.shape[1]

    @property
    def counts(self) -> torch.Tensor:  # long [B]
        return self.alive.sum(dim=1)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._index is None else gather_rows(x, self._index)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def lay(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def read(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return gather_rows(x, positions)

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        return _flat(rows.clamp(min=0), self.rows)

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return gather_rows(x, rows.clamp(min=0))

    def after(self, selection: Selection) -> "PaddedRows":
        alive, full = _alive(selection)
        return PaddedRows(alive, full, selection.lengths, selection.home)

    def only_first(self) -> "PaddedRows":
        return _only_first(self, _first_row(self.alive, self.full))

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Each sample's first token, `[B, ...]`."""
        return gather_rows(x, _first_row(self.alive, self.full))[:, 0]


class MaskedRows:
    """Every token stays at its place in `[B, N, D]`; `slots` says where the rows are."""

    def __init__(self, slots: torch.Tensor, alive: torch.Tensor, full: bool, length: int, lengths: Ints | None = None):
        """slots: long [B, K], no place twice. alive, full, lengths: as `PaddedRows` has them. length: N."""
        self.slots = slots
        self.alive = alive
        self.full = full
        self.length = length
        self.lengths = lengths
        self.rows = alive.shape[1]

    @property
    def counts(self) -> torch.Tensor:  # long [B]
        return self.alive.sum(dim=1)

    @property
    def visible(self) -> torch.Tensor:
        """Which of the N places hold a token that is still there."""  # [B, N]
        hidden = self.alive.new_zeros(self.alive.shape[0], self.length)
        return hidden.scatter(1, self.slots, self.alive)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        return gather_rows(x, self.slots)

    def lay(self, rows: torch.Tensor) -> torch.Tensor:
        """Zeros where no row is."""
        empty = rows.new_zeros(rows.shape[0] * self.length, *rows.shape[2:])
        laid = empty.index_copy(0, _flat(self.slots, self.length).flatten(), rows.flatten(0, 1))
        return laid.view(rows.shape[0], self.length, *rows.shape[2:])

    def read(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        return _flat(self.slots.gather(1, rows.clamp(min=0)), self.length)

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return gather_rows(x, self.slots.gather(1, rows.clamp(min=0)))

    def after(self, selection: Selection) -> "MaskedRows":
        alive, full = _alive(selection)
        return MaskedRows(self.slots.gather(1, selection.home), alive, full, self.length, selection.lengths)

    def only_first(self) -> PaddedRows:
        return _only_first(self, self.slots.gather(1, _first_row(self.alive, self.full)))

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Each sample's first token, `[B, ...]`."""
        return gather_rows(x, self.slots.gather(1, _first_row(self.alive, self.full)))[:, 0]


Layout = PackedRows | PaddedRows | MaskedRows


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [B, K, ...] at rows [B, M] -> [B, M, ...]; whole rows are copied, and not one feature after the other."""
    return x.flatten(0, 1).index_select(0, _flat(rows, x.shape[1]).flatten()).view(*rows.shape, *x.shape[2:])


def first_of(x: torch.Tensor, there: torch.Tensor, full: bool) -> torch.Tensor:
    """x [B, M, D] at the first place of each sample where something is there [B, M], [B, 1, D]; full: everywhere."""
    return x[:, :1] if full else gather_rows(x, _first_row(there, full))


def _flat(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows [B, M] of B samples of `length` places, counted through."""
    return rows + torch.arange(rows.shape[0], device=rows.device)[:, None] * length


def _first_row(alive: torch.Tensor, full: bool) -> torch.Tensor:  # long [B, 1]
    return alive.new_zeros(alive.shape[0], 1).long() if full else alive.to(torch.int32).argmax(dim=1, keepdim=True)


def _only_first(layout: PaddedRows | MaskedRows, index: torch.Tensor) -> PaddedRows:
    lengths = None if layout.lengths is None else (1,) * len(layout.lengths)
    return PaddedRows(torch.ones_like(index, dtype=torch.bool), True, lengths, index)


def _alive(selection: Selection) -> tuple[torch.Tensor, bool]:
    full = selection.alive is None
    return torch.ones_like(selection.home, dtype=torch.bool) if full else selection.alive, full
