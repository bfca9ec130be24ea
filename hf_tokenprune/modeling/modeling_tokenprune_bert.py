"""BERT with token pruning: post-LN text encoder, one structural token ([CLS]).

Shapes: B samples, N input length, D features.
"""

from .transformers_version import MINIMUM  # noqa: F401  # isort: skip

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertPooler,
    BertPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_tokenprune import TokenPruneConfigMixin
from .flat_texts import BORDERS
from .modeling_tokenprune import TokenPruneHead, TokenPruneModel, register_family
from .token_layer import TokenPruneLayer
from .token_layout import PackedRows
from .token_outputs import (
    EXTRA_FIELDS,
    EncoderCall,
    TokenPruneModelOutputWithCrossAttentions,
    TokenPruneSequenceClassifierOutput,
    TokenPruneTokenClassifierOutput,
)
from .token_state import TokenState


class TokenPruneBertConfig(TokenPruneConfigMixin, BertConfig):
    """A `BertConfig` with `pruning`: a `PruningConfig`, its dict, a preset's name, or None.

    Raises:
        ValueError: a decoder or cross-attention, which no token can be taken from, or an impossible pruning.
    """

    model_type = "tokenprune_bert"
    keys_to_ignore_at_inference = ["past_key_values", *EXTRA_FIELDS]
    must_be_false = ("is_decoder", "add_cross_attention")
    token_ids = True
    pruning: Any = None


class TokenPruneBertLayer(TokenPruneLayer, BertLayer):
    """The anatomy of a BERT layer: normalisation after each half."""

    eager_attention = staticmethod(eager_attention_forward)

    @property
    def attention_module(self) -> nn.Module:
        return self.attention.self

    @property
    def head_dim(self) -> int:
        return self.attention.self.attention_head_size

    @property
    def attention_dropout(self) -> float:
        return self.attention.self.dropout.p

    def query(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention.self.query(x)

    def key(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention.self.key(x)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention.self.value(x)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def attention_output(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.attention.output(context, hidden)

    def feed_forward_block(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.feed_forward_chunk(hidden)


class TokenPruneBertEncoder(BertEncoder):
    """Modifications: holds `TokenPruneBertLayer`s; the base model sends the tokens through them."""

    def __init__(self, config: TokenPruneBertConfig):
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList(TokenPruneBertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))


class TokenPruneBertModel(TokenPruneModel, BertModel):
    """`BertModel` with token pruning.

    Modifications:
        - Packed: embeddings, too, are computed for real tokens alone.
        - Flattened input is taken with every attention: each text is a sample.
        - `last_hidden_state` and `hidden_states` are restored to full length; padding holds zeros.
        - The pooler reads each sample's first real token.
        - Built once, with `TokenPruneBertLayer`s; no decoder, no cache.
    """

    config_class = TokenPruneBertConfig
    output_class = TokenPruneModelOutputWithCrossAttentions
    _no_split_modules = ["BertEmbeddings", "TokenPruneBertLayer"]

    def __init__(self, config: TokenPruneBertConfig, add_pooling_layer: bool = True):
        BertPreTrainedModel.__init__(self, config)
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        self.encoder = TokenPruneBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        restore: bool = True,
        encoder_call: EncoderCall | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenPruneModelOutputWithCrossAttentions:
        """Takes what `BertModel` takes, and:

        Args:
            output_token_trace: whether the output carries a `token_trace`.
            restore: False returns the kept tokens alone: `last_hidden_state` [B, K, D], `attention_mask` and
                `positions` [B, K].
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx: borders of a flattened input, as
                `DataCollatorWithFlattening` makes them: rows [R, L] that hold B texts one after the other. Without
                borders, `position_ids` that return to a row's least one say where texts begin, if there is no mask.
                `last_hidden_state` comes in the same layout, [R, L, D]; the pooler's output [B, D], hidden states
                [B, N, D], attentions, trace and kept tokens come by text.

        Raises:
            ValueError: ids or a mask that are not [B, N], a text longer than the position table, arguments of a
                decoder, borders that do not fit.
            TypeError: an unknown argument.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        name, given, axes = (
            ("input_ids", input_ids, 2) if inputs_embeds is None else ("inputs_embeds", inputs_embeds, 3)
        )
        if given.ndim != axes:
            wanted = "[batch, length]" if axes == 2 else "[batch, length, hidden]"
            raise ValueError(f"{name}'s shape ({list(given.shape)}) must be {wanted}")
        call = self.begin(encoder_call, output_token_trace, restore, kwargs, further=BORDERS)
        inputs = {
            "input_ids": input_ids,
            "token_type_ids": _of_each("token_type_ids", token_type_ids, *given.shape[:2]),
            "position_ids": _of_each("position_ids", position_ids, *given.shape[:2]),
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        inputs, attention_mask = self.sort_texts(call, inputs, attention_mask, kwargs)
        batch, length = next(iter(inputs.values())).shape[:2]
        self._check_length(length, position_ids)
        state = self.start_tokens(call, attention_mask, batch, length, given.device, inputs.get("input_ids"))
        return self.encode([self._embed(inputs, state, call)], state, call)

    def _embed(self, inputs: dict[str, torch.Tensor], state: TokenState, call: EncoderCall) -> torch.Tensor:
        """[.., D], laid out as the state."""
        if call.whole_embeddings or not isinstance(state.layout, PackedRows):
            return state.layout.enter(self.embeddings(**inputs))
        if "position_ids" not in inputs:  # elsewhere they follow from the shape
            batch, length = next(iter(inputs.values())).shape[:2]
            inputs = inputs | {"position_ids": self.embeddings.position_ids[:, :length].expand(batch, length)}
        return self.embeddings(**{name: state.layout.enter(value) for name, value in inputs.items()})

    def pool(self, first: torch.Tensor) -> torch.Tensor | None:
        return None if self.pooler is None else self.pooler(first)

    def _check_length(self, length: int, position_ids: torch.Tensor | None) -> None:
        if position_ids is None and length > self.config.max_position_embeddings:
            raise ValueError(
                f"the input's length ({length}) must be at most max_position_embeddings "
                f"({self.config.max_position_embeddings}); truncate it"
            )


def _of_each(name: str, ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """Ids [B, N] from those, or from [1, N] or [N], which hold for every sample."""
    if ids is None:
        return None
    if ids.shape not in ((batch, length), (1, length), (length,)):
        raise ValueError(f"{name}'s shape ({list(ids.shape)}) must be [batch, length], here {[batch, length]}")
    return ids.expand(batch, length)


class TokenPruneBertHead(TokenPruneHead):
    """The forward of BERT's heads."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """Takes what the native head takes, and `output_token_trace`."""
        return self.run_head(
            super().forward,
            output_token_trace,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )


class TokenPruneBertForSequenceClassification(TokenPruneBertHead, BertForSequenceClassification):
    """`BertForSequenceClassification` over a `TokenPruneBertModel`."""

    config_class = TokenPruneBertConfig
    output_class = TokenPruneSequenceClassifierOutput
    reads_first_token_only = True

    def __init__(self, config: TokenPruneBertConfig):
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = TokenPruneBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class TokenPruneBertForTokenClassification(TokenPruneBertHead, BertForTokenClassification):
    """`BertForTokenClassification` over a `TokenPruneBertModel`: labels every input token, from restored states."""

    config_class = TokenPruneBertConfig
    output_class = TokenPruneTokenClassifierOutput

    def __init__(self, config: TokenPruneBertConfig):
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = TokenPruneBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def _classifier_dropout(config: TokenPruneBertConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


register_family(
    config=TokenPruneBertConfig,
    natives={
        BertModel: TokenPruneBertModel,
        BertForSequenceClassification: TokenPruneBertForSequenceClassification,
        BertForTokenClassification: TokenPruneBertForTokenClassification,
    },
    auto={
        "AutoModelForTextEncoding": TokenPruneBertModel,
        "AutoModel": TokenPruneBertModel,
        "AutoModelForSequenceClassification": TokenPruneBertForSequenceClassification,
        "AutoModelForTokenClassification": TokenPruneBertForTokenClassification,
    },
)
