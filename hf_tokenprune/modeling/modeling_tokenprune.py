"""What all families share: the layer that reduces tokens, the way through the layers, and the registration.

A family says where the pieces of its layer are (`TokenPruneLayer`: a handful of short methods that call the native
modules) and how its embeddings, pooler and heads go; everything else is here, once.

Shapes: B samples, N input length, K rows, T alive tokens of the batch, D features, A attention width. `..` stands for
how the layout of the call holds the tokens: `1, T` packed, `B, K` padded, `B, N` masked.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import transformers
from packaging import version
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .pruning_config import PruningConfig, Site
from .pruning_stage import SALIENCIES
from .saliency import (
    TokenPredictor,
    first_token_scores,
    key_norm_scores,
    key_similarity,
    learned_scores,
    random_scores,
    received_scores,
    shift_scores,
)
from .selection import Scores
from .token_attention import AttentionKernel, attend, maps_at_positions
from .token_outputs import EncoderCall, LayerWork
from .token_reducer import begin_reduction
from .token_state import PackedRows, TokenState, named, shapes_only, start_state


# Rows that a feed-forward takes at a time on a CPU: enough for full speed, few enough for its caches.
FEED_FORWARD_ROWS = 1024
# A projection of so few tokens takes as long as that of a single one: the weights are read.
FEW_TOKENS = 32


class LayerPlan(NamedTuple):
    """What one layer does in one call.

    site: where tokens are reduced, None: nowhere.
    attention: the attention function's name.
    first_token_only: only each sample's first token leaves the layer.
    whole_map: every token has its attention row, even if it is dropped here.
    """

    site: Site | None
    pruning: PruningConfig | None
    attention: str
    first_token_only: bool
    whole_map: bool

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
        """What proportional attention adds to the logits of each key, [..] laid out as the state's rows."""
        if state.size is None or not self.pruning.proportional_attention:
            return None
        return state.layout.lay(state.size.log())


class LayerStates(NamedTuple):
    """The tokens on their way through one layer: those that have keys, those that attend, those that leave it."""

    entered: TokenState
    attending: TokenState
    left: TokenState


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
        - `forward` follows a `LayerPlan` and returns the `LayerStates` with the hidden states.
        - The class token's attention row is scored before the attention: tokens that are dropped here compute neither
          query, attention row, output projection nor feed-forward.
    """

    eager_attention: Callable

    @property
    def predictor(self) -> TokenPredictor | None:
        """The module `token_predictor`, where there is one."""
        return self._modules.get("token_predictor")

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

    def forward(
        self, hidden: torch.Tensor, state: TokenState, plan: LayerPlan, config: Any
    ) -> tuple[torch.Tensor, LayerStates, torch.Tensor | None]:
        """hidden [.., D], laid out as `state.layout` -> the same after the layer, the states of its tokens, and the
        attention map [B, H, N, N] if the kernel gives weights and positions are followed."""
        site = plan.site_at("before")
        if site is not None:
            with named(f"layer {site.layer}"):
                with _gradient_for(site):
                    scores = self._scores_of_input(hidden, state, site)
                reduction = begin_reduction(scores, state, site, plan.pruning)
                hidden, state = reduction.finish(_moved(hidden, state, reduction.state))
        hidden, attending, left, attention_map = self._attention_half(hidden, state, plan, config)
        return self._feed_forward_half(hidden), LayerStates(state, attending, left), attention_map

    def _attention_half(
        self, hidden: torch.Tensor, state: TokenState, plan: LayerPlan, config: Any
    ) -> tuple[torch.Tensor, TokenState, TokenState, torch.Tensor | None]:
        source = self.attention_input(hidden)
        key, value = self.key(source), self.value(source)
        query = self.query(source) if plan.asks_all(state) else None
        reduction, site = None, plan.site_at("between")
        kept = state
        if plan.first_token_only:
            kept = state.only_first()
        elif site is not None and site.saliency != "residual_shift":
            with named(f"layer {site.layer}"):
                scores = self._scores(Projections(hidden, source, query, key, value), state, plan)
                reduction = begin_reduction(scores, state, site, plan.pruning)
                kept = reduction.state
        asking = state if plan.whole_map else kept
        entered = hidden
        hidden = _moved(entered, state, asking)
        source = hidden if source is entered else _moved(source, state, asking)
        query = None if query is None else _moved(query, state, asking)
        query = self.query(source) if query is None else query
        context, maps = attend(
            self._kernel(plan, config),
            *map(self._split, (query, key, value)),
            asking.layout,
            state.layout,
            plan.bias(state),
        )
        hidden = self.attention_output(context, hidden)
        hidden = _moved(hidden, asking, kept)
        if site is not None and not plan.first_token_only:
            with named(f"layer {site.layer}"):
                if reduction is None:
                    with _gradient_for(site):
                        scores = Scores(shift_scores(entered, hidden, state.layout))
                    reduction = begin_reduction(scores, state, site, plan.pruning)
                    hidden = _moved(hidden, state, reduction.state)
                hidden, kept = reduction.finish(hidden)
        if not maps or state.positions is None:
            return hidden, asking, kept, None
        positions = asking.positions, state.positions
        full_map = maps_at_positions(maps, asking.layout, state.layout, *positions, state.input.length)
        return hidden, asking, kept, full_map

    def _kernel(self, plan: LayerPlan, config: Any) -> AttentionKernel:
        module = self.attention_module
        return AttentionKernel(
            plan.attention, config, module, self.eager_attention, module.scaling, self.attention_dropout
        )

    def _scores_of_input(self, hidden: torch.Tensor, state: TokenState, site: Site) -> Scores:
        """Scores that need no more than the layer's input."""
        if site.saliency == "random":
            return Scores(random_scores(state, site.layer, site.seed))
        if self.predictor is None:
            raise ValueError(f"layer ({site.layer}) has no token predictor; set_pruning(...) makes it one")
        return learned_scores(self.predictor, hidden, state)

    def _scores(self, given: Projections, state: TokenState, plan: LayerPlan) -> Scores:
        """The saliency of every row; with a gradient where the new rows are made with it."""
        site, layout, module = plan.site, state.layout, self.attention_module
        heads, bias = module.num_attention_heads, plan.bias(state)
        with _gradient_for(site):
            match site.saliency:
                case "cls_attention" | "cls_value_norm":
                    asks = self.query(layout.first(given.source)) if given.query is None else layout.first(given.query)
                    value = given.value if site.saliency == "cls_value_norm" else None
                    scores = first_token_scores(asks, given.key, layout, module.scaling, heads, bias, value)
                case "received_attention" | "received_from_others":
                    diagonal = site.saliency == "received_attention"
                    scores = received_scores(
                        given.query, given.key, layout, module.scaling, heads, bias, diagonal=diagonal
                    )
                case "key_norm":
                    scores = key_norm_scores(given.key, layout, heads)
                case "key_similarity":
                    return key_similarity(given.key, state, heads)
                case _:
                    return self._scores_of_input(given.hidden, state, site)
        return Scores(scores)

    def _feed_forward_half(self, hidden: torch.Tensor) -> torch.Tensor:
        """Part by part where no gradient is asked for, so that the widened states stay small and near."""
        rows = hidden.shape[0] * hidden.shape[1]
        if torch.is_grad_enabled() or shapes_only() or rows < 2 * FEED_FORWARD_ROWS or hidden.device.type != "cpu":
            return self.feed_forward_block(hidden)
        parts = hidden.flatten(0, 1).tensor_split(rows // FEED_FORWARD_ROWS)
        return torch.cat([self.feed_forward_block(part) for part in parts]).view_as(hidden)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)  # [.., H, d]


def _moved(x: torch.Tensor, before: TokenState, after: TokenState) -> torch.Tensor:
    """x [.., D], laid out as `before`'s rows -> laid out as `after`'s, which came from those or are the same."""
    return x if after.layout is before.layout else after.layout.take(x)


def _gradient_for(site: Site) -> AbstractContextManager:
    """Scores have a gradient where new tokens are made with them, and not only chosen by them."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and site.weighted)


class Prunable:
    """What base models and heads have in common for their user."""

    def set_pruning(self, pruning: PruningConfig | dict | str | None) -> None:
        """Switches the pruning from now on. None is the exact unpruned model.

        Raises:
            ValueError: quoting the value and the rule it breaks; the old pruning stays.
        """
        self.config.pruning = pruning
        self.base_model.fit_token_predictors()

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """Saves under the current parameter names, which stock models load as well as the old ones.

        `Trainer` puts a checkpoint back with `load_state_dict`, which knows no old names: saved with those, resuming
        and `load_best_model_at_end` would restore nothing.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class TokenPruneModel(Prunable):
    """The way through the layers, for base models. Goes before the native base model class.

    The family's forward embeds the tokens between `begin` and `encode`.

    Attributes:
        output_class: the native output class with the declared further fields.
        structural_tokens: how many tokens at the front of each sample every method keeps.

    Modifications:
        - Tokens are reduced between the halves of the layers, as `config.pruning` says; None prunes nothing.
        - Outputs are captured here, in full length, and not by hooks on the layers.
    """

    _can_record_outputs = {}
    output_class: type
    structural_tokens = 1

    def token_layers(self) -> nn.ModuleList:
        """The layers that tokens go through."""
        return self.layers if "layers" in self._modules else self.encoder.layer

    def post_init(self) -> None:
        self.fit_token_predictors()
        super().post_init()

    def fit_token_predictors(self) -> None:
        """Gives a new token predictor to each layer whose site needs one and that has none yet."""
        layers = self.token_layers()
        for index, site in ({} if self.config.pruning is None else self.config.pruning.sites).items():
            if site.saliency != "learned" or layers[index].predictor is not None:
                continue
            like = next(layers[index].parameters())
            with torch.device(like.device):
                predictor = TokenPredictor(self.config.hidden_size)
            layers[index].token_predictor = predictor.to(like.dtype).train(layers[index].training)
            for module in predictor.modules():
                self._init_weights(module)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a family does to the last layer's output."""
        return hidden

    def pool(self, first: torch.Tensor) -> torch.Tensor | None:
        """The `pooler_output` from each sample's first token, normalised, [B, 1, D]."""
        raise NotImplementedError

    def begin(self, call: EncoderCall | None, trace: bool | None, restore: bool, kwargs: dict[str, Any]) -> EncoderCall:
        """The call's wishes in one place: arguments first, then the config, as native models have it.

        Raises:
            ValueError: arguments of a decoder.
        """
        for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None: token pruning needs a bidirectional encoder")
        call = call or EncoderCall()
        call.trace = call.trace or bool(trace)
        call.restore = restore
        for wish in ("hidden_states", "attentions"):
            given = kwargs.get(f"output_{wish}")
            setattr(call, wish, bool(getattr(self.config, f"output_{wish}", False) if given is None else given))
        return call

    def start_tokens(
        self,
        call: EncoderCall,
        attention_mask: torch.Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
        token_ids: torch.Tensor | None = None,
    ) -> TokenState:
        """The token state of an input [B, N].

        Raises:
            ValueError: an empty input, a mask that is not [B, N], protected ids without ids to look for.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"the input's shape ({[batch, length]}) must hold at least one sample of one token")
        return start_state(
            _token_mask(attention_mask, batch, length, device),
            batch,
            length,
            execution=self._execution(),
            prefix=self.structural_tokens,
            device=device,
            protected_tokens=self._protected_tokens(token_ids, device),
            track=call.whole_sequence,
        )

    def _protected_tokens(self, token_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        pruning = self.config.pruning
        if pruning is None or not pruning.sites or not pruning.protected_token_ids:
            return None
        if token_ids is None:
            raise ValueError(
                f"protected_token_ids ({list(pruning.protected_token_ids)}) need input_ids to be found in; give those, "
                "or prune without protected ids"
            )
        return torch.isin(token_ids, torch.tensor(pruning.protected_token_ids, device=device))

    def _execution(self) -> str:
        execution = "auto" if self.config.pruning is None else self.config.pruning.execution
        # Stochastic depth draws once per sample, and a packed batch is one row.
        drop_path = getattr(self.config, "drop_path_rate", 0.0) if self.training else 0.0
        if execution == "auto":
            return "padded" if drop_path or shapes_only() else "packed"
        if execution == "packed" and drop_path:
            raise ValueError(
                f"execution ('packed') must be 'auto' or 'padded' to train with drop_path_rate ({drop_path})"
            )
        return execution

    def encode(self, embedded: list[torch.Tensor], state: TokenState, call: EncoderCall) -> Any:
        """Sends the tokens through the layers.

        Args:
            embedded: the embeddings [.., D], laid out as `state.layout`, in a list of one that is emptied: nobody
                holds them while the layers run.
            call: collects what it asks for.

        Returns:
            The model's output.
        """
        bank, hidden, layers = None, embedded.pop(), self.token_layers()
        hidden_states, attentions = [], []
        attention = self.config._attn_implementation
        call.start = state
        for index, layer in enumerate(layers):
            if call.hidden_states:
                hidden_states.append(_restore(hidden, state, bank))
            plan = self._plan(index, attention, not call.whole_sequence and index == len(layers) - 1, call)
            before, before_state = hidden, state
            hidden, states, attention_map = layer(hidden, state, plan, self.config)
            state = states.left
            if plan.site is not None and state.carrier is not None:
                bank = _deposit(before, before_state, state, bank)
            if call.attentions and attention_map is not None:
                attentions.append(attention_map)
            self._collect(call, index, plan, before_state, states)
        if call.hidden_states:
            hidden_states.append(_restore(hidden, state, bank))
        return self.output_class(
            **self._sequence_outputs(hidden, state, bank, call),
            hidden_states=tuple(hidden_states) if call.hidden_states else None,
            attentions=tuple(attentions) if call.attentions else None,
            token_trace=call.token_trace(),
        )

    def _sequence_outputs(
        self, hidden: torch.Tensor, state: TokenState, bank: torch.Tensor | None, call: EncoderCall
    ) -> dict[str, torch.Tensor | None]:
        first = self.final_norm(state.layout.first(hidden)[:, None])  # [B, 1, D]
        outputs = {"pooler_output": self.pool(first)}
        if not call.whole_sequence:
            return outputs | {"last_hidden_state": first}
        if call.restore:
            return outputs | {"last_hidden_state": self.final_norm(_restore(hidden, state, bank))}
        alive = state.alive
        rows = self.final_norm(state.layout.spread(hidden)).masked_fill(~alive[..., None], 0.0)
        positions = state.positions.masked_fill(~alive, -1)
        return outputs | {"last_hidden_state": rows, "attention_mask": alive.long(), "positions": positions}

    def _plan(self, index: int, attention: str, first_token_only: bool, call: EncoderCall) -> LayerPlan:
        pruning = self.config.pruning
        site = None if pruning is None else pruning.sites.get(index)
        if site is not None and (site.idle or (first_token_only and site.place == "between")):
            site = None  # no token is lost there, or none that is read
        return LayerPlan(site, pruning, attention, first_token_only, whole_map=call.attentions)

    def _collect(self, call: EncoderCall, index: int, plan: LayerPlan, before: TokenState, states: LayerStates) -> None:
        pruning = self.config.pruning
        if call.trace and pruning is not None and index in pruning.sites:
            call.states[index] = states.left
        if not call.work:
            return
        entered, attending, left = states
        first = plan.site is not None and SALIENCIES[plan.site.saliency].class_token
        queries = entered.counts if plan.asks_all(entered) else attending.counts + first
        counts = before.counts, entered.counts, queries, attending.counts, left.counts
        call.layer_work.append(LayerWork(*counts, plan.site, before.input.prefix))


def _token_mask(mask: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor | None:
    """bool [B, N], or None where every token is real."""
    if mask is None:
        return None
    if mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask's shape ({list(mask.shape)}) must be [batch, length], here {[batch, length]}: a token is "
            "there or not"
        )
    return mask.to(device=device, dtype=torch.bool)


def _deposit(hidden: torch.Tensor, before: TokenState, after: TokenState, bank: torch.Tensor | None) -> torch.Tensor:
    """Keeps the states of the tokens that a site drops: [B, N, D], zeros where no token was ever dropped."""
    full = before.layout.gather(hidden, before.carrier)
    bank = torch.zeros_like(full) if bank is None else bank
    dropped = (before.carrier >= 0) & (after.carrier < 0)
    return torch.where(dropped[..., None], full, bank)


def _restore(hidden: torch.Tensor, state: TokenState, bank: torch.Tensor | None) -> torch.Tensor:
    """Full length [B, N, D]: alive tokens as they are, dropped ones as they were last whole, zeros for padding."""
    full = state.layout.gather(hidden, state.carrier)
    there = (state.carrier >= 0)[..., None]
    return torch.where(there, full, torch.zeros_like(full) if bank is None else bank)


class TokenPruneHead(Prunable):
    """A task head over a `TokenPruneModel`. Goes before the native head class.

    Modifications:
        - The base model is told what the head reads, so that the last layer computes no more.
        - The output carries the token trace.

    Attributes:
        output_class: the native output class with the declared further fields.
        reads_first_token_only: whether the head looks at nothing but each sample's first token.
    """

    output_class: type
    reads_first_token_only = False

    def run_head(self, native_forward: Callable, output_token_trace: bool | None, **inputs: Any) -> Any:
        """The native head's forward over our base model, its output with the trace."""
        call = inputs.pop("encoder_call", None) or EncoderCall()
        call.first_token_only = self.reads_first_token_only
        call.trace = call.trace or bool(output_token_trace)
        outputs = native_forward(**inputs, encoder_call=call, return_dict=True)
        return self.output_class(**outputs, token_trace=call.token_trace())


class TransformersTooOld(ImportError):
    """A family needs a later release of transformers."""


def require_transformers(minimum: str, what: str) -> None:
    """Raises `TransformersTooOld` below the release that a family needs."""
    if version.parse(transformers.__version__) < version.parse(minimum):
        raise TransformersTooOld(f"{what} needs transformers >= {minimum}; this is {transformers.__version__}")


def register_family(*, config: type, natives: dict[type, type], auto: dict[str, type | tuple[type, ...]]) -> None:
    """Registers a family's classes, so that each saves itself with the code and the family's whole `auto_map`.

    Args:
        config: the family's config class.
        natives: which native class each of our model classes stands for.
        auto: the Auto class that loads each model class, by name. Of several classes it gives, as natively, the one that
            was saved, and otherwise the first.

    Raises:
        ValueError: the config class is registered already, or an Auto class names something that is not ours.
    """
    if config.family_auto_map:
        raise ValueError(f"{config.__name__} is registered already, for {sorted(config.family_auto_map)}")
    loaded = {name: classes if isinstance(classes, tuple) else (classes,) for name, classes in auto.items()}
    unknown = [cls.__name__ for classes in loaded.values() for cls in classes if cls not in natives.values()]
    if unknown:
        raise ValueError(f"{unknown} must be among the family's models: {[cls.__name__ for cls in natives.values()]}")
    module = config.__module__.rpartition(".")[2]
    config.family_auto_map = {
        name: tuple(f"{module}.{cls.__name__}" for cls in classes)
        for name, classes in {"AutoConfig": (config,), **loaded}.items()
    }
    config.register_for_auto_class()
    for name, classes in loaded.items():
        for cls in classes:
            cls.register_for_auto_class(name)
    for native, cls in natives.items():
        # Custom classes are otherwise skipped: a stock checkpoint with old key names would load at random.
        mapping = get_checkpoint_conversion_mapping(native.__name__)
        if mapping is not None:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)
