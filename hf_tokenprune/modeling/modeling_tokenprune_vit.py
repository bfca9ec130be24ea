"""ViT with token pruning: pre-LN image encoder, one structural token (the class token).

Shapes: B samples, N tokens (patches and class token), D features; `..` is `1, T` packed and `B, N` otherwise.
"""

from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.vit.modeling_vit import (
    ViTEmbeddings,
    ViTLayer,
    ViTPooler,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .configuration_tokenprune import TokenPruneConfigMixin
from .modeling_tokenprune import TokenPruneHead, TokenPruneLayer, TokenPruneModel, register_family, require_pixels
from .token_outputs import EXTRA_FIELDS, EncoderCall, TokenPruneImageClassifierOutput, TokenPruneModelOutput


class TokenPruneViTConfig(TokenPruneConfigMixin, ViTConfig):
    """A `ViTConfig` with `pruning`: a `PruningConfig`, its dict, a preset's name, or None.

    Raises:
        ValueError: an impossible pruning.
    """

    model_type = "tokenprune_vit"
    keys_to_ignore_at_inference = list(EXTRA_FIELDS)
    pruning: Any = None


class TokenPruneViTLayer(TokenPruneLayer, ViTLayer):
    """The anatomy of a ViT layer: normalisation before each half."""

    eager_attention = staticmethod(eager_attention_forward)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layernorm_before(hidden)

    def attention_output(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.attention.o_proj(context)) + hidden

    def feed_forward_block(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.mlp(self.layernorm_after(hidden))) + hidden


class TokenPruneViTModel(TokenPruneModel, ViTModel):
    """`ViTModel` with token pruning.

    Modifications:
        - `last_hidden_state` and `hidden_states` are restored to full length.
        - Built once, with `TokenPruneViTLayer`s.
    """

    config_class = TokenPruneViTConfig
    output_class = TokenPruneModelOutput
    _no_split_modules = ["ViTEmbeddings", "TokenPruneViTLayer"]

    def __init__(self, config: TokenPruneViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        ViTPreTrainedModel.__init__(self, config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList(TokenPruneViTLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        restore: bool = True,
        encoder_call: EncoderCall | None = None,
        **kwargs: Any,
    ) -> TokenPruneModelOutput:
        """Takes what `ViTModel` takes, and:

        Args:
            output_token_trace: whether the output carries a `token_trace`.
            restore: False returns the kept tokens alone: `last_hidden_state` [B, K, D], `attention_mask` and
                `positions` [B, K].

        Raises:
            ValueError: a mask that is not [B, N].
        """
        call = self.begin(encoder_call, output_token_trace, restore, kwargs)
        pixel_values = require_pixels(pixel_values).to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=bool(interpolate_pos_encoding)
        )
        state = self.start_tokens(call, attention_mask, *hidden.shape[:2], hidden.device)
        embedded = [state.layout.enter(hidden)]
        del hidden
        return self.encode(self.layers, embedded, state, call)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layernorm(hidden)

    def pool(self, first: torch.Tensor) -> torch.Tensor | None:
        return None if self.pooler is None else self.pooler(first)


class TokenPruneViTForImageClassification(TokenPruneHead, ViTForImageClassification):
    """`ViTForImageClassification` over a `TokenPruneViTModel`."""

    config_class = TokenPruneViTConfig
    output_class = TokenPruneImageClassifierOutput
    reads_first_token_only = True

    def __init__(self, config: TokenPruneViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = TokenPruneViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        **kwargs: Any,
    ) -> TokenPruneImageClassifierOutput:
        """Takes what `ViTForImageClassification` takes, and `output_token_trace`."""
        return self.run_head(
            super().forward,
            output_token_trace,
            pixel_values=pixel_values,
            labels=labels,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )


register_family(
    config=TokenPruneViTConfig,
    natives={ViTModel: TokenPruneViTModel, ViTForImageClassification: TokenPruneViTForImageClassification},
    auto={"AutoModel": TokenPruneViTModel, "AutoModelForImageClassification": TokenPruneViTForImageClassification},
)
