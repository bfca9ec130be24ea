"""Who is alive, where each token came from, and for how many it stands.

Decisions are taken in *rows*: `[B, K]`, the alive tokens of each sample in order, K at least as many as the longest
sample has. How rows lie in memory is the business of a layout.

How many tokens each sample has is known on the host in eager mode: it is read once at the input, and after that only
where the scores themselves decide it. Under compile and export sizes follow from shapes alone.

Shapes: B samples, N input length, K rows, D features.
"""

from typing import NamedTuple

import torch

from .token_layout import Blend, Ints, Layout, MaskedRows, PackedRows, PaddedRows, Selection, shapes_only


class TokenInput(NamedTuple):
    """What every state of a call has in common.

    length: N, the padded length of the input.
    prefix: structural tokens at the front of each sample ([CLS], registers, distillation).
    initial: tokens of each sample at the input, prefix included; a tensor [B] under compile and export.
    protected: tokens of each sample that every method keeps, likewise; None: the prefix alone.
    uniform: known to be as many in every sample, both.
    token_ids: laid out as the first layer's input, [..]; None: there are none, or nobody asks.
    """

    length: int
    prefix: int
    initial: Ints | torch.Tensor
    protected: Ints | torch.Tensor | None
    uniform: bool
    token_ids: torch.Tensor | None = None

    @property
    def padded(self) -> bool:
        """Whether places are without a token; under compile and export, whether they may be."""
        return isinstance(self.initial, torch.Tensor) or min(self.initial) < self.length


class TokenState(NamedTuple):
    """The tokens of a batch on their way through the layers. Never changed; only `weight` may have a gradient.

    layout: how the rows lie in memory, and which are alive.
    input: what the call started with.
    protected: rows that every method keeps, prefix included; None: the prefix alone.        # bool [B, K]
    positions: the original position of each row; None where nobody asks.                    # long [B, K]
    carrier: the row that carries each original position, -1 where it is gone; None likewise. # long [B, N]
    size: input tokens that each row stands for, as attention weighs it; None: one, everywhere, or nobody asks.
        # float32 [B, K]
    weight: what is left of each row where masks stand for removal, in [0, 1], dead rows 0; None: all of it.
        # float32 [B, K]
    """

    layout: Layout
    input: TokenInput
    protected: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    carrier: torch.Tensor | None = None
    size: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    @property
    def alive(self) -> torch.Tensor:  # bool [B, K]
        return self.layout.alive

    @property
    def counts(self) -> torch.Tensor:
        """Alive tokens per sample; with weights as many as is expected."""  # long [B], or float32 [B]
        return self.layout.counts if self.weight is None else self.weight.sum(dim=1)

    @property
    def weights(self) -> torch.Tensor:  # float32 [B, K]
        return self.alive.float() if self.weight is None else self.weight

    @property
    def held(self) -> torch.Tensor:
        """Rows that every method keeps, the prefix included."""  # bool [B, K]
        if self.protected is not None:
            return self.protected
        return self.alive & (self.alive.cumsum(dim=1) <= self.input.prefix)

    def after(self, selection: Selection, blend: Blend | None = None) -> "TokenState":
        """The state once only the selected rows are left, with the rest in them as `blend` says, or dropped."""
        layout, home = self.layout.after(selection), selection.home
        size = None if self.size is None else self.size.gather(1, home)
        if self.protected is None and self.carrier is None:
            return TokenState(layout, self.input, size=size if blend is None else blend.size)
        return TokenState(
            layout,
            self.input,
            None if self.protected is None else self.protected.gather(1, home) & layout.alive,
            None if self.positions is None else self.positions.gather(1, home),
            None if self.carrier is None else self._follow(selection, layout.alive, blend),
            size if blend is None else blend.size,
        )

    def _follow(self, selection: Selection, alive: torch.Tensor, blend: Blend | None) -> torch.Tensor:
        """The carrier once rows have moved."""
        home, rest = selection.home, selection.rest
        rows = torch.arange(home.shape[1], device=home.device).expand_as(home)
        nowhere = self.alive.shape[1]  # a column that nobody reads
        target = torch.full((home.shape[0], nowhere + 1), -1, dtype=torch.long, device=home.device)
        target = target.scatter(1, home, torch.where(alive, rows, -1))  # [B, K + 1]
        if blend is not None and rest is not None:
            rest = rest if selection.rest_alive is None else torch.where(selection.rest_alive, rest, nowhere)
            target = target.scatter(1, rest, blend.target)
        return torch.where(self.carrier >= 0, target.gather(1, self.carrier.clamp(min=0)), -1)

    def only_first(self) -> "TokenState":
        """The state once only each sample's first token is left, with nothing followed any more."""
        return TokenState(self.layout.only_first(), self.input)

    def ranked_carrier(self) -> torch.Tensor:
        """`carrier` in ranks among the alive tokens of the own sample, -1 where the token is gone."""  # [B, N]
        ranks = self.alive.cumsum(dim=1) - 1
        return torch.where(self.carrier >= 0, ranks.gather(1, self.carrier.clamp(min=0)), -1)

    def ranked_sizes(self) -> torch.Tensor:
        """What the alive tokens of each sample stand for, by rank; zeros behind the last."""  # float32 [B, N]
        carrier = self.ranked_carrier()
        if self.size is None:
            counted = carrier.new_zeros(carrier.shape[0], carrier.shape[1] + 1)
            return counted.scatter_add(1, carrier + 1, torch.ones_like(carrier))[:, 1:].float()
        ranks = torch.where(self.alive, self.alive.cumsum(dim=1), 0)
        sizes = self.size.new_zeros(carrier.shape[0], carrier.shape[1] + 1)
        return sizes.scatter(1, ranks, torch.where(self.alive, self.size, 0.0))[:, 1:].float()


def blended(hidden: torch.Tensor, before: Layout, after: Layout, selection: Selection, blend: Blend) -> torch.Tensor:
    """New rows from old ones: hidden [.., D], laid out as `before` -> laid out as `after`.

    Sums are in float32 or wider.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = after.take(hidden).to(wide) * after.lay(blend.own.to(wide))[..., None]
    if selection.rest is not None:
        share = blend.share.to(wide)[..., None]
        parts = before.gather(hidden, selection.rest).to(wide)
        if selection.rest_alive is not None:  # what lies there is another sample's, and 0 x NaN is NaN
            parts = parts.masked_fill(~selection.rest_alive[..., None], 0.0)
        parts = (parts * share).flatten(0, 1)
        rows = rows.flatten(0, 1).index_add(0, after.places(blend.target.clamp(min=0)).flatten(), parts).view_as(rows)
    return rows.to(hidden.dtype)


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
        mask: [B, N] of any type, 1 where a token is and 0 elsewhere; None: everywhere. A sample without any token
            counts its first place.
        execution: `"packed"`, `"padded"` or `"masked"`.
        prefix: structural tokens at the front of each sample.
        protected_tokens: bool [B, N], further tokens that every method keeps.
        track: whether positions are followed, for traces, restored sequences and maps.

    Raises:
        ValueError: a mask of another shape, or with other values.
    """
    lengths, alive = _lengths(mask, batch, length, device)
    protected = counts = None
    if protected_tokens is not None:
        there = torch.ones_like(protected_tokens) if alive is None else alive
        protected = there & (protected_tokens | (there.cumsum(dim=1) <= prefix))
        counts = protected.sum(dim=1)
        counts = counts if lengths is None else tuple(counts.tolist())
    places = None
    if track or execution != "packed" or alive is not None:
        places = torch.arange(length, device=device).expand(batch, length)
    layout, positions, carrier = _start_layout(execution, alive, lengths, places, batch, device)
    if protected is not None and execution == "packed" and alive is not None:
        protected = protected.gather(1, positions)
    uniform = lengths is not None and layout.full and (counts is None or len(set(counts)) == 1)
    given = TokenInput(length, prefix, layout.counts if lengths is None else lengths, counts, uniform)
    if not track:
        positions = carrier = None
    return TokenState(layout, given, protected, positions, carrier)


def _lengths(
    given: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Ints | None, torch.Tensor | None]:
    """Tokens of each sample on the host, and the mask in whose empty rows the first place counts; None where every
    token is real. One synchronisation on an accelerator; under compile and export no lengths."""
    if given is None:
        return None if shapes_only() else (length,) * batch, None
    check_mask_shape(given, batch, length)
    given = given.to(device)
    mask = given.to(torch.bool)
    lengths = None if shapes_only() else _counted(mask, given)
    if lengths is not None and min(lengths) == length:
        return lengths, None
    if lengths is None or min(lengths) == 0:
        mask = mask | (~mask.any(dim=1, keepdim=True) & (torch.arange(length, device=mask.device) == 0))
    return None if lengths is None else tuple(max(1, tokens) for tokens in lengths), mask


def check_mask_shape(mask: torch.Tensor | None, batch: int, length: int) -> None:
    """Raises a ValueError for a mask that is not [B, N]."""
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask's shape ({list(mask.shape)}) must be [batch, length], here {[batch, length]}: a token is "
            "there or not"
        )


def _counted(mask: torch.Tensor, given: torch.Tensor) -> Ints:
    if given.dtype == torch.bool:
        return tuple(mask.sum(dim=1).tolist())
    strange = given != mask
    lengths, wrong = torch.stack([mask.sum(dim=1), strange.sum(dim=1)]).tolist()
    if any(wrong):
        raise ValueError(f"attention_mask holds {given[strange][0].item()}, and must hold 0 and 1 alone")
    return tuple(lengths)


def _start_layout(
    execution: str,
    alive: torch.Tensor | None,
    lengths: Ints | None,
    places: torch.Tensor | None,
    batch: int,
    device: torch.device,
) -> tuple[Layout, torch.Tensor | None, torch.Tensor | None]:
    """The first layout, with the positions of its rows and the row at each position."""
    if execution == "packed" and alive is None:
        return PackedRows(lengths, device), places, places
    if execution == "packed":
        # A sort: asking for the places of True would be a synchronisation on an accelerator.
        positions = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(lengths)]
        origin = positions + torch.arange(batch, device=device)[:, None] * places.shape[1]
        return PackedRows(lengths, device, origin), positions, torch.where(alive, alive.cumsum(dim=1) - 1, -1)
    full = alive is None
    alive = torch.ones_like(places, dtype=torch.bool) if full else alive
    carrier = torch.where(alive, places, -1)
    if execution == "padded":
        return PaddedRows(alive, full, lengths), places, carrier
    return MaskedRows(places, alive, full, places.shape[1], lengths), places, carrier
