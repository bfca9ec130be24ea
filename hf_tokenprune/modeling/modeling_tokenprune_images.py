"""What image families share: two anatomies, and the forwards of their models and classifiers.

A family's own file puts these before its native classes and builds them.

Shapes: B samples, N tokens (structural ones and patches), D features; `..` is `1, T` packed and `B, N` otherwise.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .modeling_tokenprune import TokenPruneHead, TokenPruneModel
from .token_layer import TokenPruneLayer
from .token_layout import shapes_only
from .token_outputs import EncoderCall, TokenPruneImageClassifierOutput, TokenPruneModelOutput


def _require_pixels(pixel_values: torch.Tensor | None) -> torch.Tensor:
    """Raises a ValueError where an image model is given no images."""
    if pixel_values is None:
        raise ValueError("You have to specify pixel_values")
    return pixel_values


class ViTAnatomy(TokenPruneLayer):
    """Normalisation before each half."""

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layernorm_before(hidden)

    def attention_output(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.attention.o_proj(context)) + hidden

    def feed_forward_block(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.mlp(self.layernorm_after(hidden))) + hidden


class Dinov2Anatomy(TokenPruneLayer):
    """Normalisation before each half, LayerScale after it, stochastic depth."""

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm1(hidden)

    def attention_output(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.layer_scale1(self.attention.o_proj(context))) + hidden

    def feed_forward_block(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden)))) + hidden


class ImageModel(TokenPruneModel):
    """A base model over images. Goes before the native class.

    Modifications:
        - `last_hidden_state` and `hidden_states` are restored to full length.
    """

    output_class = TokenPruneModelOutput

    @property
    def longest_input(self) -> int:
        sides = (
            one if isinstance(one, Iterable) else (one, one) for one in (self.config.image_size, self.config.patch_size)
        )
        height, width = (pixels // patch for pixels, patch in zip(*sides))
        return self.structural_tokens + height * width

    def encode_images(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, call: EncoderCall
    ) -> TokenPruneModelOutput:
        """hidden: the embeddings [B, N, D].

        Raises:
            ValueError: a mask that is not [B, N] of 0 and 1, or that hides a structural token of an image.
        """
        state = self.start_tokens(call, attention_mask, *hidden.shape[:2], hidden.device)
        self._check_mask(attention_mask)
        embedded = [state.layout.enter(hidden)]
        del hidden
        return self.encode(embedded, state, call)

    def _check_mask(self, mask: torch.Tensor | None) -> None:
        if mask is None or shapes_only():
            return
        first = mask[:, : self.structural_tokens]
        if bool((mask.bool().any(dim=1) & ~first.bool().all(dim=1)).any()):
            raise ValueError(
                f"attention_mask (it starts with {first.tolist()}) must be 1 for the first {self.structural_tokens} "
                "tokens of each image: they are no patches"
            )

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layernorm(hidden)


class ViTLikeModel(ImageModel):
    """The forward of ViT and DeiT."""

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenPruneModelOutput:
        """Takes what the native model takes, and:

        Args:
            output_token_trace: whether the output carries a `token_trace`.
            restore: False returns the kept tokens alone: `last_hidden_state` [B, K, D], `attention_mask` and
                `positions` [B, K].

        Raises:
            ValueError: a mask that is not [B, N] of 0 and 1, masked patches without a mask token.
            TypeError: an unknown argument.
        """
        call = self.begin(encoder_call, output_token_trace, restore, kwargs)
        if bool_masked_pos is not None and self.embeddings.mask_token is None:
            raise ValueError("bool_masked_pos needs a model with a mask token: use_mask_token=True")
        pixel_values = _require_pixels(pixel_values).to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=bool(interpolate_pos_encoding)
        )
        return self.encode_images(hidden, attention_mask, call)

    def pool(self, first: torch.Tensor) -> torch.Tensor | None:
        return None if self.pooler is None else self.pooler(first)


class ViTLikeClassifier(TokenPruneHead):
    """The forward of ViT's and DeiT's classifiers."""

    output_class = TokenPruneImageClassifierOutput
    reads_first_token_only = True

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenPruneImageClassifierOutput:
        """Takes what the native classifier takes, and `output_token_trace`."""
        return self.run_head(
            super().forward,
            output_token_trace,
            pixel_values=pixel_values,
            labels=labels,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )


class Dinov2LikeModel(ImageModel):
    """The forward of DINOv2, with registers and without."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        restore: bool = True,
        encoder_call: EncoderCall | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenPruneModelOutput:
        """Takes what the native model takes, and `output_token_trace` and `restore` as `ViTLikeModel` does.

        Raises:
            ValueError: a mask that is not [B, N] of 0 and 1.
            TypeError: an unknown argument.
        """
        # Natively ignored, and so here: positions are always interpolated.
        call = self.begin(encoder_call, output_token_trace, restore, kwargs, further=("interpolate_pos_encoding",))
        hidden = self.embeddings(_require_pixels(pixel_values), bool_masked_pos=bool_masked_pos)
        return self.encode_images(hidden, attention_mask, call)

    def pool(self, first: torch.Tensor) -> torch.Tensor:
        return first[:, 0]


class Dinov2LikeClassifier(TokenPruneHead):
    """The forward of DINOv2's classifiers, which read the class token and the mean patch, of the restored sequence.

    Modifications:
        - A mask may hide no patch: the native mean is over hidden ones, too, which are not computed here.
    """

    output_class = TokenPruneImageClassifierOutput

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenPruneImageClassifierOutput:
        """Takes what the native classifier takes, and `output_token_trace`.

        Raises:
            ValueError: a mask that hides a patch.
        """
        hidden = 0 if attention_mask is None or shapes_only() else int((attention_mask == 0).sum())
        if hidden:
            raise ValueError(
                f"attention_mask (with {hidden} zeros) must be 1 everywhere: {type(self).__name__} reads the mean of "
                "all patches; the base model takes other masks"
            )
        return self.run_head(
            super().forward,
            output_token_trace,
            pixel_values=pixel_values,
            labels=labels,
            attention_mask=attention_mask,
            **kwargs,
        )


def dinov2_feed_forward_macs(config: Any) -> int:
    """Multiply-accumulates of one token's feed-forward."""
    inner = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:  # two thirds, rounded up to a multiple of 8, in three matrices
        return 3 * config.hidden_size * ((int(inner * 2 / 3) + 7) // 8 * 8)
    return 2 * config.hidden_size * inner
