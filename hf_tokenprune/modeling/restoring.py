"""A reduced sequence in full length again: each token with the output of the last layer that it went through whole.

Shapes: B samples, N input length, D features; `..` is how the layout of the call holds the tokens.
"""

import torch

from .token_state import TokenState


def show(
    hidden: torch.Tensor, state: TokenState, bank: torch.Tensor | None, wanted: bool, shown: list[torch.Tensor | None]
) -> torch.Tensor:
    """Adds the restored states [B, N, D] to those shown, None where they are not wanted; returns the rows that go on.

    They are read from what is shown, so that gradients with respect to that are right: none for tokens that are gone.
    Where masks stand for removal, what is shown is what that would leave.
    """
    full = restored(hidden, state, bank) if wanted else None
    shown.append(full)
    if full is None or not hidden.requires_grad or state.weight is not None:
        return hidden
    return state.layout.read(full, state.positions)


def deposit(hidden: torch.Tensor, before: TokenState, after: TokenState, bank: torch.Tensor | None) -> torch.Tensor:
    """Keeps the states of the tokens that a site drops: [B, N, D], zeros where no token was ever dropped."""
    full = before.layout.gather(hidden, before.carrier)
    bank = torch.zeros_like(full) if bank is None else bank
    dropped = (before.carrier >= 0) & (after.carrier < 0)
    return torch.where(dropped[..., None], full, bank)


def faded(hidden: torch.Tensor, before: torch.Tensor, state: TokenState, bank: torch.Tensor | None) -> torch.Tensor:
    """The restored states [B, N, D] after a layer where masks stand for removal: new ones by as much as is left of a
    token, and for the rest those that it had."""
    full = state.layout.gather(hidden, state.carrier)
    bank = state.layout.gather(before, state.carrier) if bank is None else bank
    share = state.weight.gather(1, state.carrier.clamp(min=0))[..., None].to(full.dtype)
    return torch.where((state.carrier >= 0)[..., None], share * full + (1 - share) * bank, torch.zeros_like(full))


def restored(hidden: torch.Tensor, state: TokenState, bank: torch.Tensor | None) -> torch.Tensor:
    """Full length [B, N, D]: alive tokens as they are, dropped ones as they were last whole, zeros for padding."""
    if state.weight is not None and bank is not None:
        return bank
    full = state.layout.gather(hidden, state.carrier)
    there = (state.carrier >= 0)[..., None]
    return torch.where(there, full, torch.zeros_like(full) if bank is None else bank)
