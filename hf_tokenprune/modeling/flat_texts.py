"""Flattened input: several texts in one row with their borders, as `DataCollatorWithFlattening` makes it.

The borders are read once. From there on each text is a sample like any other, and what comes out is brought back into
the flat layout.

Shapes: R rows of L tokens, most often one; B texts, N tokens of the longest text.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from .token_layout import Ints, on_device, shapes_only
from .value_checks import quoted


BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class FlatTexts:
    """Where the texts of a flattened input lie."""

    def __init__(self, lengths: Ints, shape: tuple[int, int], device: torch.device):
        """lengths: tokens of each text, in order. shape: (R, L)."""
        self.lengths = lengths
        self.shape = shape
        self.longest = max(lengths)
        self._sizes = on_device(lengths, device)  # [B]

    @cached_property
    def there(self) -> torch.Tensor:
        """Where a token is, bool [B, N]."""
        return torch.arange(self.longest, device=self._sizes.device) < self._sizes[:, None]

    @cached_property
    def _cells(self) -> torch.Tensor:
        """Where each token of the rows lies in the flattened [B * N], long [R * L]."""
        return torch.nonzero_static(self.there.flatten(), size=sum(self.lengths))[:, 0]

    def by_text(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, L, ...] -> [B, N, ...], zeros behind the end of a text."""
        empty = x.new_zeros(len(self.lengths) * self.longest, *x.shape[2:])
        return empty.index_copy(0, self._cells, x.flatten(0, 1)).unflatten(0, (-1, self.longest))

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, N, ...] -> [R, L, ...]"""
        return x.flatten(0, 1).index_select(0, self._cells).unflatten(0, self.shape)


def find_texts(
    shape: tuple[int, int],
    device: torch.device,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    given: Mapping[str, Any],
) -> FlatTexts | None:
    """The texts of an input [R, L]; None: it is not flattened, and each row is one sample.

    Args:
        mask: bool [R, L]. position_ids: [R, L]; where nothing else says where texts begin, ids that return to a row's
            least one do.
        given: the values of `BORDERS`, as far as there are any.

    Raises:
        ValueError: borders that do not fit the input or each other, ids that restart although there is a mask,
            borders under compile and export.
    """
    given = {name: given[name] for name in BORDERS if given.get(name) is not None}
    if given and shapes_only():
        raise ValueError(f"{' and '.join(given)} must not be given under compile and export: pad the texts")
    if "cu_seq_lens_q" in given:
        lengths = _lengths_between("cu_seq_lens_q", given["cu_seq_lens_q"], shape)
    elif "cu_seq_lens_k" in given:
        raise ValueError("cu_seq_lens_k must come with cu_seq_lens_q, which says where texts begin")
    elif "seq_idx" in given:
        lengths = _lengths_of_runs(_borders_of_indices(given["seq_idx"], shape))
    elif position_ids is None:
        return None
    else:
        borders = _restarts(position_ids.expand(shape), mask)
        if borders is None:
            return None
        lengths = _lengths_of_runs(borders)
    texts = FlatTexts(lengths, shape, device)
    _check_agreement(texts, shape, given)
    return texts


def _lengths_between(name: str, ends: Any, shape: tuple[int, int]) -> Ints:
    """Tokens of each text from cumulative lengths [B + 1]."""
    total = shape[0] * shape[1]
    numbers = _whole(ends)
    lengths = tuple(after - before for before, after in pairwise(numbers))
    if not lengths or min(lengths) < 1 or numbers[0] != 0 or numbers[-1] != total:
        raise ValueError(f"{name} ({_short(ends)}) must rise from 0 to the input's number of tokens ({total})")
    return lengths


def _whole(numbers: Any) -> list[int]:
    """Whole numbers from a tensor, array or list of them; none from anything else."""
    try:
        numbers = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError):
        return []
    return [] if numbers.ndim != 1 or numbers.is_floating_point() else numbers.tolist()


def _borders_of_indices(indices: Any, shape: tuple[int, int]) -> torch.Tensor:
    """Where a text begins, bool [R, L]."""
    indices = torch.as_tensor(indices)
    if indices.shape != shape:
        raise ValueError(f"seq_idx's shape ({list(indices.shape)}) must be the input's, {list(shape)}")
    return _with_row_starts(indices[:, 1:] != indices[:, :-1])


def _restarts(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Where a text begins by position ids [R, L], bool [R, L]; None: every row is one text.

    A row holds several where its ids return to its least one. Ids that jump elsewhere, or never go on by one, are those
    of one text, which may have any.

    Raises:
        ValueError: a row that does both, or that restarts although there is a mask.
    """
    if ids.is_meta or shapes_only():
        return _assert_one_text(ids)
    there = None
    if mask is not None:  # what lies between the tokens does not count
        order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        ids, there = ids.gather(1, order), mask.gather(1, order)[:, 1:]
    jumps, back = _jumps(ids, there)
    several = back.any(dim=1)
    if not bool(several.any()):
        return None
    shown = quoted(ids[several][0].tolist())
    if mask is not None:
        raise ValueError(
            f"position_ids ({shown}) restart within a row although there is an attention_mask: leave the mask out if "
            "the row holds several texts, or give cu_seq_lens_q"
        )
    if bool((several & (jumps != back).any(dim=1)).any()):
        raise ValueError(
            f"position_ids ({shown}) restart within a row and jump elsewhere, too: give cu_seq_lens_q if the row holds "
            "several texts, and an attention_mask if it is one"
        )
    return _with_row_starts(back)


def _jumps(ids: torch.Tensor, there: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ids [R, L] do not go on by one, and where they return to the row's least one: bool [R, L - 1] each.

    there: which of these are between tokens; None: all. With a mask a row that also jumps elsewhere is one text.
    """
    on = ids[:, 1:] == ids[:, :-1] + 1
    jumps = ~on if there is None else ~on & there
    least = ids if there is None else ids.masked_fill(~torch.nn.functional.pad(there, (1, 0), value=True), ids.max())
    back = jumps & (ids[:, 1:] == least.amin(dim=1, keepdim=True))
    back = back & (on if there is None else on & there).any(dim=1, keepdim=True)
    return jumps, back if there is None else back & (jumps == back).all(dim=1, keepdim=True)


def _assert_one_text(ids: torch.Tensor) -> None:
    """Sizes must not follow from values there. Compiled, ids that restart end the call; an export does not ask."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        _, back = _jumps(ids, None)
        torch._assert_async(~back.any(), "position_ids must not restart within a row under compile: pad the texts")


def _with_row_starts(inner: torch.Tensor) -> torch.Tensor:  # bool [R, L - 1] -> [R, L]
    return torch.nn.functional.pad(inner, (1, 0), value=True)


def _lengths_of_runs(borders: torch.Tensor) -> Ints:
    starts = borders.flatten().nonzero()[:, 0].tolist()
    return tuple(after - before for before, after in pairwise([*starts, borders.numel()]))


def _check_agreement(texts: FlatTexts, shape: tuple[int, int], given: Mapping[str, Any]) -> None:
    keys, indices = given.get("cu_seq_lens_k"), given.get("seq_idx")
    if keys is not None and _lengths_between("cu_seq_lens_k", keys, shape) != texts.lengths:
        raise ValueError(f"cu_seq_lens_k ({_short(keys)}) must be the same as cu_seq_lens_q: a text sees itself")
    for name in ("max_length_q", "max_length_k"):
        if name in given and _one(given[name]) < texts.longest:
            raise ValueError(f"{name} ({_short(given[name])}) must be the longest text's ({texts.longest}) or more")
    if indices is not None and _lengths_of_runs(_borders_of_indices(indices, shape)) != texts.lengths:
        raise ValueError(f"seq_idx ({_short(indices)}) must change where texts of cu_seq_lens_q begin")


def _one(number: Any) -> int:
    numbers = _whole(number if isinstance(number, list | tuple) else [number])
    return numbers[0] if len(numbers) == 1 else -1


def _short(given: Any) -> str:
    """What was given, for a message."""
    return quoted(given.tolist() if hasattr(given, "tolist") else given)
