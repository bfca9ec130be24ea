"""What a method's own training needs: how masks stand for removal, and what is added to the loss.

A new objective is one entry in a table of this file and one penalty in `soft_pruning`.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .pruning_stage import PruningStage
from .value_checks import check_choice, check_fields, check_mapping, check_number, check_rate, is_a, quoted


PHASES = ("soft", "hard")


@dataclass(frozen=True)
class Method:
    """What an objective asks of the stages it trains, and what it takes if nothing is said.

    rules: the selection rules that it knows masks for. saliencies: scores that are known where masks stand for removal.
    penalty: the weight of what is added to the loss, of a budget's damping. temperature: of the masks; None: none.
    on_hidden: whether hidden states are multiplied by the masks; otherwise log(mask) is added to the attention logits
        of the masked keys, which in the limit is removal.
    """

    rules: tuple[str, ...]
    saliencies: tuple[str, ...]
    penalty: float
    temperature: float | None
    on_hidden: bool = False


_VOTES = ("cls_attention", "received_attention", "received_from_others")
OBJECTIVES = MappingProxyType(
    {
        # sigmoid((score - threshold) / temperature), learned thresholds, penalty x mean mask (LTP, KDD 2022)
        "ltp": Method(("threshold",), _VOTES, 0.1, 1e-3),
        # r_l[rank], penalty x sum_l l |r_l| (PoWER-BERT, ICML 2020)
        "power_bert": Method(("keep_count",), (*_VOTES, "key_norm"), 3e-4, None, on_hidden=True),
        # a hard Gumbel mask of the predictor, penalty x mean_s (mean mask - rate_s)^2 (DynamicViT, NeurIPS 2021)
        "dynamicvit": Method(("keep_rate",), ("learned",), 2.0, 1.0),
        # sigmoid(log(score / threshold) / temperature), learned thresholds, a constraint on the expected MAC ratio, and
        # penalty x (ratio - target)^2, which damps the multipliers (Platt and Barr, NIPS 1987)
        "budget": Method(
            ("threshold", "relative_threshold", "median_threshold"),
            (*_VOTES, "cls_value_norm", "learned", "token_prior"),
            3.0,
            0.2,
        ),
    }
)


@dataclass(frozen=True)
class Objective:
    """How a pruning is trained beyond the task's loss.

    Args:
        name: one of `OBJECTIVES`.
        phase: `"soft"`: in training nothing is removed and masks stand for it; `"hard"`: tokens are removed in training
            as in evaluation, and what was learned stays as it is.
        target_macs: the MAC ratio, in (0, 1], that `budget` is to meet; for no other objective.
        penalty: weight of what is added to the loss; the objective's usual one if None.
        temperature: of the masks, > 0; likewise.

    Raises:
        ValueError: an unknown name, a value out of range, a budget without a target.
    """

    name: str
    phase: str = "soft"
    target_macs: float | None = None
    penalty: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", check_choice("objective", self.name, OBJECTIVES))
        object.__setattr__(self, "phase", check_choice("phase", self.phase, PHASES))
        method = OBJECTIVES[self.name]
        if (self.name == "budget") != (self.target_macs is not None):
            raise ValueError(
                f"target_macs ({quoted(self.target_macs)}) must be given with objective 'budget' and no other"
            )
        if self.target_macs is not None:
            object.__setattr__(self, "target_macs", check_rate("target_macs", self.target_macs))
        for name in ("penalty", "temperature"):
            self._settle(name, getattr(self, name), getattr(method, name))

    def _settle(self, name: str, given: float | None, usual: float | None) -> None:
        if usual is None and given is not None:
            raise ValueError(f"{name} ({quoted(given)}) must not be given: objective {self.name!r} has none")
        value = usual if given is None else check_number(name, given)
        if value is not None and (value < 0 or (value == 0 and name == "temperature")):
            raise ValueError(f"{name} ({value!r}) must be {'> 0' if name == 'temperature' else '>= 0'}")
        object.__setattr__(self, name, value)

    @property
    def method(self) -> Method:
        return OBJECTIVES[self.name]

    @property
    def learns_values(self) -> bool:
        """Whether the values of the sites are learned, and not given."""
        return self.name != "dynamicvit"

    @classmethod
    def coerce(cls, value: Any) -> "Objective | None":
        """An `Objective` from one, None, its name, or its fields as a dict."""
        if value is None or is_a(value, cls):
            return value
        if is_a(value, str):
            return cls(value)
        given = check_mapping("objective", value, "an Objective, its name, a dict or None")
        if "name" not in given:
            raise ValueError(f"objective ({quoted(given)}) must have 'name': one of {', '.join(OBJECTIVES)}")
        check_fields("Objective", given, cls.__dataclass_fields__)
        return cls(**given)

    def check_stage(self, stage: PruningStage) -> None:
        """Raises a ValueError for a stage that this objective has no masks for."""
        method = self.method
        if stage.rule not in method.rules or stage.reduction != "drop":
            raise ValueError(
                f"objective {self.name!r} trains stages with rule {' or '.join(map(repr, method.rules))} and reduction "
                f"'drop', not rule {stage.rule!r} with reduction {stage.reduction!r}"
            )
        if stage.saliency not in method.saliencies:
            raise ValueError(
                f"objective {self.name!r} needs saliency {' or '.join(map(repr, method.saliencies))}, not "
                f"{stage.saliency!r}"
            )
