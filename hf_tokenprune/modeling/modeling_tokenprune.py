"""What all families share: the way through the layers, heads, and the registration.

A family says where the pieces of its layer are (`token_layer`) and how its embeddings, pooler and heads go; everything
else is here, once.

Shapes: B samples, N input length, K rows, T alive tokens of the batch, D features. `..` stands for how the layout of
the call holds the tokens: `1, T` packed, `B, K` padded, `B, N` masked.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from .call_arguments import check_arguments, wanted_states
from .flat_texts import BORDERS, find_texts
from .hooks import hooked_modules, warn_of_uncalled
from .model_repository import ModelRepository
from .pruner_modules import ASKED, PrunerModules
from .pruning_config import PruningConfig
from .pruning_objective import Objective
from .pruning_stage import SALIENCIES
from .restoring import deposit, faded, restored, show
from .saliency import TokenPrior
from .soft_pruning import SoftModule, objective_loss
from .token_layer import LayerPlan, LayerReport, LayerStates
from .token_layout import first_of, shapes_only
from .token_outputs import EncoderCall, LayerWork
from .token_state import TokenState, check_mask_shape, start_state
from .value_checks import quoted


logger = logging.get_logger(__name__)


class Prunable(ModelRepository):
    """What base models and heads have in common for their user."""

    model_tags = ["token-pruning", "hf_tokenprune"]

    def set_pruning(self, pruning: PruningConfig | dict | str | None) -> None:
        """Switches the pruning from now on. None is the exact unpruned model. What an objective has learned so far goes
        with the old one, unless `settle_pruning` wrote it into that first.

        Raises:
            ValueError: quoting the value and the rule it breaks; the old pruning stays.
        """
        self.config.pruning = pruning
        self.base_model.fit_pruner()

    def set_budget(self, macs: float) -> None:
        """Switches to the values that cost this MAC ratio, between those of the pruning's budgets; 1: nothing pruned.

        Raises:
            ValueError: a pruning without budgets, or a ratio that none of them reaches; the old values stay.
        """
        if self.config.pruning is None:
            raise ValueError(f"budget ({quoted(macs)}) needs a pruning with budgets, and this model has none")
        self.set_pruning(self.config.pruning.at_budget(macs, self.base_model.longest_input))

    def settle_pruning(self) -> None:
        """Ends the training of a pruning: what was learned becomes the values of its sites, without parameters."""
        pruning = self.config.pruning
        if pruning is None or pruning.objective is None:
            return
        self.set_pruning(replace(self.base_model.learned_pruning(), objective=None))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SoftModule | TokenPrior):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves under the current parameter names, which stock models load as well as the old ones.

        `Trainer` puts a checkpoint back with `load_state_dict`, which knows no old names: saved with those, resuming
        and `load_best_model_at_end` would restore nothing. What the pruning does not ask stays behind.
        """
        unused = tuple(f"{name}." for name in self._unused_modules())
        if unused:
            weights = state_dict or self.state_dict()
            state_dict = {name: value for name, value in weights.items() if not name.startswith(unused)}
        super().save_pretrained(
            save_directory, is_main_process, state_dict, *args, save_original_format=save_original_format, **kwargs
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """A table of what ids are worth grows with them: new ones are worth the mean."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.base_model.fit_pruner()
        return embeddings

    def _unused_modules(self) -> list[str]:
        """Names of the predictors and tables of layers whose site does not ask them."""
        sites = {} if self.config.pruning is None else self.config.pruning.sites
        names = {id(module): name for name, module in self.named_modules()}
        return [
            f"{names[id(layer)]}.{ASKED[saliency]}"
            for index, layer in enumerate(self.base_model.token_layers())
            for saliency in ASKED
            if ASKED[saliency] in layer._modules and (index not in sites or sites[index].saliency != saliency)
        ]


class TokenPruneModel(PrunerModules, Prunable):
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

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a family does to the last layer's output."""
        return hidden

    def pool(self, first: torch.Tensor) -> torch.Tensor | None:
        """The `pooler_output` from each sample's first token, normalised, [B, 1, D]."""
        raise NotImplementedError

    def begin(
        self,
        call: EncoderCall | None,
        trace: bool | None,
        restore: bool,
        kwargs: dict[str, Any],
        further: Collection[str] = (),
    ) -> EncoderCall:
        """The call's wishes in one place: arguments first, then the config, as native models have it.

        further: names among kwargs that the family's forward has read.

        Raises:
            ValueError: arguments of a decoder.
            TypeError: arguments that nobody knows.
        """
        check_arguments(kwargs, further)
        if call is None and self.softening is not None:
            logger.warning_once(
                "The pruning's objective adds to the loss, and a base model has none: add the output's `pruning_loss` "
                "to yours."
            )
        call = call or EncoderCall()
        call.trace = call.trace or bool(trace)
        call.restore = restore is None or bool(restore)
        given = {wish: kwargs.get(f"output_{wish}") for wish in ("hidden_states", "attentions")}
        asked = {w: getattr(self.config, f"output_{w}", False) if v is None else v for w, v in given.items()}
        call.attentions = bool(asked["attentions"])
        call.hidden_states, call.first_shown = wanted_states(asked["hidden_states"], len(self.token_layers()))
        call.native_layers, call.whole_embeddings = self._watched(call.attentions)
        call.work = call.work or self.softening is not None
        return call

    @torch.compiler.assume_constant_result
    def _watched(self, maps: bool) -> tuple[bool, bool]:
        """Whether hooks look at what goes through although nothing is pruned, so that native layers do the work; and
        whether some look at the embeddings. Compiled code keeps to what was there when it was compiled.

        maps: attention maps are asked for, which are made here.
        """
        hooked = hooked_modules(self)
        if not hooked:
            return False, False
        pruning, layers = self.config.pruning, self.token_layers()
        native = pruning is None or (pruning.idle and pruning.execution != "packed")
        uncalled = [module for module in self.modules() if module is not self and layers in module.children()]
        if not native or maps:
            uncalled += [module for layer in layers for module in layer.uncalled_modules()]
        warn_of_uncalled(self, hooked, uncalled)
        inside = {id(module) for module in self.embeddings.modules()}
        return native, any(id(module) in inside for module in hooked)

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
            ValueError: an empty input, a mask that is not [B, N] of 0 and 1, protected ids without ids to look for, a
                table that is empty or has no ids to look up.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"the input's shape ({[batch, length]}) must hold at least one sample of one token")
        state = start_state(
            attention_mask,
            batch,
            length,
            execution="padded" if call.native_layers else self._execution(),
            prefix=self.structural_tokens,
            device=device,
            protected_tokens=self._protected_tokens(token_ids, device),
            track=call.whole_sequence,
        )
        return self._with_token_ids(state, token_ids)

    def sort_texts(
        self,
        call: EncoderCall,
        inputs: dict[str, torch.Tensor],
        mask: torch.Tensor | None,
        borders: dict[str, Any],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Inputs [R, L, ...] and their mask -> those of the texts, [B, N, ...], if they are flattened; the same if not.

        Raises:
            ValueError: borders that do not fit.
        """
        some = next(iter(inputs.values()))
        if "position_ids" not in inputs and not borders.keys() & set(BORDERS):
            return inputs, mask
        check_mask_shape(mask, *some.shape[:2])
        there = None if mask is None else mask.to(some.device, torch.bool)
        texts = find_texts(tuple(some.shape[:2]), some.device, there, inputs.get("position_ids"), borders)
        call.texts = texts
        if texts is None:
            return inputs, mask
        mask = texts.there if mask is None else texts.by_text(mask)
        return {name: texts.by_text(value) for name, value in inputs.items()}, mask

    def _with_token_ids(self, state: TokenState, token_ids: torch.Tensor | None) -> TokenState:
        """The state with the ids, where the first layer scores by them."""
        if not self.looks_ids_up or self.config.pruning.sites[0].idle:
            return state
        if token_ids is None:
            raise ValueError("saliency ('token_prior') needs input_ids to look up: give those, or prune without it")
        if not shapes_only() and all(table.empty for table in self.prior_tables()):  # an adapter fills its own
            raise ValueError(
                "saliency ('token_prior') has an empty table: fit_token_prior(model, batches) fills it, and "
                "TokenPruneTrainer does so before it trains"
            )
        return state._replace(input=state.input._replace(token_ids=state.layout.enter(token_ids)))

    def _protected_tokens(self, token_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        pruning = self.config.pruning
        if pruning is None or not pruning.protected_token_ids or pruning.idle:
            return None
        if token_ids is None:
            raise ValueError(
                f"protected_token_ids ({quoted(list(pruning.protected_token_ids))}) need input_ids to be found in; "
                "give those, or prune without protected ids"
            )
        return torch.isin(token_ids, torch.tensor(pruning.protected_token_ids, device=device))

    def _execution(self) -> str:
        execution = "auto" if self.config.pruning is None else self.config.pruning.execution
        # Stochastic depth draws once per sample, and a packed batch is one row.
        drop_path = getattr(self.config, "drop_path_rate", 0.0) if self.training else 0.0
        if self.config.pruning is not None and any(layer._compiled_call_impl for layer in self.token_layers()):
            # What says where rows are does not survive the breaks between the graphs of one layer.
            raise ValueError("layers that prune must not be compiled one by one: compile the model")
        if execution == "auto":
            return "padded" if drop_path or shapes_only() else "packed"
        if execution == "packed" and shapes_only():
            raise ValueError("execution ('packed') must be 'auto' or 'padded' under compile and export")
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
        self._check_checkpointing(layers)
        hidden_states, attentions = [], []
        attention = self.config._attn_implementation
        call.start = state
        for index, layer in enumerate(layers):
            if call.hidden_states is not False:
                hidden = show(hidden, state, bank, call.wants_states(index), hidden_states)
            plan = self._plan(index, attention, not call.whole_sequence and index == len(layers) - 1, call)
            before, before_state, report = hidden, state, plan.report
            if plan.native:  # by name: a hook before the layer may return the hidden states alone
                hidden = layer(hidden, state=state, plan=plan, config=self.config)
            else:
                hidden = layer(hidden, state, plan, self.config)
            state = report.states.left
            if state.carrier is not None and state.weight is not None:
                bank = faded(hidden, before, state, bank)
            elif plan.site is not None and state.carrier is not None:
                bank = deposit(before, before_state, state, bank)
            if call.attentions and report.attention_map is not None:
                attentions.append(report.attention_map)
            self._collect(call, index, plan, before_state, report.states)
        if call.hidden_states is not False:
            hidden = show(hidden, state, bank, call.wants_states(len(layers)), hidden_states)
        if call.attentions and not attentions:
            logger.warning_once(
                f'`{attention}` attention gives no weights for `output_attentions=True`: set the attention to "eager" '
                "for them."
            )
        call.end = state
        call.pruning_loss = self.pruning_loss(call)
        return self.output_class(
            **self._sequence_outputs(hidden, state, bank, call),
            hidden_states=None if call.hidden_states is False else tuple(hidden_states[call.first_shown :]),
            attentions=tuple(attentions) if call.attentions else None,
            token_trace=call.token_trace(),
            pruning_loss=call.pruning_loss,
        )

    def _sequence_outputs(
        self, hidden: torch.Tensor, state: TokenState, bank: torch.Tensor | None, call: EncoderCall
    ) -> dict[str, torch.Tensor | None]:
        if not call.whole_sequence:
            first = self.final_norm(state.layout.first(hidden)[:, None])  # [B, 1, D]
            return {"pooler_output": self.pool(first), "last_hidden_state": first}
        if call.restore:
            full = self.final_norm(restored(hidden, state, bank))
            everywhere = call.start.layout.full and call.start.layout.rows == call.start.input.length
            first = first_of(full, call.start.carrier >= 0, everywhere)
            if call.start.input.padded:
                full = full.masked_fill((call.start.carrier < 0)[..., None], 0.0)
            full = full if call.texts is None else call.texts.flat(full)
            return {"pooler_output": self.pool(first), "last_hidden_state": full}
        alive = state.alive
        rows = self.final_norm(state.layout.spread(hidden)).masked_fill(~alive[..., None], 0.0)
        positions = state.positions.masked_fill(~alive, -1)
        first = first_of(rows, alive, state.layout.full)
        outputs = {"pooler_output": self.pool(first), "last_hidden_state": rows}
        return outputs | {"attention_mask": alive.long(), "positions": positions}

    def _plan(self, index: int, attention: str, first_token_only: bool, call: EncoderCall) -> LayerPlan:
        pruning = self.config.pruning
        site = None if pruning is None else pruning.sites.get(index)
        if site is not None and (site.idle or (first_token_only and site.place == "between")):
            site = None  # no token is lost there, or none that is read
        native = call.native_layers and not call.attentions
        report = LayerReport()
        return LayerPlan(site, pruning, attention, first_token_only, call.attentions, report, self.softening, native)

    @property
    def softening(self) -> Objective | None:
        """The objective whose masks stand for removal now: in training, in its soft phase."""
        pruning = self.config.pruning
        soft = self.training and pruning is not None and pruning.objective is not None
        return pruning.objective if soft and pruning.objective.phase == "soft" else None

    def _check_checkpointing(self, layers: nn.ModuleList) -> None:
        again = getattr(layers[0], "_gradient_checkpointing_func", None)
        reentrant = getattr(again, "keywords", {}).get("use_reentrant", False)
        if self.softening is not None and layers[0].gradient_checkpointing and reentrant:
            raise ValueError("use_reentrant (True) must be False in the soft phase: weights of tokens have a gradient")

    def pruning_loss(self, call: EncoderCall) -> torch.Tensor | None:
        """What the pruning's objective adds to the loss of a call; None: nothing."""
        objective, layers = self.softening, self.token_layers()
        if objective is None or not call.softened:
            return None
        masks = [layers[site.layer]._modules.get("token_mask") for site, _ in call.softened]
        return objective_loss(objective, call, self.config, masks, self._modules.get("token_budget"))

    def _collect(self, call: EncoderCall, index: int, plan: LayerPlan, before: TokenState, states: LayerStates) -> None:
        pruning = self.config.pruning
        if call.trace and pruning is not None and index in pruning.sites:
            call.states[index] = states.left
        if call.scores and states.decided is not None:
            call.decided[index] = states.decided
        if plan.soft is not None and plan.site is not None:
            call.softened.append((plan.site, states.left))
        if not call.work:
            return
        entered, attending, left, _ = states
        first = plan.site is not None and SALIENCIES[plan.site.saliency].class_token
        queries = entered.counts if plan.asks_all(entered) else attending.counts + first
        counts = before.counts, entered.counts, queries, attending.counts, left.counts
        call.layer_work.append(LayerWork(*counts, plan.site, before.input.prefix))


class TokenPruneHead(Prunable):
    """A task head over a `TokenPruneModel`. Goes before the native head class.

    Modifications:
        - The base model is told what the head reads, so that the last layer computes no more.
        - In the soft phase of an objective the loss carries what that adds.
        - The output carries the token trace.

    Attributes:
        output_class: the native output class with the declared further fields.
        reads_first_token_only: whether the head looks at nothing but each sample's first token.
    """

    output_class: type
    reads_first_token_only = False
    # What objectives add, and some native losses, know no `num_items_in_batch`: without this, Trainer would take them
    # for divided by it, and count them once for every accumulated batch.
    accepts_loss_kwargs = False

    def run_head(self, native_forward: Callable, output_token_trace: bool | None, **inputs: Any) -> Any:
        """The native head's forward over our base model, its output with the trace.

        Raises:
            ValueError: `restore=False`, which is for base models: a head reads the restored sequence.
        """
        if inputs.pop("restore", None) not in (None, True):
            raise ValueError("restore (False) must be True with a head, which reads the restored sequence")
        own = inputs.pop("encoder_call", None)
        call = own or EncoderCall()
        call.first_token_only = self.reads_first_token_only
        call.trace = call.trace or bool(output_token_trace)
        outputs = native_forward(**inputs, encoder_call=call, return_dict=True)
        extra = call.pruning_loss
        if extra is not None and outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + extra
        elif extra is not None and own is None:
            logger.warning_once(
                "The pruning's objective adds to the model's loss, and without labels there is none: to a loss of your "
                "own (label smoothing, compute_loss_func) TokenPruneTrainer adds it; elsewhere, add `pruning_loss`."
            )
        return self.output_class(**outputs, token_trace=call.token_trace(), pruning_loss=extra)


def register_family(*, config: type, natives: dict[type, type], auto: dict[str, type | tuple[type, ...]]) -> None:
    """Registers a family's classes, so that each saves itself with the code and the family's whole `auto_map`.

    Args:
        config: the family's config class.
        natives: which native class each of our model classes stands for.
        auto: the Auto class that loads each model class, by name. Of several classes it gives, as natively, the one
            that was saved, and otherwise the first.

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
