"""A reduced sequence in full length again: each token with the output of the last layer that it went through whole.

Shapes: B samples, N input length, D features; `..` is how the layout of the call holds the tokens.
"""

from typing import Any

import torch

from .token_state import TokenState


try:  # since 5.20 hidden states may be chosen by their indices
    from transformers.utils.output_capturing import selected_hidden_states
except ImportError:
    selected_hidden_states = None


def wanted_states(asked: Any, layers: int) -> tuple[bool | frozenset[int], int]:
    """Which hidden states are asked for, and how many of the first are not shown at all: 0 or 1.

    All, none, or those at some indices, negative ones from the end. Before 5.20 indices counted layers.
    """
    if selected_hidden_states is None and isinstance(asked, list | tuple | set):
        return frozenset(index + 1 for index in asked), 1
    selected = selected_hidden_states(asked) if asked and selected_hidden_states is not None else None
    if selected is None:
        return bool(asked), 0
    states = layers + 1
    return frozenset(index % states for index in selected if -states <= index < states), 0


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
