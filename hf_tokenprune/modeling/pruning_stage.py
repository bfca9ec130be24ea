"""One stage of a pruning: what is scored, what decides, what becomes of the rest. Names and values are checked here.

A new saliency, rule or reduction is one entry in a table of this file and one function on the floor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any

from .value_checks import (
    MOST,
    MOST_LAYERS,
    check_choice,
    check_count,
    check_integer,
    check_rate,
    check_removed,
    check_sequence,
    check_threshold,
    quoted,
)


PLACES = ("between", "before")


def rate_ratio(rate: float) -> tuple[int, int]:
    """The decimal that was written, exactly, as numerator and denominator: `0.7` is 7/10, so that 70 % of 90 tokens is
    63 and not 62.

    Decimals after the twelfth are cut, so that `tokens * numerator` stays inside int64 up to nine million tokens.
    """
    return Fraction(int(Fraction(repr(rate)) * 10**12), 10**12).as_integer_ratio()


def keep_count(tokens: Any, ratio: tuple[int, int]) -> Any:
    """`floor(tokens * ratio)` in integers; `tokens` may be an int, a symbolic size or an integer tensor."""
    numerator, denominator = ratio
    return tokens * numerator // denominator


@dataclass(frozen=True)
class Saliency:
    """What a score needs.

    Args:
        class_token: the class token's attention: not for models without one.
        queries: the query of every token, and a full map.
        places: where in the layer it can be had.
        token_ids: the ids of the input, before the first layer: not for models without ids.
        similarity: says how alike two tokens are, and with whom each would merge, not how much a token matters.
    """

    class_token: bool = False
    queries: bool = False
    places: tuple[str, ...] = ("between",)
    token_ids: bool = False
    similarity: bool = False


# s_j, positive and summing to 1 over the alive tokens of a sample, but for the similarity.
SALIENCIES = MappingProxyType(
    {
        "cls_attention": Saliency(class_token=True),  # mean_h A[h, cls, j]
        "cls_value_norm": Saliency(class_token=True),  # mean_h A[h, cls, j] ||v[h, j]|| (ATS)
        "received_attention": Saliency(queries=True),  # mean over heads and alive rows of A[h, i, j]
        "received_from_others": Saliency(queries=True),  # the same without i = j (PoWER-BERT)
        "key_norm": Saliency(),  # mean_h ||k[h, j]||
        "residual_shift": Saliency(),  # ||F(x_j) - x_j||, F the layer's attention half; no map
        "learned": Saliency(places=PLACES),  # a predictor's probability that the token stays (DynamicViT)
        "token_prior": Saliency(places=("before",), token_ids=True),  # what tokens of its id are worth on average
        "random": Saliency(places=PLACES),  # the control: by place and `seed` alone
        "key_similarity": Saliency(similarity=True),  # cosine of the mean key to the nearest of the other half (ToMe)
    }
)

REDUCTIONS = (
    "drop",
    "fuse",  # one token more, sum_j s_j x_j over the dropped ones (EViT)
    "fuse_normalized",  # the same with weights that sum to 1
    "merge",  # each into the most similar token that stays, mean weighted by size (ToMe)
    "merge_mean",  # likewise, plain mean; sizes grow by similarity x size (DiffRate)
)
MERGES = ("merge", "merge_mean")
FUSIONS = ("fuse", "fuse_normalized")


@dataclass(frozen=True)
class Rule:
    """How the values of a selection rule are checked.

    check: `(name, value) -> value` for one layer's value.
    idle: the value at which every token stays.
    falling: whether the values may not rise from layer to layer.
    """

    check: Callable[[str, Any], Any]
    idle: float
    falling: bool = False

    def check_order(self, name: str, values: Sequence[float]) -> None:
        if self.falling and any(late > early for early, late in pairwise(values)):
            raise ValueError(
                f"{name} ({quoted(list(values))}) must not rise from layer to layer: a dropped token stays dropped"
            )


# n: alive tokens of the sample; N: the padded length; P: its structural tokens.
RULES = MappingProxyType(
    {
        "keep_rate": Rule(check_rate, falling=True, idle=1),  # P + floor(value x (tokens at the input - P))
        "site_keep_rate": Rule(check_rate, idle=1),  # P + ceil(value x (n - P))
        "keep_count": Rule(check_count, falling=True, idle=MOST),  # value, P counted
        "remove_count": Rule(check_removed, idle=0),  # n - min(value, half of the unprotected tokens)
        "relative_threshold": Rule(check_threshold, idle=0),  # j with n s_j >= value: the same at every length
        "median_threshold": Rule(check_threshold, idle=0),  # j with s_j >= value x the median of the unprotected rows
        "threshold": Rule(check_threshold, idle=0),  # j with s_j >= value
        "padded_threshold": Rule(check_threshold, idle=0),  # j with s_j n / N >= value: scores that change with padding
        "top_p": Rule(check_rate, idle=1),  # the fewest tokens whose saliency sums to value
    }
)


@dataclass(frozen=True)
class Site:
    """A stage at one layer, with the values that hold there.

    ratio: a rate as integers. removed: what a count of removed tokens comes to, here and earlier in the stage, and the
    most at once.
    """

    layer: int
    saliency: str
    rule: str
    value: float
    reduction: str
    place: str
    ratio: tuple[int, int] | None
    removed: tuple[int, int] | None
    cut: int | None
    seed: int

    @property
    def idle(self) -> bool:
        """Whether no input loses a token here."""
        return self.value == RULES[self.rule].idle  # a cut is never below it

    @property
    def weighted(self) -> bool:
        """Whether new tokens are made with the scores, and not only chosen by them."""
        return self.reduction in FUSIONS

    @property
    def whole(self) -> bool:
        """Whether every token goes through the layer's attention, because nobody is dropped before it."""
        return (self.reduction != "drop" and self.cut is None) or self.saliency == "residual_shift"


@dataclass(frozen=True)
class PruningStage:
    """One way of reducing tokens at one or more layers.

    Args:
        layers: 0-based layer indices, rising.
        saliency: what is scored; one of `SALIENCIES`.
        rule: how the scores decide; one of `RULES`.
        values: the rule's value, one per layer.
        reduction: what becomes of the tokens that do not stay; one of `REDUCTIONS`.
        place: where in the layer; `"between"` attention and feed-forward, or `"before"` the layer.
        cut: tokens, one number per layer, beyond which the worst are dropped before the others of those that do not
            stay are fused or merged (DiffRate); one below the layer's value is that value, so that other values for the
            same sites, which budgets and a warm-up come by, leave it alone. None: no token is dropped.
        seed: of the random saliency.

    Raises:
        ValueError: an unknown name, a value out of range, layers or values that rise where they must not, names that
            do not go together.
    """

    layers: tuple[int, ...]
    saliency: str
    rule: str
    values: tuple[float, ...]
    reduction: str = "drop"
    place: str = "between"
    cut: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        layers = tuple(check_integer("layer", layer, 0, MOST_LAYERS) for layer in check_sequence("layers", self.layers))
        if not layers:
            raise ValueError("layers ([]) must name at least one layer")
        if any(late <= early for early, late in pairwise(layers)):
            raise ValueError(f"layers ({quoted(list(layers))}) must rise, each named once")
        for name, known in (("saliency", SALIENCIES), ("reduction", REDUCTIONS), ("place", PLACES), ("rule", RULES)):
            object.__setattr__(self, name, check_choice(name, getattr(self, name), known))
        rule = RULES[self.rule]
        values = _per_layer("values", self.values, layers, lambda value: rule.check(self.rule, value))
        rule.check_order(self.rule, values)
        if self.cut is not None:
            cut = _per_layer("cut", self.cut, layers, lambda value: check_count("cut", value))
            object.__setattr__(self, "cut", cut)
        object.__setattr__(self, "seed", check_integer("seed", self.seed, 0))
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "values", values)
        self._check_combination()

    def _check_combination(self) -> None:
        saliency = SALIENCIES[self.saliency]
        if self.place not in saliency.places:
            raise ValueError(
                f"place ({self.place!r}) must be {' or '.join(map(repr, saliency.places))} with saliency "
                f"{self.saliency!r}; {self.place!r} goes with {_names(lambda s: self.place in s.places)}"
            )
        if saliency.token_ids and self.layers != (0,):
            raise ValueError(
                f"layers ({quoted(list(self.layers))}) must be [0] with saliency {self.saliency!r}, of the input"
            )
        if saliency.similarity and (self.rule != "remove_count" or self.reduction not in MERGES):
            raise ValueError(
                f"saliency {self.saliency!r} pairs tokens: rule ({self.rule!r}) must be 'remove_count' and reduction "
                f"({self.reduction!r}) one of {', '.join(MERGES)}"
            )
        if self.cut is None:
            return
        if self.reduction == "drop" or self.rule != "keep_count":
            raise ValueError(
                f"cut ({quoted(list(self.cut))}) must go with rule 'keep_count' (not {self.rule!r}) and a reduction "
                f"that fuses or merges (not {self.reduction!r})"
            )

    def sites(self) -> list[Site]:
        removed = list(accumulate(self.values)) if self.rule == "remove_count" else None
        return [
            Site(
                layer,
                self.saliency,
                self.rule,
                value,
                self.reduction,
                self.place,
                rate_ratio(value) if self.rule in ("keep_rate", "site_keep_rate") else None,
                None if removed is None else (removed[index], max(self.values)),
                None if self.cut is None else max(self.cut[index], value),
                self.seed,
            )
            for index, (layer, value) in enumerate(zip(self.layers, self.values))
        ]

    def check_token_ids(self) -> None:
        """Raises a ValueError where the score is of token ids, for models that have none."""
        if SALIENCIES[self.saliency].token_ids:
            raise ValueError(
                f"saliency ({self.saliency!r}) needs token ids, which this model does not have; "
                f"{_names(lambda s: not s.token_ids)} would do"
            )

    def check_class_token(self) -> None:
        """Raises a ValueError where the score is of a class token, for models that have none."""
        if SALIENCIES[self.saliency].class_token:
            raise ValueError(
                f"saliency ({self.saliency!r}) needs a class token, which this model does not have; "
                f"{_names(lambda s: not s.class_token)} would do; 'received_attention' is the usual substitute"
            )


def _per_layer(name: str, values: Any, layers: tuple[int, ...], check: Callable[[Any], Any]) -> tuple:
    checked = tuple(check(value) for value in check_sequence(name, values))
    if len(checked) != len(layers):
        raise ValueError(
            f"{name} ({quoted(list(checked))}) must be one per layer, and layers ({quoted(list(layers))}) are "
            f"{len(layers)}"
        )
    return checked


def _names(which: Callable[[Saliency], bool]) -> str:
    return ", ".join(name for name, saliency in SALIENCIES.items() if which(saliency))
