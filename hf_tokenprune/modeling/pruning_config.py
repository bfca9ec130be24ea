"""What to prune, and where: a strict, immutable description that survives a JSON round trip.

A `PruningConfig` is a list of `PruningStage`s. A stage names the layers it works at, what it scores (`saliency`), how
it decides (`rule`, one value per layer), what becomes of the tokens that do not stay (`reduction`) and where in the
layer that happens (`place`). A preset is a function that returns stages. Everything is resolved here, once: the model
only ever reads `PruningConfig.sites`.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from .presets import PRESETS, DepthUnknown
from .pruning_budgets import (
    Budgets,
    check_budgets,
    check_falling,
    check_waiting_budgets,
    eased,
    falling,
    site_rules,
    values_at,
)
from .pruning_objective import Objective
from .pruning_stage import MERGES, PruningStage, Site
from .value_checks import (
    MOST_IDS,
    MOST_LAYERS,
    check_bool,
    check_choice,
    check_fields,
    check_integer,
    check_mapping,
    check_sequence,
    is_a,
    plain,
    plain_number,
    quoted,
)


FORMAT_VERSION = 1

EXECUTIONS = ("auto", "packed", "padded", "masked")


def _check_arguments(preset: str, function: Callable, given: dict[str, Any]) -> None:
    parameters = {key: p for key, p in inspect.signature(function).parameters.items() if key != "num_layers"}
    takes = f"preset {preset!r} takes {', '.join(parameters)}; with every preset go {', '.join(COMMON_FIELDS)}"
    for name in given:
        if name not in parameters:
            raise ValueError(f"preset {preset!r} has no hyper-parameter {quoted(name)}: {takes}")
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
        self._settle("stages", tuple(_stage(stage) for stage in check_sequence("stages", self.stages)))
        self._settle("execution", check_choice("execution", self.execution, EXECUTIONS))
        ids = check_sequence("protected_token_ids", self.protected_token_ids, MOST_IDS)
        self._settle("protected_token_ids", tuple(sorted({check_integer("protected_token_ids", i, 0) for i in ids})))
        self._settle("min_tokens", check_integer("min_tokens", self.min_tokens, 1))
        check_bool("proportional_attention", self.proportional_attention)
        if self.preset_name is not None:
            self._settle("preset_name", check_choice("preset_name", self.preset_name, PRESETS))
        self._settle("objective", Objective.coerce(self.objective))
        waiting = self._check_waiting()
        self._check_sites(waiting or self.stages)
        budgets = check_waiting_budgets(self.budgets, *waiting) if waiting else check_budgets(self.budgets, self.stages)
        self._settle("budgets", budgets)

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_waiting(self) -> list[PruningStage]:
        """The stage that would follow from some depth, in a list, where it waits for that."""
        waiting = check_mapping("awaiting_depth", _mapping(self.awaiting_depth), "a mapping")
        function = PRESETS.get(self.preset_name)
        if waiting and (function is None or self.stages or "num_layers" not in inspect.signature(function).parameters):
            raise ValueError(
                f"awaiting_depth ({quoted(waiting)}) must be of a preset whose stages follow from the depth "
                f"(preset_name is {self.preset_name!r}), and without stages"
            )
        if not waiting:
            self._settle("awaiting_depth", ())
            return []
        _check_arguments(self.preset_name, function, waiting)
        waiting = {name: plain(value) for name, value in waiting.items()}
        stages = function(**waiting, num_layers=_ANY_DEPTH)["stages"]  # says what is wrong with the values
        self._settle("awaiting_depth", tuple((name, _frozen(value)) for name, value in waiting.items()))
        return stages

    def _check_sites(self, stages: Sequence[PruningStage]) -> None:
        layers = Counter(layer for stage in stages for layer in stage.layers)
        twice = sorted(layer for layer, times in layers.items() if times > 1)
        if twice:
            raise ValueError(f"layers {quoted(twice)} are named by more than one stage; a layer holds one site")
        for stage in stages if self.objective is not None else ():
            self.objective.check_stage(stage)
        check_falling(stages, [value for stage in stages for value in stage.values])

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
        return cls._of_preset(name, hyperparameters)

    @classmethod
    def _of_preset(cls, name: Any, given: dict[str, Any]) -> "PruningConfig":
        name = check_choice("preset", name, PRESETS)
        common = {key: value for key, value in given.items() if key in COMMON_FIELDS}
        own = {key: value for key, value in given.items() if key not in COMMON_FIELDS}
        _check_arguments(name, PRESETS[name], own)
        try:
            made = PRESETS[name](**own)
        except DepthUnknown:
            made = {"awaiting_depth": _with_defaults(PRESETS[name], own)}
        return cls(**{**made, "preset_name": name, **common})

    def resolve(self, num_layers: int) -> "PruningConfig":
        """This config for a model of `num_layers`: every stage names its layers and values.

        Raises:
            ValueError: a layer that such a model does not have.
        """
        num_layers = check_integer("num_layers", num_layers, 1 if self.awaiting_depth else 0, MOST_LAYERS)
        config = self
        if self.awaiting_depth:
            made = PRESETS[self.preset_name](**plain(dict(self.awaiting_depth)), num_layers=num_layers)
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
        stages = zip(self.stages, self._by_stage(self._one_per_site(values)))
        return replace(self, stages=tuple(replace(stage, values=own) for stage, own in stages))

    def _one_per_site(self, values: Any) -> tuple:
        values = check_sequence("values", values)
        if len(values) != len(self.values):
            raise ValueError(f"values ({quoted(list(values))}) must be one per site, and there are {len(self.values)}")
        return values

    def _by_stage(self, values: Sequence[float]) -> list[tuple[float, ...]]:
        """One value per site -> each stage's."""
        rest = iter(values)
        return [tuple(islice(rest, len(stage.layers))) for stage in self.stages]

    def with_learned(self, values: Sequence[float]) -> "PruningConfig":
        """`with_values`, where values that may not rise are brought down to those of earlier sites."""
        return self.with_values(falling(self.stages, self._one_per_site(values)))

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
        config = value if is_a(value, cls) else cls._written(value, num_layers)
        return config if num_layers is None else config.resolve(num_layers)

    @classmethod
    def _written(cls, value: Any, num_layers: int | None) -> "PruningConfig":
        given = {"preset": value} if is_a(value, str) else value
        given = check_mapping(
            "pruning", given, f"a PruningConfig, a preset's name ({', '.join(PRESETS)}), a dict or None"
        )
        if "stages" in given or "format_version" in given:
            return cls.from_dict(given)
        name = check_choice("preset", given.pop("preset", None), PRESETS)
        if num_layers is not None and "layers" in inspect.signature(PRESETS[name]).parameters:
            given.setdefault("layers", default_layers(check_integer("num_layers", num_layers, 0, MOST_LAYERS)))
        return cls._of_preset(name, given)

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
            "stages": [plain(asdict(stage)) for stage in self.stages],
            "execution": self.execution,
            "protected_token_ids": list(self.protected_token_ids),
            "min_tokens": self.min_tokens,
            "proportional_attention": self.proportional_attention,
            "objective": None if self.objective is None else asdict(self.objective),
            "budgets": plain(self.budgets),
            "awaiting_depth": plain(dict(self.awaiting_depth)),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PruningConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a format that this version does not read, an unknown field, or a value out of range.
        """
        data = check_mapping("a pruning config", data)
        version = data.pop("format_version", None)
        if plain_number(version) != FORMAT_VERSION:
            raise ValueError(f"format_version ({quoted(version)}) of the pruning config must be {FORMAT_VERSION}")
        check_fields(cls.__name__, data, cls.__dataclass_fields__)
        return cls(**data)


COMMON_FIELDS = ("execution", "protected_token_ids", "min_tokens", "objective", "budgets")
_ANY_DEPTH = 12


def _with_defaults(function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All of a preset's hyper-parameters, in plain types."""
    bound = inspect.signature(function).bind(**given)
    bound.apply_defaults()
    return {name: _list_of_pair(value) for name, value in bound.arguments.items() if name != "num_layers"}


def _list_of_pair(value: Any) -> Any:
    """`(r, inflect)` as [r, float(inflect)], which no list of one r per layer is."""
    pair = plain(value)
    if is_a(value, tuple) and type(pair) is list and len(pair) == 2 and type(pair[1]) in (int, float):
        return [pair[0], float(pair[1])]
    return pair


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _mapping(pairs: Any) -> Any:
    """The dict that a tuple of pairs of a name and a value stands for; anything else as it is."""
    if type(pairs) not in (tuple, list):
        return pairs
    named = [pair for pair in pairs if type(pair) in (tuple, list) and len(pair) == 2 and type(pair[0]) is str]
    return dict(named) if len(named) == len(pairs) else pairs


def _stage(value: Any) -> PruningStage:
    if is_a(value, PruningStage):
        return value
    given = check_mapping("a stage", value, "a PruningStage or a dict")
    for name in ("layers", "saliency", "rule", "values"):
        if name not in given:
            raise ValueError(f"a stage ({quoted(given)}) must have {name!r}")
    check_fields("PruningStage", given, PruningStage.__dataclass_fields__)
    return PruningStage(**given)


def default_layers(num_layers: int) -> list[int]:
    """Three sites at a quarter, half and three quarters of the depth: 3, 6, 9 of twelve layers, as EViT has them."""
    return sorted({num_layers * quarter // 4 for quarter in (1, 2, 3)})
