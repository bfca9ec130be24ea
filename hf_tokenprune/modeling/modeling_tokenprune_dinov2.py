"""DINOv2 with token pruning: pre-LN image encoder with LayerScale, one structural token (the class token).

Shapes: B samples, N tokens (patches and class token), D features; `..` is `1, T` packed and `B, N` otherwise.
"""

from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Embeddings,
    Dinov2Encoder,
    Dinov2Layer,
    Dinov2PreTrainedModel,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .configuration_tokenprune import TokenPruneConfigMixin
from .modeling_tokenprune import (
    TokenPruneHead,
    TokenPruneLayer,
    TokenPruneModel,
    register_family,
    require_pixels,
    require_transformers,
)
from .token_outputs import EXTRA_FIELDS, EncoderCall, TokenPruneImageClassifierOutput, TokenPruneModelOutput


require_transformers("5.18.0", "token pruning of DINOv2")


class TokenPruneDinov2Config(TokenPruneConfigMixin, Dinov2Config):
    """A `Dinov2Config` with `pruning`: a `PruningConfig`, its dict, a preset's name, or None.

    Raises:
        ValueError: an impossible pruning.
    """

    model_type = "tokenprune_dinov2"
    keys_to_ignore_at_inference = list(EXTRA_FIELDS)
    pruning: Any = None

    @property
    def feed_forward_macs(self) -> int:
        """Multiply-accumulates of one token's feed-forward."""
        inner = int(self.hidden_size * self.mlp_ratio)
        if self.use_swiglu_ffn:  # two thirds, rounded up to a multiple of 8, in three matrices
            return 3 * self.hidden_size * ((int(inner * 2 / 3) + 7) // 8 * 8)
        return 2 * self.hidden_size * inner


class TokenPruneDinov2Layer(TokenPruneLayer, Dinov2Layer):
    """The anatomy of a DINOv2 layer: normalisation before each half, LayerScale after it, stochastic depth."""

    eager_attention = staticmethod(eager_attention_forward)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm1(hidden)

    def attention_output(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.layer_scale1(self.attention.o_proj(context))) + hidden

    def feed_forward_block(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden)))) + hidden


class TokenPruneDinov2Encoder(Dinov2Encoder):
    """Modifications: holds `TokenPruneDinov2Layer`s; the base model sends the tokens through them."""

    config_class = TokenPruneDinov2Config
    _can_record_outputs = {}

    def __init__(self, config: TokenPruneDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.layer = nn.ModuleList(TokenPruneDinov2Layer(config) for _ in range(config.num_hidden_layers))
        self.post_init()


class TokenPruneDinov2Model(TokenPruneModel, Dinov2Model):
    """`Dinov2Model` with token pruning.

    Modifications:
        - `last_hidden_state` and `hidden_states` are restored to full length.
        - Built once, with `TokenPruneDinov2Layer`s.
    """

    config_class = TokenPruneDinov2Config
    output_class = TokenPruneModelOutput
    _no_split_modules = ["Dinov2Embeddings", "TokenPruneDinov2Layer"]

    def __init__(self, config: TokenPruneDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.embeddings = Dinov2Embeddings(config)
        self.encoder = TokenPruneDinov2Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        restore: bool = True,
        encoder_call: EncoderCall | None = None,
        **kwargs: Any,
    ) -> TokenPruneModelOutput:
        """Takes what `Dinov2Model` takes, and:

        Args:
            output_token_trace: whether the output carries a `token_trace`.
            restore: False returns the kept tokens alone: `last_hidden_state` [B, K, D], `attention_mask` and
                `positions` [B, K].

        Raises:
            ValueError: a mask that is not [B, N].
        """
        call = self.begin(encoder_call, output_token_trace, restore, kwargs)
        hidden = self.embeddings(require_pixels(pixel_values), bool_masked_pos=bool_masked_pos)
        state = self.start_tokens(call, attention_mask, *hidden.shape[:2], hidden.device)
        embedded = [state.layout.enter(hidden)]
        del hidden
        return self.encode(self.encoder.layer, embedded, state, call)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layernorm(hidden)

    def pool(self, first: torch.Tensor) -> torch.Tensor:
        return first[:, 0]


class TokenPruneDinov2ForImageClassification(TokenPruneHead, Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` over a `TokenPruneDinov2Model`: reads the class token and the mean patch, of the
    restored sequence."""

    config_class = TokenPruneDinov2Config
    output_class = TokenPruneImageClassifierOutput

    def __init__(self, config: TokenPruneDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.dinov2 = TokenPruneDinov2Model(config)
        width = config.hidden_size * 2
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        **kwargs: Any,
    ) -> TokenPruneImageClassifierOutput:
        """Takes what `Dinov2ForImageClassification` takes, and `output_token_trace`."""
        return self.run_head(
            super().forward,
            output_token_trace,
            pixel_values=pixel_values,
            labels=labels,
            attention_mask=attention_mask,
            **kwargs,
        )


register_family(
    config=TokenPruneDinov2Config,
    natives={Dinov2Model: TokenPruneDinov2Model, Dinov2ForImageClassification: TokenPruneDinov2ForImageClassification},
    auto={
        "AutoModel": TokenPruneDinov2Model,
        "AutoModelForImageClassification": TokenPruneDinov2ForImageClassification,
    },
)
