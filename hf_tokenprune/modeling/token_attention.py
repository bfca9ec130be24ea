"""Attention over rows in any layout, by the kernel that the user chose with `attn_implementation`.

Packed rows never meet a padded key: on the CPU each run of equal lengths is one call of the kernel; on CUDA one varlen
call serves the batch where there is such a kernel, and rows are padded for the attention alone where there is none.

Shapes: B samples, K rows, T alive tokens of the batch, H heads, d features of a head, A = H * d.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .token_layout import Layout, MaskedRows, PackedRows, Run, halves_on_ampere, named, on_cpu, parted
from .token_state import TokenState


class AttentionKernel(NamedTuple):
    """One layer's attention function with what it needs besides queries, keys and values.

    name: the function's, as `attn_implementation` has it.
    config: the model's config, for masks.
    module: the native attention module, which the function reads (`training`, `is_causal`).
    eager: the family's own eager function.
    """

    name: str
    config: Any
    module: nn.Module
    eager: Callable
    scaling: float
    dropout: float

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query [b, n, H, d], key and value [b, m, H, d] -> context [b, n, H, d], weights [b, H, n, m] or None."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.name, self.eager)
        return function(
            self.module,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            dropout=self.dropout if self.module.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

    def mask(
        self, query: torch.Tensor, key: torch.Tensor, alive: torch.Tensor | None, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The mask that hides dead keys, in the form that this kernel takes; with a bias [b, m], added to the logits of
        each key, in the form that all take that take one at all.

        Raises:
            ValueError: dead keys, and a kernel of somebody's own for which nobody says how masks look.
        """
        if bias is not None:
            bias = bias.to(query.dtype)
            bias = bias if alive is None else bias.masked_fill(~alive, torch.finfo(query.dtype).min)
            return bias[:, None, None, :]
        if alive is None:
            return None
        if self.name not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise ValueError(
                f"attention {self.name!r} has no mask function, so padding would be attended: register one with "
                "AttentionMaskInterface, or use execution 'packed' without hooks"
            )
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=query.flatten(2),
            encoder_hidden_states=key.flatten(2),
            attention_mask=alive,
        )


def attend(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: Layout,
    keys: Layout,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Every query row attends to the alive key rows of its own sample.

    Args:
        query: [.., H, d] laid out as `queries`. key, value: [.., H, d] laid out as `keys`.
        bias: added to the logits of each key, [..] laid out as `keys`. Kernels that take none give way to SDPA.

    Returns:
        The context, laid out as `queries`, [.., A]; and the kernel's weights, if it gives any: one [b, H, n, m] per
        call, in sample order.
    """
    if bias is not None and kernel.name not in ("eager", "sdpa"):
        kernel = kernel._replace(name="sdpa")
    if isinstance(keys, PackedRows):
        return _attend_packed(kernel, query, key, value, queries, keys, bias)
    masked = isinstance(keys, MaskedRows)
    alive = keys.visible if masked else None if keys.full else keys.alive
    mask = kernel.mask(query, key, alive, bias)
    context, weights = kernel(query, key, value, mask)
    return context.flatten(2), [] if weights is None else [weights]


def _attend_packed(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: PackedRows,
    keys: PackedRows,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    if kernel.name.startswith("flash_attention"):
        with named("attention by flash attention's variable lengths"):
            context, _ = kernel(query, key, value, None, **_varlen_arguments(queries, keys))
        return context.flatten(2), []
    if queries.full and keys.full:
        query, key, value = queries.spread(query), keys.spread(key), keys.spread(value)
        mask = None if bias is None else kernel.mask(query, key, None, keys.spread(bias))
        context, weights = kernel(query, key, value, mask)
        return context.view(1, queries.tokens, -1), [] if weights is None else [weights]
    if not on_cpu(query) and kernel.name == "sdpa":
        if bias is None and has_varlen(query) and not (kernel.module.training and kernel.dropout):
            with named("attention by torch's variable lengths"):
                return _varlen(kernel, query, key, value, queries, keys), []
        with named("attention padded for itself alone"):
            return attend_by_padding(kernel, query, key, value, queries, keys, bias), []
    runs = queries.runs(keys)
    with named(f"attention in {len(runs)} runs of equal lengths"):
        return _attend_in_runs(kernel, query, key, value, runs, bias)


def _attend_in_runs(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: list[Run],
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    contexts, maps = [], []
    biases = [None] * len(runs) if bias is None else parted(bias, runs, "keys")
    parts = zip(parted(query, runs, "queries"), parted(key, runs, "keys"), parted(value, runs, "keys"), biases)
    for queries, keys, values, weight in parts:  # [b, n, H, d], and weight [b, n]
        mask = None if weight is None else kernel.mask(queries, keys, None, weight)
        context, weights = kernel(queries, keys, values, mask)
        contexts.append(context.flatten(0, 1).flatten(1))
        if weights is not None:
            maps.append(weights)
    return torch.cat(contexts)[None], maps


def attend_by_padding(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: PackedRows,
    keys: PackedRows,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Packed rows through one padded call of SDPA: the attention alone pays for padding. Returns the context
    [1, T, A]."""
    query, key, value = queries.spread(query), keys.spread(key), keys.spread(value)
    mask = keys.alive[:, None, None, :]  # transformers' own would wait for the device, to see if it is all True
    if bias is not None:
        mask = kernel.mask(query, key, keys.alive, keys.spread(bias))
    context, _ = kernel(query, key, value, mask)
    return context.flatten(2).flatten(0, 1).index_select(0, queries.cells)[None]


def has_varlen(query: torch.Tensor) -> bool:
    """Whether torch brings a variable-length kernel for this tensor: half precision on an Ampere GPU or a later one."""
    if not halves_on_ampere(query):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


def _varlen_arguments(queries: PackedRows, keys: PackedRows) -> dict[str, Any]:
    return {
        "cu_seq_lens_q": queries.ends,
        "cu_seq_lens_k": keys.ends,
        "max_length_q": queries.rows,
        "max_length_k": keys.rows,
    }


def _varlen(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: PackedRows,
    keys: PackedRows,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value, scaling = query[0], key[0], value[0], kernel.scaling
    sizes = queries.ends, keys.ends, queries.rows, keys.rows
    if torch.is_grad_enabled():
        # The kernel scales by 1 / sqrt(d) itself; whatever else the family wants goes into the queries.
        scaling = scaling * query.shape[-1] ** 0.5
        query = query if math.isclose(scaling, 1.0) else query * scaling
        context = varlen_attn(query, key, value, *sizes)
    else:  # what it calls: its wrappers take the host longer than all else in a small layer
        forward = torch.ops.aten._flash_attention_forward
        context, *_ = forward(query, key, value, *sizes, 0.0, False, False, scale=scaling)
    return context.flatten(1)[None]


def maps_at_positions(maps: list[torch.Tensor], state: TokenState) -> torch.Tensor:
    """A layer's weights at the original positions, zero where a token was gone: [B, H, N, N].

    Args:
        maps: what `attend` returned for all the state's tokens as queries and as keys. The state follows positions.
    """
    layout, length = state.layout, state.input.length
    if isinstance(layout, MaskedRows):
        hidden = layout.visible[:, None, :, None] & layout.visible[:, None, None, :]
        return maps[0].masked_fill(~hidden, 0.0)
    batch, heads = state.alive.shape[0], maps[0].shape[1]
    spread = maps[0].new_zeros(batch, heads, layout.rows, layout.rows)
    first = 0
    for weights in maps:
        spread[first : first + weights.shape[0], :, : weights.shape[2], : weights.shape[3]] = weights
        first += weights.shape[0]
    seen = state.alive[:, None, :, None] & state.alive[:, None, None, :]
    spread = spread.masked_fill(~seen, 0.0)
    positions = state.positions[:, None]  # [B, 1, K]
    by_key = spread.new_zeros(batch, heads, layout.rows, length)
    by_key = by_key.scatter_add(3, positions[:, :, None].expand_as(spread), spread)
    full = spread.new_zeros(batch, heads, length, length)
    return full.scatter_add(2, positions[..., None].expand(-1, heads, -1, length), by_key)


def context_of_map(full_map: torch.Tensor, value: torch.Tensor, state: TokenState) -> torch.Tensor:
    """What the state's tokens read by weights at the original positions [B, H, N, N]: the context, laid out as they.

    value: [.., H, d], laid out as the state's rows.
    """
    layout = state.layout
    weights, heads = full_map, full_map.shape[1]
    if not isinstance(layout, MaskedRows):
        rows = state.positions[:, None, :, None].expand(-1, heads, -1, state.input.length)
        weights = weights.gather(2, rows)  # [B, H, K, N]
        columns = state.positions[:, None, None].expand(-1, heads, layout.rows, -1)
        weights = weights.gather(3, columns).masked_fill(~state.alive[:, None, None], 0.0)  # [B, H, K, K]
        value = layout.spread(value)
    context = (weights.to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
    return context if isinstance(layout, MaskedRows) else layout.lay(context)
