"""What to prune, and where: a strict, immutable description that survives a JSON round trip.

A `PruningConfig` is a list of `PruningStage`s. A stage names the layers it works at, what it scores (`saliency`), how
it decides (`rule`, one value per layer), what becomes of the tokens that do not stay (`reduction`) and where in the
layer that happens (`place`). A preset is a function that returns stages. Everything is resolved here, once: the model
only ever reads `PruningConfig.sites`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import islice
from numbers import Integral, Real
from typing import Any

from .presets import PRESETS, DepthUnknown
from .pruning_budgets import Budgets, check_budgets, check_falling, eased, falling, site_rules, values_at
from .pruning_objective import Objective
from .pruning_stage import (
    MERGES,
    PruningStage,
    Site,
    check_bool,
    check_choice,
    check_integer,
    check_sequence,
)


FORMAT_VERSION = 1

EXECUTIONS = ("auto", "packed", "padded", "masked")


def _check_arguments(preset: str, function: Callable, given: dict[str, Any]) -> None:
    parameters = {key: p for key, p in inspect.signature(function).parameters.items() if key != "num_layers"}
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
        proportional_attention: whether a token that stands for several weighs as much in attention: log(size) is added
            to its logits.
        preset_name: the preset that the stages come from, for the reader.
        objective: how the pruning is trained beyond the task's loss: an `Objective`, its name or its fields; None: not.
        budgets: other values for the same sites, by what they cost: pairs of a MAC ratio (rising) and a value per site.
        awaiting_depth: the hyper-parameters of `preset_name`, where the stages follow from the depth of a model; the
            model's config calls `resolve`.

    Raises:
        ValueError: quoting the value and the rule it breaks.
    """

    stages: tuple[PruningStage, ...] = ()
    execution: str = "auto"
    protected_token_ids: tuple[int, ...] = ()
    min_tokens: int = 1
    proportional_attention: bool = False
    preset_name: str | None = None
    objective: Objective | None = None
    budgets: Budgets = ()
    awaiting_depth: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        stages = tuple(_stage(stage) for stage in check_sequence("stages", self.stages))
        check_choice("execution", self.execution, EXECUTIONS)
        ids = sorted(
            {
                check_integer("protected_token_ids", i, 0)
                for i in check_sequence("protected_token_ids", self.protected_token_ids)
            }
        )
        object.__setattr__(self, "min_tokens", check_integer("min_tokens", self.min_tokens, 1))
        check_bool("proportional_attention", self.proportional_attention)
        if self.preset_name is not None:
            check_choice("preset_name", self.preset_name, PRESETS)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "protected_token_ids", tuple(ids))
        object.__setattr__(self, "objective", Objective.coerce(self.objective))
        self._check_waiting()
        self._check_sites()
        budgets = _frozen(self.budgets) if self.awaiting_depth else check_budgets(self.budgets, self.stages)
        object.__setattr__(self, "budgets", budgets)
        for _, values in budgets if not self.awaiting_depth else ():
            check_falling(self.stages, values, "a budget's ")

    def _check_waiting(self) -> None:
        try:
            waiting = dict(self.awaiting_depth)
        except (TypeError, ValueError) as error:
            raise ValueError(f"awaiting_depth ({self.awaiting_depth!r}) must be a mapping") from error
        object.__setattr__(self, "awaiting_depth", tuple((name, _frozen(value)) for name, value in waiting.items()))
        if not waiting:
            return
        function = PRESETS.get(self.preset_name)
        if function is None or self.stages or "num_layers" not in inspect.signature(function).parameters:
            raise ValueError(
                f"awaiting_depth ({waiting}) must be of a preset whose stages follow from the depth (preset_name is "
                f"{self.preset_name!r}), and without stages"
            )
        _check_arguments(self.preset_name, function, waiting)
        function(**_thawed(self.awaiting_depth), num_layers=_ANY_DEPTH)  # says what is wrong with the values

    def _check_sites(self) -> None:
        layers = [layer for stage in self.stages for layer in stage.layers]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise ValueError(f"layers {twice} are named by more than one stage; a layer holds one site")
        for stage in self.stages if self.objective is not None else ():
            self.objective.check_stage(stage)
        check_falling(self.stages, self.values)

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
        function = PRESETS[check_choice("preset", name, PRESETS)]
        common = {key: hyperparameters.pop(key) for key in COMMON_FIELDS if key in hyperparameters}
        _check_arguments(name, function, hyperparameters)
        try:
            made = function(**hyperparameters)
        except DepthUnknown:
            made = {"awaiting_depth": _with_defaults(function, hyperparameters)}
        return cls(**{**made, "preset_name": name, **common})

    def resolve(self, num_layers: int) -> "PruningConfig":
        """This config for a model of `num_layers`: every stage names its layers and values.

        Raises:
            ValueError: a layer that such a model does not have.
        """
        config = self
        if self.awaiting_depth:
            made = PRESETS[self.preset_name](**_thawed(self.awaiting_depth), num_layers=num_layers)
            config = replace(self, **made, awaiting_depth=())
        for layer in config.sites:
            if layer >= num_layers:
                raise ValueError(f"layer ({layer}) must be in [0, {num_layers - 1}]: the model has {num_layers} layers")
        return config

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each site, stage after stage."""
        return tuple(value for stage in self.stages for value in stage.values)

    def with_values(self, values: Sequence[float]) -> "PruningConfig":
        """The same sites with other values, stage after stage.

        Raises:
            ValueError: not as many as there are sites, or a value out of range.
        """
        values = tuple(values)
        if len(values) != len(self.values):
            raise ValueError(f"values ({list(values)}) must be one per site, and there are {len(self.values)}")
        stages = zip(self.stages, self._by_stage(values))
        return replace(self, stages=tuple(replace(stage, values=own) for stage, own in stages))

    def _by_stage(self, values: Sequence[float]) -> list[tuple[float, ...]]:
        """One value per site -> each stage's."""
        rest = iter(values)
        return [tuple(islice(rest, len(stage.layers))) for stage in self.stages]

    def with_learned(self, values: Sequence[float]) -> "PruningConfig":
        """`with_values`, where values that may not rise are brought down to those of earlier sites."""
        return self.with_values(falling(self.stages, values))

    def eased(self, progress: float, length: int) -> "PruningConfig":
        """The same sites on the way from nothing pruned (progress 0) to these values (1).

        Args:
            length: tokens of the longest input, which a count of kept tokens starts from.
        """
        sites = zip(site_rules(self.stages), self.values)
        return self.with_values([eased(rule, value, progress, length) for rule, value in sites])

    def at_budget(self, macs: float, length: int) -> "PruningConfig":
        """The values that cost this MAC ratio, interpolated between neighbouring `budgets`; at 1 nothing is pruned.

        Args:
            length: tokens of the longest input.

        Raises:
            ValueError: no budgets, or a ratio that none of them reaches.
        """
        return self.with_values(values_at(self.budgets, macs, self.stages, length))

    @classmethod
    def coerce(cls, value: Any, num_layers: int | None = None) -> "PruningConfig | None":
        """A `PruningConfig` from what users write: one, None, a preset's name, its dict, or `{"preset": name, ...}`.

        With `num_layers` it is resolved, and a preset that was given no layers gets `default_layers(num_layers)`.
        """
        if value is None:
            return None
        config = value if isinstance(value, cls) else cls._written(value, num_layers)
        return config if num_layers is None else config.resolve(num_layers)

    @classmethod
    def _written(cls, value: Any, num_layers: int | None) -> "PruningConfig":
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict):
            raise ValueError(
                f"pruning ({value!r}) must be a PruningConfig, a preset's name ({', '.join(PRESETS)}), a dict or None"
            )
        if "stages" in value or "format_version" in value:
            return cls.from_dict(value)
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"a hyper-parameter's name ({key!r}) must be text")
        hyperparameters = dict(value)
        name = hyperparameters.pop("preset", None)
        function = PRESETS[check_choice("preset", name, PRESETS)]
        if num_layers is not None and "layers" in inspect.signature(function).parameters:
            hyperparameters.setdefault("layers", default_layers(num_layers))
        return cls.preset(name, **hyperparameters)

    @cached_property
    def sites(self) -> dict[int, Site]:
        """The site at each layer that has one.

        Raises:
            ValueError: the stages follow from the depth of a model, which is not known yet.
        """
        if self.awaiting_depth:
            raise ValueError(f"preset {self.preset_name!r} has its sites once the depth is known: resolve(num_layers)")
        return {site.layer: site for stage in self.stages for site in stage.sites()}

    @property
    def idle(self) -> bool:
        """Whether no site can remove anything."""
        return all(site.idle for site in self.sites.values())

    @property
    def tracks_sizes(self) -> bool:
        """Whether it matters for how many input tokens a token stands."""
        return self.proportional_attention or any(stage.reduction in MERGES for stage in self.stages)

    def check_class_token(self) -> None:
        """Raises a ValueError if a stage scores by a class token, for models that have none."""
        for stage in self.stages:
            stage.check_class_token()

    def check_token_ids(self) -> None:
        """Raises a ValueError if a stage scores by token ids, for models that have none."""
        for stage in self.stages:
            stage.check_token_ids()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {
            "format_version": FORMAT_VERSION,
            "preset_name": self.preset_name,
            "stages": [_plain(asdict(stage)) for stage in self.stages],
            "execution": self.execution,
            "protected_token_ids": list(self.protected_token_ids),
            "min_tokens": self.min_tokens,
            "proportional_attention": self.proportional_attention,
            "objective": None if self.objective is None else asdict(self.objective),
            "budgets": _plain(self.budgets),
            "awaiting_depth": _thawed(self.awaiting_depth),
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


COMMON_FIELDS = ("execution", "protected_token_ids", "min_tokens", "objective", "budgets")
_ANY_DEPTH = 12


def _with_defaults(function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All of a preset's hyper-parameters, in plain types."""
    bound = inspect.signature(function).bind(**given)
    bound.apply_defaults()
    return {name: _plain(_list_of_pair(value)) for name, value in bound.arguments.items() if name != "num_layers"}


def _list_of_pair(value: Any) -> Any:
    """`(r, inflect)` as [r, float(inflect)], which no list of one r per layer is."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real) and not isinstance(value[1], bool):
        return [value[0], float(value[1])]
    return value


def _plain(value: Any) -> Any:
    """In JSON types."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(waiting: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in waiting}


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
