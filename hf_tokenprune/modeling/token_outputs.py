"""What a model returns besides the native fields, and what travels down through one call.

Every output class is the native one with further declared fields, `None` unless asked for. `pruning_loss` is what an
objective adds in its soft phase, a scalar: a head's `loss` has it in it, and a loss of one's own wants it added.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    ImageClassifierOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacherOutput
from transformers.utils import ModelOutput

from .flat_texts import FlatTexts
from .pruning_stage import Site
from .selection import Scores
from .token_state import TokenState


EXTRA_FIELDS = ("token_trace", "pruning_loss", "attention_mask", "positions")


@dataclass
class TokenTrace(ModelOutput):
    """Which original token went where.

    Args:
        layers: the layers of the S sites, a list.
        counts: long [S, B], tokens alive after each site; all, while masks stand for removal.
        source: long [S, B, N], for each original position the row, among the alive tokens of its own sample, that
            carries it after the site; -1 where it was dropped, and for padding. Positions with the same row were fused
            or merged.
        sizes: float32 [S, B, N], for each row the input tokens that it stands for, as attention weighs it; 0 behind the
            last row.
    """

    layers: list[int] | None = None
    counts: torch.Tensor | None = None
    source: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


@dataclass
class TokenPruneModelOutputWithCrossAttentions(BaseModelOutputWithPoolingAndCrossAttentions):
    """attention_mask, positions: long [B, K], with `restore=False` alone (positions -1 where the mask is 0)."""

    token_trace: TokenTrace | None = None
    pruning_loss: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None


@dataclass
class TokenPruneModelOutput(BaseModelOutputWithPooling):
    """attention_mask, positions: long [B, K], with `restore=False` alone (positions -1 where the mask is 0)."""

    token_trace: TokenTrace | None = None
    pruning_loss: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None


@dataclass
class TokenPruneSequenceClassifierOutput(SequenceClassifierOutput):
    token_trace: TokenTrace | None = None
    pruning_loss: torch.Tensor | None = None


@dataclass
class TokenPruneTokenClassifierOutput(TokenClassifierOutput):
    token_trace: TokenTrace | None = None
    pruning_loss: torch.Tensor | None = None


@dataclass
class TokenPruneImageClassifierOutput(ImageClassifierOutput):
    token_trace: TokenTrace | None = None
    pruning_loss: torch.Tensor | None = None


@dataclass
class TokenPruneTwoHeadedOutput(DeiTForImageClassificationWithTeacherOutput):
    token_trace: TokenTrace | None = None
    pruning_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerWork:
    """How many tokens of each sample one layer computed what for; all long [B], or float32 with masks for removal.

    arrived: tokens at the layer's input. keys: keys and values. queries: queries, those for the scores included.
    contexts: attention rows and output projections. feed_forward: feed-forwards. site: what was reduced there, and how.
    prefix: structural tokens.
    """

    arrived: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    contexts: torch.Tensor
    feed_forward: torch.Tensor
    site: Site | None
    prefix: int


class LinearMacs(NamedTuple):
    """Multiply-accumulates of one token in the linear parts of one layer."""

    key_value: int
    query: int
    output: int
    feed_forward: int


@dataclass
class EncoderCall:
    """What one call asks of the encoder, and what it collects; made for the call and dropped with it.

    Args:
        first_token_only: the head reads each sample's first token alone.
        trace, work, scores, hidden_states, attentions: what to collect; of hidden states all, or those at some
            indices; first_shown: the index from which on they are shown.
        linear_macs: by layer, what `layer_work` is counted with; None: what the config says.
        restore: whether the sequence comes back in full length.
        native_layers: hooks look at what goes through, and nothing is pruned: native layers do the work.
        whole_embeddings: hooks look at the embeddings, which are computed in the layout of the input.
        texts: where the texts lie, if the input was flattened.
        pruning_loss: what the pruning's objective adds to the loss.
        start, end: the state at the input, and after the last layer; states: the state after each site, by layer.
        layer_work: one entry per layer.
        decided: by layer, the scores that its site decided by, and the state of the tokens that they are of.
        softened: the sites whose masks stand for removal, each with the state after it.
    """

    first_token_only: bool = False
    trace: bool = False
    work: bool = False
    scores: bool = False
    hidden_states: bool | frozenset[int] = False
    first_shown: int = 0
    attentions: bool = False
    restore: bool = True
    native_layers: bool = False
    whole_embeddings: bool = False
    texts: FlatTexts | None = None
    pruning_loss: torch.Tensor | None = None
    start: TokenState | None = None
    end: TokenState | None = None
    states: dict[int, TokenState] = field(default_factory=dict)
    layer_work: list[LayerWork] = field(default_factory=list)
    linear_macs: list[LinearMacs] | None = None
    decided: dict[int, tuple[Scores, TokenState]] = field(default_factory=dict)
    softened: list[tuple[Site, TokenState]] = field(default_factory=list)

    @property
    def whole_sequence(self) -> bool:
        """Whether more than the first token's last state is asked for."""
        asked = self.trace or self.attentions or self.native_layers or self.hidden_states is not False
        return asked or not self.first_token_only

    def wants_states(self, index: int) -> bool:
        """Whether the hidden states at an index are asked for: 0 the embeddings, i what layer i - 1 leaves."""
        return self.hidden_states is True or (self.hidden_states is not False and index in self.hidden_states)

    def token_trace(self) -> TokenTrace | None:
        """The trace, if it was asked for."""
        if not self.trace:
            return None
        counts = [state.layout.counts for state in self.states.values()]
        source = [state.ranked_carrier() for state in self.states.values()]
        sizes = [state.ranked_sizes() for state in self.states.values()]
        return TokenTrace(
            layers=list(self.states),
            counts=torch.stack(counts) if counts else self.start.layout.counts[None][:0],
            source=torch.stack(source) if source else self.start.carrier[None][:0],
            sizes=torch.stack(sizes) if sizes else self.start.carrier[None][:0].float(),
        )
