"""What to prune, and where: a strict, immutable description that survives a JSON round trip.

A `PruningConfig` is a list of `PruningStage`s. A stage names the layers it works at, what it scores (`saliency`), how
it decides (`rule`, one value per layer), what becomes of the tokens that do not stay (`reduction`) and where in the
layer that happens (`place`). A preset is a function that returns stages. Everything is resolved here, once: the model
only ever reads `PruningConfig.sites`.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any


FORMAT_VERSION = 1

EXECUTIONS = ("auto", "packed", "padded", "masked")
SALIENCIES = ("cls_attention", "received_attention")
REDUCTIONS = ("drop",)
PLACES = ("between",)


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


def _number(name: str, value: Any) -> float:
    # An int beyond any float is not finite either.
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} ({value!r}) must be a finite number")
    return float(value)


def _integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} ({value!r}) must be an integer >= {minimum}")
    return int(value)


def _choice(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    return value


def _sequence(name: str, value: Any) -> tuple:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} ({value!r}) must be a list")
    return tuple(value)


def _check_rate(name: str, value: Any) -> float:
    rate = _number(name, value)
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{name} ({value!r}) must be in (0, 1]")
    return rate


def _check_threshold(name: str, value: Any) -> float:
    threshold = _number(name, value)
    if threshold < 0.0:
        raise ValueError(f"{name} ({value!r}) must be >= 0")
    return threshold


@dataclass(frozen=True)
class Rule:
    """How the values of a selection rule are checked.

    check: `(name, value) -> value` for one layer's value.
    falling: whether the values may not rise from layer to layer.
    """

    check: Callable[[str, Any], Any]
    falling: bool

    def check_order(self, name: str, values: Sequence[float]) -> None:
        if self.falling and any(late > early for early, late in pairwise(values)):
            raise ValueError(
                f"{name} ({list(values)}) must not rise from layer to layer: a dropped token stays dropped"
            )


RULES = MappingProxyType(
    {
        # The fraction of the sample's prunable input tokens that is left after the site.
        "keep_rate": Rule(check=_check_rate, falling=True),
        # Keep j iff n * s_j >= value, n the alive tokens: uniform attention scores 1 at every length.
        "relative_threshold": Rule(check=_check_threshold, falling=False),
    }
)


@dataclass(frozen=True)
class Site:
    """A stage at one layer, with the value that holds there; `ratio` is a keep rate as integers."""

    layer: int
    saliency: str
    rule: str
    value: float
    reduction: str
    place: str
    ratio: tuple[int, int] | None


@dataclass(frozen=True)
class PruningStage:
    """One way of reducing tokens at one or more layers.

    Args:
        layers: 0-based layer indices, rising.
        saliency: what is scored; one of `SALIENCIES`.
        rule: how the scores decide; one of `RULES`.
        values: the rule's value, one per layer.
        reduction: what becomes of the tokens that do not stay; one of `REDUCTIONS`.
        place: where in the layer; `"between"` attention and feed-forward.

    Raises:
        ValueError: an unknown name, a value out of range, layers or values that rise where they must not.
    """

    layers: tuple[int, ...]
    saliency: str
    rule: str
    values: tuple[float, ...]
    reduction: str = "drop"
    place: str = "between"

    def __post_init__(self) -> None:
        layers = tuple(_integer("layer", layer, 0) for layer in _sequence("layers", self.layers))
        if not layers:
            raise ValueError("layers ([]) must name at least one layer")
        if any(late <= early for early, late in pairwise(layers)):
            raise ValueError(f"layers ({list(layers)}) must rise, each named once")
        _choice("saliency", self.saliency, SALIENCIES)
        _choice("reduction", self.reduction, REDUCTIONS)
        _choice("place", self.place, PLACES)
        rule = RULES[_choice("rule", self.rule, tuple(RULES))]
        values = tuple(rule.check(self.rule, value) for value in _sequence("values", self.values))
        if len(values) != len(layers):
            raise ValueError(
                f"values ({list(values)}) must be one per layer, and layers ({list(layers)}) are {len(layers)}"
            )
        rule.check_order(self.rule, values)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "values", values)

    def sites(self) -> list[Site]:
        return [
            Site(
                layer,
                self.saliency,
                self.rule,
                value,
                self.reduction,
                self.place,
                rate_ratio(value) if self.rule == "keep_rate" else None,
            )
            for layer, value in zip(self.layers, self.values)
        ]


def _top_k(*, layers: Sequence[int], keep_rate: float = 0.7) -> list[PruningStage]:
    """Keep the best by [CLS] attention; the rate compounds: rate^(s+1) of the input after site s.

    TokenReduction's `topk` ("Which Tokens to Use?", ICCVW 2023).
    """
    layers = _sequence("layers", layers)
    rate = Decimal(repr(_check_rate("keep_rate", keep_rate)))
    values = [float(rate ** (site + 1)) for site in range(len(layers))]
    return [PruningStage(layers, "cls_attention", "keep_rate", values)]


def _adaptive(
    *, layers: Sequence[int], threshold: float | Sequence[float] = 0.05, saliency: str = "cls_attention"
) -> list[PruningStage]:
    """Keep what scores at least `threshold` times the average token of its sample: dull inputs lose more."""
    layers = _sequence("layers", layers)
    values = [threshold] * len(layers) if isinstance(threshold, Real) else _sequence("threshold", threshold)
    values = [_check_threshold("threshold", value) for value in values]
    return [PruningStage(layers, saliency, "relative_threshold", values)]


PRESETS: MappingProxyType[str, Callable[..., list[PruningStage]]] = MappingProxyType(
    {"top_k": _top_k, "adaptive": _adaptive}
)


def _check_arguments(preset: str, function: Callable, given: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    takes = f"preset {preset!r} takes {', '.join(parameters)}; with every preset go {', '.join(COMMON_FIELDS)}"
    for name in given:
        if name not in parameters:
            raise ValueError(f"preset {preset!r} has no hyper-parameter {name!r}: {takes}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise ValueError(f"preset {preset!r} needs {name!r}: {takes}")


@dataclass(frozen=True)
class PruningConfig:
    """What to prune, where, and how it is carried out.

    Args:
        stages: the reductions, in the order of their layers. An empty list prunes nothing.
        execution: `"packed"` (no padding anywhere), `"padded"` (compile, export), `"masked"` (full length, reduced
            tokens hidden) or `"auto"`: padded under compile and export, and in training with stochastic depth; packed
            otherwise.
        protected_token_ids: ids that are never reduced ([SEP] and the like). They rank first inside a fixed budget.
        min_tokens: at least so many tokens of a sample stay, class token included, as far as it has them.
        preset_name: the preset that the stages come from, for the reader.

    Raises:
        ValueError: quoting the value and the rule it breaks.
    """

    stages: tuple[PruningStage, ...] = ()
    execution: str = "auto"
    protected_token_ids: tuple[int, ...] = ()
    min_tokens: int = 1
    preset_name: str | None = None

    def __post_init__(self) -> None:
        stages = tuple(_stage(stage) for stage in _sequence("stages", self.stages))
        _choice("execution", self.execution, EXECUTIONS)
        ids = sorted(
            {_integer("protected_token_ids", i, 0) for i in _sequence("protected_token_ids", self.protected_token_ids)}
        )
        object.__setattr__(self, "min_tokens", _integer("min_tokens", self.min_tokens, 1))
        if self.preset_name is not None:
            _choice("preset_name", self.preset_name, tuple(PRESETS))
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "protected_token_ids", tuple(ids))
        self._check_sites()

    def _check_sites(self) -> None:
        layers = [layer for stage in self.stages for layer in stage.layers]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise ValueError(f"layers {twice} are named by more than one stage; a layer holds one site")
        for rule_name, rule in RULES.items():
            sites = sorted(
                (site for stage in self.stages for site in stage.sites() if site.rule == rule_name),
                key=lambda site: site.layer,
            )
            values = [site.value for site in sites]
            rule.check_order(rule_name, values)

    @classmethod
    def preset(cls, name: str, **hyperparameters: Any) -> "PruningConfig":
        """The stages of a named method.

        Args:
            name: one of `PRESETS`.
            hyperparameters: the preset's own (its function's keywords) and any of `execution`,
                `protected_token_ids`, `min_tokens`.

        Raises:
            ValueError: an unknown preset or hyper-parameter, a missing one, or a value out of range.
        """
        function = PRESETS[_choice("preset", name, tuple(PRESETS))]
        common = {key: hyperparameters.pop(key) for key in COMMON_FIELDS if key in hyperparameters}
        _check_arguments(name, function, hyperparameters)
        return cls(stages=tuple(function(**hyperparameters)), preset_name=name, **common)

    @classmethod
    def coerce(cls, value: Any, num_layers: int | None = None) -> "PruningConfig | None":
        """A `PruningConfig` from what users write: one, None, a preset's name, its dict, or `{"preset": name, ...}`.

        A preset that was given no layers gets `default_layers(num_layers)`.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict):
            raise ValueError(
                f"pruning ({value!r}) must be a PruningConfig, a preset's name ({', '.join(PRESETS)}), a dict or None"
            )
        if "stages" in value or "format_version" in value:
            return cls.from_dict(value)
        hyperparameters = dict(value)
        name = hyperparameters.pop("preset", None)
        function = PRESETS[_choice("preset", name, tuple(PRESETS))]
        if num_layers is not None and "layers" in inspect.signature(function).parameters:
            hyperparameters.setdefault("layers", default_layers(num_layers))
        return cls.preset(name, **hyperparameters)

    @cached_property
    def sites(self) -> dict[int, Site]:
        """The site at each layer that has one."""
        return {site.layer: site for stage in self.stages for site in stage.sites()}

    def check_layers(self, num_layers: int) -> None:
        """Raises a ValueError if a stage names a layer that a model of `num_layers` does not have."""
        for layer in self.sites:
            if layer >= num_layers:
                raise ValueError(f"layer ({layer}) must be in [0, {num_layers - 1}]: the model has {num_layers} layers")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {
            "format_version": FORMAT_VERSION,
            "preset_name": self.preset_name,
            "stages": [
                {
                    "layers": list(stage.layers),
                    "saliency": stage.saliency,
                    "rule": stage.rule,
                    "values": list(stage.values),
                    "reduction": stage.reduction,
                    "place": stage.place,
                }
                for stage in self.stages
            ],
            "execution": self.execution,
            "protected_token_ids": list(self.protected_token_ids),
            "min_tokens": self.min_tokens,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PruningConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a format that this version does not read, an unknown field, or a value out of range.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a pruning config ({data!r}) must be a dict")
        data = dict(data)
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(f"format_version ({version!r}) of the pruning config must be {FORMAT_VERSION}")
        return cls(**_known_fields(cls, data))


COMMON_FIELDS = ("execution", "protected_token_ids", "min_tokens")


def _known_fields(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(cls)]
    for name in data:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of {cls.__name__}; known: {', '.join(known)}")
    return data


def _stage(value: Any) -> PruningStage:
    if isinstance(value, PruningStage):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a stage ({value!r}) must be a PruningStage or a dict")
    for name in ("layers", "saliency", "rule", "values"):
        if name not in value:
            raise ValueError(f"a stage ({value!r}) must have {name!r}")
    return PruningStage(**_known_fields(PruningStage, value))


def default_layers(num_layers: int) -> list[int]:
    """Three sites at a quarter, half and three quarters of the depth: 3, 6, 9 of twelve layers, as EViT has them."""
    return sorted({num_layers * quarter // 4 for quarter in (1, 2, 3)})
