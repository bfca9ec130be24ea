"""One reduction at one site: from scores to the tokens that go on, in two steps.

The first step comes before the layer's attention and drops what is to be dropped, so that it costs no more; the second
comes after it and fuses or merges what does not stay.

Shapes: `..` is how the rows of the call lie in memory; D features.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from .pruning_config import PruningConfig
from .pruning_stage import FUSIONS, Site
from .reduction import fuse, merge
from .selection import Scores, cut, select
from .token_layout import named
from .token_state import TokenState, blended


def step(site: Site | None, what: str) -> AbstractContextManager:
    """Names a step of a site, where a profile is being taken: score, select or reduce."""
    return nullcontext() if site is None else named(f"layer {site.layer}: {what}")


class Reduction(NamedTuple):
    """A reduction half done.

    state: the tokens that go on for now.
    scores: theirs; None where nothing is left to do.
    decided: the scores that the site decides by, and the tokens that they are of.
    """

    state: TokenState
    site: Site
    pruning: PruningConfig
    scores: Scores | None
    decided: tuple[Scores, TokenState]

    def finish(self, hidden: torch.Tensor) -> tuple[torch.Tensor, TokenState]:
        """hidden [.., D], laid out as `state`'s rows -> the tokens that go on for good, and their state."""
        if self.scores is None:
            return hidden, self.state
        with step(self.site, "select"):
            selection = select(self.scores, self.state, self.site, self.pruning.min_tokens)
        with step(self.site, "reduce"):
            if self.site.reduction in FUSIONS:
                blend = fuse(self.scores, self.state, selection, self.site.reduction == "fuse_normalized")
            else:
                blend = merge(self.scores, self.state, selection, hidden, self.site.reduction == "merge_mean")
            after = self.state.after(selection, blend)
            return blended(hidden, self.state.layout, after.layout, selection, blend), after


def begin_reduction(scores: Scores, state: TokenState, site: Site, pruning: PruningConfig) -> Reduction:
    """Drops what is dropped outright at a site."""
    decided = scores, state
    if site.reduction == "drop":
        with step(site, "select"):
            selection = select(scores, state, site, pruning.min_tokens)
        with step(site, "reduce"):
            return Reduction(state.after(selection), site, pruning, None, decided)
    if pruning.tracks_sizes and state.size is None:
        state = state._replace(size=torch.ones_like(scores.saliency))
    if site.cut is not None:
        with step(site, "select"):
            selection = cut(scores, state, site, pruning.min_tokens)
        with step(site, "reduce"):
            state, scores = state.after(selection), scores.after(selection.home)
    return Reduction(state, site, pruning, scores, decided)
