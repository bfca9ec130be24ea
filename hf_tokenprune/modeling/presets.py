"""Named methods: functions from hyper-parameters to the fields of a `PruningConfig`.

A preset is a composition of saliencies, rules and reductions, and nothing else. One that takes `num_layers` may have a
schedule that follows from the model's depth: asked for it before the depth is known, it raises `DepthUnknown`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Context, Decimal
from fractions import Fraction
from numbers import Real
from types import MappingProxyType
from typing import Any

from .pruning_stage import RULES, PruningStage
from .value_checks import (
    check_bool,
    check_choice,
    check_number,
    check_rate,
    check_removed,
    check_sequence,
    check_threshold,
    is_a,
    plain_number,
    plain_text,
    quoted,
)


class DepthUnknown(Exception):
    """A preset's stages follow from the depth of a model, and there is none yet."""


def _depth(num_layers: int | None) -> int:
    if num_layers is None:
        raise DepthUnknown
    return num_layers


def _compounded(keep_rate: float, sites: int) -> list[float]:
    """rate, rate^2, ..., as exact decimals, whatever precision the program around has set for its own."""
    rate, exactly = Decimal(repr(keep_rate)), Context(prec=28)
    rates = [float(exactly.power(rate, site + 1)) for site in range(sites)]
    if 0.0 in rates:
        raise ValueError(f"keep_rate ({quoted(keep_rate)}) must be larger: over {sites} sites it comes to 0")
    return rates


def _each_site(name: str, value: Any, layers: Sequence[int], check: Callable[[str, Any], Any]) -> list:
    """One value for all sites, or one per site."""
    values = [value] * len(layers) if is_a(value, Real) else check_sequence(name, value)
    if len(values) != len(layers):
        raise ValueError(f"{name} ({quoted(list(values))}) must be one per layer, and there are {len(layers)}")
    return [check(name, one) for one in values]


def _each_layer(name: str, values: Any, rule: str) -> tuple[range, list]:
    """The layers that a list of values for a rule, one per layer, is for."""
    values = [RULES[rule].check(name, value) for value in check_sequence(name, values)]
    RULES[rule].check_order(name, values)
    return range(len(values)), values


def _top_k(*, layers: Sequence[int], keep_rate: float = 0.7, saliency: str = "cls_attention") -> dict[str, Any]:
    """Keep the best; the rate compounds: rate^(s+1) of the input after site s.

    TokenReduction's `topk` ("Which Tokens to Use?", ICCVW 2023).
    """
    layers = check_sequence("layers", layers)
    values = _compounded(check_rate("keep_rate", keep_rate), len(layers))
    return {"stages": [PruningStage(layers, saliency, "keep_rate", values)]}


def _evit(
    *, layers: Sequence[int], keep_rate: float = 0.7, fuse_token: bool | str = True, saliency: str = "cls_attention"
) -> dict[str, Any]:
    """Keep ceil(rate n) of what arrives at each site and fuse the rest, weighted by saliency, into one more token.

    `fuse_token="normalized"`: weights that sum to 1. EViT, ICLR 2022.
    """
    layers = check_sequence("layers", layers)
    reductions = {True: "fuse", False: "drop", "normalized": "fuse_normalized"}
    fuse = fuse_token if is_a(fuse_token, bool) else plain_text(fuse_token)
    if fuse not in reductions:
        raise ValueError(f"fuse_token ({quoted(fuse_token)}) must be True, False or 'normalized'")
    values = _each_site("keep_rate", keep_rate, layers, check_rate)
    return {"stages": [PruningStage(layers, saliency, "site_keep_rate", values, reductions[fuse])]}


def _tome(
    *,
    r: int | tuple[int, float] | Sequence[int] = 8,
    proportional_attention: bool = True,
    num_layers: int | None = None,
) -> dict[str, Any]:
    """Merge the r most similar pairs of tokens at each layer; no training needed.

    r: for every layer; or `(r, inflect)`, from int(r (1 - inflect)) at the first layer linearly to 2r minus that at the
    last; or one per layer, 0 for those that the list leaves out. ToMe, ICLR 2023.
    """
    schedule = _merge_schedule(r, _depth(num_layers))
    stage = PruningStage(range(len(schedule)), "key_similarity", "remove_count", schedule, "merge")
    return {"stages": [stage], "proportional_attention": check_bool("proportional_attention", proportional_attention)}


def _merge_schedule(r: Any, num_layers: int) -> list[int]:
    if is_a(r, Real):
        return [check_removed("r", r)] * num_layers
    given = check_sequence("r", r)
    inflected = len(given) == 2 and (is_a(r, tuple) or _is_inflection(given[1]))
    if not inflected:
        listed = [check_removed("r", value) for value in given]
        return listed + [0] * (num_layers - len(listed))
    mean, inflect = check_removed("r", given[0]), check_number("inflect", given[1])
    if not -1.0 <= inflect <= 1.0:
        raise ValueError(f"inflect ({quoted(given[1])}) must be in [-1, 1]; a schedule of one r per layer is a list")
    first = int(mean * (1 - Fraction(repr(inflect))))
    step = Fraction(2 * (mean - first), max(num_layers - 1, 1))
    return [int(first + step * layer) for layer in range(num_layers)]


def _is_inflection(value: Any) -> bool:
    """Whether the second of two numbers is an `inflect`, as no r of a layer is."""
    number = plain_number(value)
    return not isinstance(number, int) or number < 0


def _diffrate(*, prune_kept: Sequence[int], merge_kept: Sequence[int]) -> dict[str, Any]:
    """At each layer drop all but the `prune_kept` best and merge those beyond the `merge_kept` best into the others.

    One number per layer, special tokens counted. DiffRate, ICCV 2023.
    """
    layers, cut = _each_layer("prune_kept", prune_kept, "keep_count")
    _, kept = _each_layer("merge_kept", merge_kept, "keep_count")
    for most, least in zip(cut, kept):
        if least > most:
            raise ValueError(f"merge_kept ({quoted(kept)}) must be at most prune_kept ({quoted(cut)}) at every layer")
    stage = PruningStage(layers, "cls_attention", "keep_count", kept, "merge_mean", cut=cut)
    return {"stages": [stage], "proportional_attention": True}


def _dynamicvit(*, layers: Sequence[int], base_rate: float = 0.7) -> dict[str, Any]:
    """Before each of the layers keep the rate^(s+1) that a small trained predictor likes best.

    DynamicViT, NeurIPS 2021.
    """
    layers = check_sequence("layers", layers)
    values = _compounded(check_rate("base_rate", base_rate), len(layers))
    stage = PruningStage(layers, "learned", "keep_rate", values, place="before")
    return {"stages": [stage], "objective": "dynamicvit"}


def _power_bert(*, retention: Sequence[int]) -> dict[str, Any]:
    """Keep the `retention[l]` tokens ([CLS] counted) that get most attention from others. PoWER-BERT, ICML 2020."""
    layers, values = _each_layer("retention", retention, "keep_count")
    return {"stages": [PruningStage(layers, "received_from_others", "keep_count", values)]}


def _length_adaptive(
    *, length_config: Sequence[int] | None = None, keep_rate: float | None = None, num_layers: int | None = None
) -> dict[str, Any]:
    """Keep the `length_config[l]` tokens that get most attention; or rate^(l+1) of the input after every layer l.

    Dropped tokens come back with their last state (Drop-and-Restore). Length-Adaptive Transformer, ACL 2021.
    """
    _one_of(length_config=length_config, keep_rate=keep_rate)
    if length_config is not None:
        layers, values = _each_layer("length_config", length_config, "keep_count")
        return {"stages": [PruningStage(layers, "received_attention", "keep_count", values)]}
    values = _compounded(check_rate("keep_rate", keep_rate), _depth(num_layers))
    return {"stages": [PruningStage(range(len(values)), "received_attention", "keep_rate", values)]}


def _ltp(
    *,
    final_token_threshold: float | None = None,
    thresholds: Sequence[float] | None = None,
    padded_scores: bool = False,
    num_layers: int | None = None,
) -> dict[str, Any]:
    """Keep the tokens whose received attention reaches the layer's threshold: final x l / L, or one per layer.

    `padded_scores=True` divides by the padded length, as the reference does: results then change with the padding.
    LTP, KDD 2022.
    """
    _one_of(final_token_threshold=final_token_threshold, thresholds=thresholds)
    if thresholds is None:
        final = check_threshold("final_token_threshold", final_token_threshold)
        depth = _depth(num_layers)
        thresholds = [final * layer / depth for layer in range(depth)]
    rule = "padded_threshold" if check_bool("padded_scores", padded_scores) else "threshold"
    layers, values = _each_layer("thresholds", thresholds, rule)
    return {"stages": [PruningStage(layers, "received_attention", rule, values)]}


def _one_of(**given: Any) -> None:
    if sum(value is not None for value in given.values()) != 1:
        values = ", ".join(f"{name} ({quoted(value)})" for name, value in given.items())
        raise ValueError(f"exactly one of {values} must be given")


def _adaptive(
    *,
    layers: Sequence[int],
    threshold: float | Sequence[float] = 0.05,
    saliency: str = "cls_attention",
    relative_to: str = "mean",
    place: str = "between",
    prior_threshold: float = 0.0,
) -> dict[str, Any]:
    """Keep what scores at least `threshold` times the average token of its sample: dull inputs lose more.

    `relative_to="median"`: the median one, which the few tokens that get most of the attention do not move. `"total"`:
    all tokens of its sample together, so that long inputs lose more than short ones, of which each token matters more.
    `saliency="learned"`, `place="before"`: a small predictor skims what goes into each layer (Transkimmer, ACL 2022).
    `prior_threshold`: the same before the first layer, by what an id is worth on average (`fit_token_prior`).
    """
    layers = check_sequence("layers", layers)
    values = _each_site("threshold", threshold, layers, check_threshold)
    rule = _RELATIVE[check_choice("relative_to", relative_to, _RELATIVE)]
    stages = [PruningStage(layers, saliency, rule, values, place=place)]
    if check_threshold("prior_threshold", prior_threshold) > 0:
        stages.insert(0, PruningStage([0], "token_prior", rule, [prior_threshold], place="before"))
    return {"stages": stages}


_RELATIVE = {"mean": "relative_threshold", "median": "median_threshold", "total": "threshold"}


def _adaptive_fuse(
    *,
    layers: Sequence[int],
    threshold: float | Sequence[float] = 0.05,
    saliency: str = "cls_attention",
    relative_to: str = "mean",
    prior_threshold: float = 0.0,
) -> dict[str, Any]:
    """`adaptive`, with the tokens that its layers drop in one summary token, weighted by their saliency."""
    *prior, stage = _adaptive(
        layers=layers,
        threshold=threshold,
        saliency=saliency,
        relative_to=relative_to,
        prior_threshold=prior_threshold,
    )["stages"]
    return {"stages": [*prior, replace(stage, reduction="fuse_normalized")]}


def _value_merge(*, layers: Sequence[int], keep_rate: float = 0.7) -> dict[str, Any]:
    """Keep the best by [CLS] attention x value norm; each other token merges into the most similar one that stays."""
    layers = check_sequence("layers", layers)
    values = _compounded(check_rate("keep_rate", keep_rate), len(layers))
    stage = PruningStage(layers, "cls_value_norm", "keep_rate", values, "merge")
    return {"stages": [stage], "proportional_attention": True}


def _top_p(
    *, layers: Sequence[int], p: float | Sequence[float] = 0.9, saliency: str = "cls_attention"
) -> dict[str, Any]:
    """Keep the fewest tokens whose saliency sums to p, sample by sample."""
    layers = check_sequence("layers", layers)
    return {"stages": [PruningStage(layers, saliency, "top_p", _each_site("p", p, layers, check_rate))]}


PRESETS: MappingProxyType[str, Callable[..., dict[str, Any]]] = MappingProxyType(
    {
        "top_k": _top_k,
        "evit": _evit,
        "tome": _tome,
        "diffrate": _diffrate,
        "dynamicvit": _dynamicvit,
        "power_bert": _power_bert,
        "length_adaptive": _length_adaptive,
        "ltp": _ltp,
        "adaptive": _adaptive,
        "adaptive_fuse": _adaptive_fuse,
        "value_merge": _value_merge,
        "top_p": _top_p,
    }
)
