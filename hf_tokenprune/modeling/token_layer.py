"""The layer that reduces tokens, once for all families: what one layer does in one call, and in which order.

A family says where the pieces of its layer are: a handful of short methods that call the native modules.

Shapes: B samples, N input length, K rows, T alive tokens of the batch, D features, A attention width. `..` stands for
how the layout of the call holds the tokens: `1, T` packed, `B, K` padded, `B, N` masked.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .pruning_config import PruningConfig
from .pruning_objective import Objective
from .pruning_stage import SALIENCIES, Site
from .saliency import (
    TokenPredictor,
    TokenPrior,
    first_token_scores,
    key_norm_scores,
    key_similarity,
    learned_scores,
    prior_scores,
    random_scores,
    received_scores,
    shift_scores,
)
from .selection import Scores
from .soft_pruning import SoftReduction, soften, soften_learned
from .token_attention import AttentionKernel, attend, context_of_map, maps_at_positions
from .token_layout import PackedRows, named, on_cpu, shapes_only
from .token_reducer import Reduction, begin_reduction, step
from .token_state import TokenState


# Rows that a feed-forward takes at a time on a CPU: enough for full speed, few enough for its caches.
FEED_FORWARD_ROWS = 1024
# A projection of so few tokens takes as long as that of a single one: the weights are read.
FEW_TOKENS = 32
# What is added to a weight before its logarithm is taken: drawn masks are 0, and have a gradient.
TINY = 1e-8


class LayerStates(NamedTuple):
    """The tokens on their way through one layer: those that have keys, those that attend, those that leave it.

    decided: the scores that its site decided by, and the tokens that they are of; None: no site, or masks.
    """

    entered: TokenState
    attending: TokenState
    left: TokenState
    decided: tuple[Scores, TokenState] | None


@dataclass
class LayerReport:
    """What a layer tells besides its output, which is a tensor, as natively: hooks get that. It travels down as an
    argument, and a layer that is recomputed writes the same again.

    attention_map: [B, H, N, N], where it was asked for and the kernel gives weights.
    """

    states: LayerStates | None = None
    attention_map: torch.Tensor | None = None


class LayerPlan(NamedTuple):
    """What one layer does in one call.

    site: where tokens are reduced, None: nowhere.
    attention: the attention function's name.
    first_token_only: only each sample's first token leaves the layer.
    whole_map: every token has its attention row, even if it is dropped here.
    report: where it says what became of the tokens.
    soft: the objective whose masks stand for removal in this call; None: tokens are removed.
    native: the native layer does it, so that hooks on any of its modules are called as natively.
    """

    site: Site | None
    pruning: PruningConfig | None
    attention: str
    first_token_only: bool
    whole_map: bool
    report: LayerReport
    soft: Objective | None = None
    native: bool = False

    def site_at(self, place: str) -> Site | None:
        return self.site if self.site is not None and self.site.place == place else None

    def asks_all(self, state: TokenState) -> bool:
        """Whether every token's query is computed, and not the survivors' alone, the class token's before them."""
        site = self.site_at("between")
        if site is None or self.first_token_only:
            return not self.first_token_only
        few = isinstance(state.layout, PackedRows) and state.layout.tokens <= FEW_TOKENS
        return self.whole_map or few or site.whole or SALIENCIES[site.saliency].queries

    def bias(self, state: TokenState) -> torch.Tensor | None:
        """What is added to the logits of each key, [..] laid out as the state's rows: the logarithm of how many tokens
        it stands for, if attention is proportional, and of what masks left of it."""
        logs = []
        if state.size is not None and self.pruning.proportional_attention:
            logs.append(state.size.log())
        if state.weight is not None and not self.soft.method.on_hidden:
            logs.append((state.weight + TINY).log())
        return state.layout.lay(sum(logs)) if logs else None


class Projections(NamedTuple):
    """What scores are made of, all laid out as the rows of the layer: its input, what the projections are made of, and
    the projections [.., A]; `query` is None where only the survivors' are computed."""

    hidden: torch.Tensor
    source: torch.Tensor
    query: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor


class TokenPruneLayer:
    """A layer that reduces tokens before it, or between its attention and its feed-forward. Goes before the native
    layer class.

    The family gives the anatomy: accessors that call native modules, never their weights, so that adapters and
    quantised layers work. The attention's accessors default to the layout that newer native families share.

    Attributes:
        eager_attention: the family's own eager attention function.

    Modifications:
        - `forward` follows a `LayerPlan`, and writes into its report what became of the tokens.
        - The class token's attention row is scored before the attention: tokens that are dropped here compute neither
          query, attention row, output projection nor feed-forward.
    """

    eager_attention: Callable

    @property
    def predictor(self) -> TokenPredictor | None:
        """The module `token_predictor`, where there is one."""
        return self._modules.get("token_predictor")

    @property
    def prior(self) -> TokenPrior | None:
        """The module `token_prior`, where there is one."""
        return self._modules.get("token_prior")

    @property
    def attention_module(self) -> nn.Module:
        """The native module that the attention function reads."""
        return self.attention

    @property
    def head_dim(self) -> int:
        return self.attention_module.head_dim

    @property
    def attention_dropout(self) -> float:
        return self.attention_module.attention_dropout

    def uncalled_modules(self) -> list[nn.Module]:
        """Modules around the attention's projections, which are called in their place."""
        return [part for part in self.modules() if part is not self and self.attention_module in part.modules()]

    def query(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention_module.q_proj(x)

    def key(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention_module.k_proj(x)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention_module.v_proj(x)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What queries, keys and values are made of."""
        raise NotImplementedError

    def attention_output(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Output projection, residual and whatever belongs to them."""
        raise NotImplementedError

    def feed_forward_block(self, hidden: torch.Tensor) -> torch.Tensor:
        """The feed-forward half of the layer, residual and norms included."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor, state: TokenState, plan: LayerPlan, config: Any) -> torch.Tensor:
        """hidden [.., D], laid out as `state` -> [.., D] after the layer, laid out as the report's `states.left`."""
        report = plan.report
        if plan.native:
            report.states = LayerStates(state, state, state, None)
            alive = None if state.layout.full else state.alive
            return super().forward(hidden, self._kernel(plan, config).mask(hidden, hidden, alive))
        site, before = plan.site_at("before"), None
        if site is not None:
            with named(f"layer {site.layer}"):
                reduction = self._begin(hidden, state, plan, lambda: self._scores_of_input(hidden, state, plan))
                before = getattr(reduction, "decided", None)
                with step(site, "reduce"):
                    hidden = _moved(hidden, state, reduction.state)
                hidden, state = reduction.finish(hidden)
        hidden, attending, left, decided, report.attention_map = self._attention_half(hidden, state, plan, config)
        report.states = LayerStates(state, attending, left, before or decided)
        return self._feed_forward_half(hidden)

    def _attention_half(
        self, hidden: torch.Tensor, state: TokenState, plan: LayerPlan, config: Any
    ) -> tuple[torch.Tensor, TokenState, TokenState, tuple[Scores, TokenState] | None, torch.Tensor | None]:
        source = self.attention_input(hidden)
        key, value = self.key(source), self.value(source)
        query = self.query(source) if plan.asks_all(state) else None
        reduction, site = None, plan.site_at("between")
        kept = state
        if plan.first_token_only:
            kept = state.only_first()
        elif site is not None and site.saliency != "residual_shift":
            with named(f"layer {site.layer}"):
                given = Projections(hidden, source, query, key, value)
                reduction = self._begin(hidden, state, plan, lambda: self._scores(given, state, plan))
                kept = reduction.state
        asking = state if plan.whole_map else kept
        entered = hidden
        with step(site, "reduce"):
            hidden = _moved(entered, state, asking)
            source = hidden if source is entered else _moved(source, state, asking)
            query = None if query is None else _moved(query, state, asking)
        query = self.query(source) if query is None else query
        context, full_map = self._attend(query, key, value, asking, state, plan, config)
        hidden = self.attention_output(context, hidden)
        hidden = _moved(hidden, asking, kept)
        if site is not None and not plan.first_token_only:
            with named(f"layer {site.layer}"):
                if reduction is None:
                    with _gradient_for(site), step(site, "score"):
                        scores = Scores(shift_scores(entered, hidden, state.layout))
                    reduction = begin_reduction(scores, state, site, plan.pruning)
                    with step(site, "reduce"):
                        hidden = _moved(hidden, state, reduction.state)
                hidden, kept = reduction.finish(hidden)
        return hidden, asking, kept, getattr(reduction, "decided", None), full_map

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        asking: TokenState,
        state: TokenState,
        plan: LayerPlan,
        config: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The context, and the map [B, H, N, N] if it is asked for and the kernel gives weights: then the context is
        made of that very map, so that gradients reach it."""
        kernel = self._kernel(plan, config)
        query, key, value = map(self._split, (query, key, value))
        context, maps = attend(kernel, query, key, value, asking.layout, state.layout, plan.bias(state))
        if not plan.whole_map or not maps:
            return context, None
        full_map = maps_at_positions(maps, state)
        if full_map.requires_grad:
            context = context_of_map(full_map, value, state)
        return context, full_map

    def _begin(
        self, hidden: torch.Tensor, state: TokenState, plan: LayerPlan, score: Callable[[], Scores]
    ) -> Reduction | SoftReduction:
        mask = self._modules.get("token_mask")
        if plan.soft is not None and plan.site.saliency == "learned":
            return soften_learned(self.predictor, hidden, state, plan.site, plan.soft, mask)
        with _gradient_for(plan.site, plan.soft), step(plan.site, "score"):
            scores = score()
        if plan.soft is not None:
            return soften(scores.saliency, state, plan.site, plan.soft, mask)
        return begin_reduction(scores, state, self._learned(plan.site), plan.pruning)

    def _learned(self, site: Site) -> Site:
        """The site with the value that it has learned so far."""
        mask = self._modules.get("token_mask")
        return site if mask is None else replace(site, value=mask.value)

    def _kernel(self, plan: LayerPlan, config: Any) -> AttentionKernel:
        module = self.attention_module
        return AttentionKernel(
            plan.attention, config, module, self.eager_attention, module.scaling, self.attention_dropout
        )

    def _scores_of_input(self, hidden: torch.Tensor, state: TokenState, plan: LayerPlan) -> Scores:
        """Scores that need no more than the layer's input."""
        site = plan.site
        if site.saliency == "random":
            return Scores(random_scores(state, site.layer, site.seed))
        if site.saliency == "token_prior":
            return Scores(prior_scores(self.prior, state))
        if self.predictor is None:
            raise ValueError(f"layer ({site.layer}) has no token predictor; set_pruning(...) makes it one")
        return learned_scores(self.predictor, hidden, state)

    def _scores(self, given: Projections, state: TokenState, plan: LayerPlan) -> Scores:
        """The saliency of every row; with a gradient where the new rows are made with it."""
        site, layout, module = plan.site, state.layout, self.attention_module
        heads, bias = module.num_attention_heads, plan.bias(state)
        votes = None if state.weight is None or plan.soft.method.on_hidden else layout.lay(state.weight)
        match site.saliency:
            case "cls_attention" | "cls_value_norm":
                asks = self.query(layout.first(given.source)) if given.query is None else layout.first(given.query)
                value = given.value if site.saliency == "cls_value_norm" else None
                gradient = site.weighted or plan.soft is not None
                scores = first_token_scores(asks, given.key, layout, module.scaling, heads, bias, value, gradient)
            case "received_attention" | "received_from_others":
                diagonal = site.saliency == "received_attention"
                scores = received_scores(
                    given.query, given.key, layout, module.scaling, heads, bias, diagonal=diagonal, votes=votes
                )
            case "key_norm":
                scores = key_norm_scores(given.key, layout, heads)
            case "key_similarity":
                return key_similarity(given.key, state, heads)
            case _:
                return self._scores_of_input(given.hidden, state, plan)
        return Scores(scores)

    def _feed_forward_half(self, hidden: torch.Tensor) -> torch.Tensor:
        """Part by part where nothing is trained, so that the widened states stay small and near."""
        rows = hidden.shape[0] * hidden.shape[1]
        # In training what is recomputed for its gradient must draw the same dropout as the pass without one.
        whole = self.training or torch.is_grad_enabled() or shapes_only()
        if whole or rows < 2 * FEED_FORWARD_ROWS or not on_cpu(hidden):
            return self.feed_forward_block(hidden)
        parts = hidden.flatten(0, 1).tensor_split(rows // FEED_FORWARD_ROWS)
        return torch.cat([self.feed_forward_block(part) for part in parts]).view_as(hidden)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)  # [.., H, d]


def _moved(x: torch.Tensor, before: TokenState, after: TokenState) -> torch.Tensor:
    """x [.., D], laid out as `before`'s rows -> laid out as `after`'s, which came from those or are the same."""
    return x if after.layout is before.layout else after.layout.take(x)


def _gradient_for(site: Site, soft: Objective | None = None) -> AbstractContextManager:
    """Scores have a gradient where new tokens or masks are made with them, and not only choices."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and (site.weighted or soft is not None))
