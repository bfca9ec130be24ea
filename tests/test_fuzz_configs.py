"""Hostile prunings: valid and the same after JSON, or refused in one sentence that quotes the value."""

import json
import linecache
import math
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Inexact, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hostile import HOSTILE, Broken, Level, Way, deep
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, BertModel

import hf_tokenprune
from hf_tokenprune import PruningConfig, PruningStage, TokenPruneBertConfig, TokenPruneBertModel, prune
from hf_tokenprune.modeling.presets import PRESETS
from hf_tokenprune.modeling.pruning_objective import OBJECTIVES, Objective
from hf_tokenprune.modeling.pruning_stage import REDUCTIONS, RULES, SALIENCIES
from hf_tokenprune.modeling.value_checks import LONGEST, is_a, plain_number, plain_text, quoted


FLOOR = Path(hf_tokenprune.__file__).parent
LONGEST_MESSAGE = 500
SMALL, LARGE = 400, 10_000

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.integers(),
    st.floats(0, 1),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(sorted({*PRESETS, *SALIENCIES, *RULES, *REDUCTIONS, *OBJECTIVES, "packed", "before", "soft"})),
)
json_like = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
# As functions: hypothesis asks values that it draws.
hostile = st.sampled_from(sorted(HOSTILE)).map(HOSTILE.__getitem__)
anything = st.one_of(hostile, hostile, json_like.map(lambda value: lambda: value))


# What they go into

rates = st.integers(1, 100).map(lambda percent: percent / 100)
BUDGETS = {"tome": [[0.5, [4, 4, 4, 4]], [0.8, [1, 1, 1, 1]]], "length_adaptive": [[0.5, [0.5] * 4]]}
PRESET_ARGUMENTS = {
    "top_k": {"layers": [1, 2], "keep_rate": 0.6, "saliency": "key_norm"},
    "evit": {"layers": [0, 2], "keep_rate": [0.6, 0.5], "fuse_token": True, "saliency": "cls_attention"},
    "tome": {"r": [4, 3, 2], "proportional_attention": True},
    "diffrate": {"prune_kept": [30, 20, 14, 9], "merge_kept": [22, 16, 10, 7]},
    "dynamicvit": {"layers": [1, 3], "base_rate": 0.6},
    "power_bert": {"retention": [20, 12, 8, 5]},
    "length_adaptive": {"keep_rate": 0.75},
    "ltp": {"final_token_threshold": 0.05, "padded_scores": False},
    "adaptive": {
        "layers": [1, 2],
        "threshold": 0.8,
        "saliency": "cls_attention",
        "relative_to": "mean",
        "place": "between",
        "prior_threshold": 0.5,
    },
    "adaptive_fuse": {"layers": [1, 2], "threshold": [0.8, 0.7], "relative_to": "median"},
    "value_merge": {"layers": [1, 2], "keep_rate": 0.5},
    "top_p": {"layers": [1, 2], "p": 0.7, "saliency": "cls_attention"},
}
assert set(PRESET_ARGUMENTS) == set(PRESETS)
OBJECTIVE = {"name": "budget", "phase": "soft", "target_macs": 0.5, "penalty": 3.0, "temperature": 0.2}


@st.composite
def written(draw: st.DrawFn) -> dict[str, Any]:
    """A valid dict of a pruning: a preset with its hyper-parameters, or stages."""
    name = draw(st.sampled_from(sorted(PRESETS)))
    value: dict[str, Any] = {"preset": name, **PRESET_ARGUMENTS[name], "min_tokens": 2, "execution": "padded"}
    value["protected_token_ids"] = [3, 4]
    if name in BUDGETS:
        value["budgets"] = BUDGETS[name]
    if name == "adaptive":
        value["objective"] = OBJECTIVE
    if name == "top_p":
        value["budgets"] = [[0.5, [0.6, 0.5]], [0.8, [0.9, 0.8]]]
    whole = PruningConfig.coerce(value).to_dict()
    return json.loads(json.dumps(draw(st.sampled_from([value, value, whole]))))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where a value could be exchanged for another one: itself, and all that it holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, item in inner for place in places(item, (*path, key))]


def exchanged(value: Any, path: tuple, other: Any) -> Any:
    """The value with another one at a place, where it has that."""
    if not path:
        return other
    if type(value) not in (dict, list):
        return value
    copied = dict(value) if type(value) is dict else list(value)
    copied[path[0]] = exchanged(value[path[0]], path[1:], other) if len(path) > 1 else other
    return copied


@st.composite
def mutated(draw: st.DrawFn) -> Callable[[], Any]:
    """Makes a valid dict with one or two places exchanged for something else, or with one name more."""
    value = draw(written())
    paths = [*places(value), ("more",)]
    edits = draw(st.lists(st.tuples(st.sampled_from(paths), anything), min_size=1, max_size=2))

    def make() -> Any:
        made = value
        for path, other in sorted(edits, key=lambda edit: -len(edit[0])):  # the outer one last
            made = exchanged(made, path, other())
        return made

    return make


# The ways in

NATIVE = tiny.build(tiny.Case(BertModel, tiny.BERT))


def _by_arguments(value: Any) -> Any:
    """`preset(...)` or the class itself with the entries as arguments, as a user writes them."""
    if type(value) is not dict or not all(type(name) is str for name in value):
        return PruningConfig.coerce(value)
    value = dict(value)
    if "preset" in value:
        name = value.pop("preset")
        return PruningConfig.preset(name, **{key: item for key, item in value.items() if key not in ("name", "cls")})
    value.pop("format_version", None)
    return PruningConfig(**{key: item for key, item in value.items() if key in PruningConfig.__dataclass_fields__})


def _by_set_pruning(value: Any) -> Any:
    model = prune(NATIVE, None)
    model.set_pruning(value)
    return model.config.pruning


WAYS: dict[str, Callable[[Any], Any]] = {
    "coerce": PruningConfig.coerce,
    "coerce with a depth": lambda value: PruningConfig.coerce(value, tiny.LAYERS),
    "from_dict": PruningConfig.from_dict,
    "arguments": _by_arguments,
    "prune": lambda value: prune(NATIVE, value).config.pruning,
    "set_pruning": _by_set_pruning,
    "model config": lambda value: TokenPruneBertConfig(num_hidden_layers=tiny.LAYERS, pruning=value).pruning,
}


# What is asked of the answer


def assert_plain(value: Any) -> None:
    """JSON's types alone, exactly."""
    if type(value) is dict:
        assert all(type(name) is str for name in value)
    for item in value.values() if type(value) is dict else value if type(value) is list else ():
        assert_plain(item)
    assert type(value) in (dict, list, str, int, float, bool, type(None)), type(value)


def assert_round_trip(config: PruningConfig | None) -> None:
    if config is None:
        return
    as_dict = config.to_dict()
    assert_plain(as_dict)
    again = PruningConfig.from_dict(json.loads(json.dumps(as_dict, allow_nan=False)))
    assert again == config and hash(again) == hash(config)
    assert again.to_dict() == as_dict


def assert_refused_well(error: Exception) -> None:
    """In our words, in one short line."""
    *_, last = traceback.walk_tb(error.__traceback__)
    line = linecache.getline(last[0].f_code.co_filename, last[1])
    message = str(error)
    assert type(error) in (ValueError, TypeError), f"{type(error)}: {message}"
    assert Path(last[0].f_code.co_filename).is_relative_to(FLOOR), f"{last[0].f_code.co_filename}: {message}"
    assert line.lstrip().startswith("raise "), f"not our words: {message} in {line}"
    assert len(message) < LONGEST_MESSAGE, f"{len(message)} characters: {message}"
    assert "\n" not in message and message.isprintable(), message


def answer(make: Callable[[], Any]) -> str:
    try:
        config = make()
    except Exception as error:
        assert_refused_well(error)
        return "refused"
    assert_round_trip(config)
    return "valid"


def fuzz(examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(), st.sampled_from(sorted(WAYS)))
    def check(make: Callable[[], Any], way: str) -> None:
        value = make()
        event(answer(lambda: WAYS[way](value)))

    check()


def said_of(value: Any) -> set[str]:
    """What of a value a message must say at least: the beginning of how it is written, as it came or as a number."""
    holds_others = is_a(value, (Mapping, Sequence)) and not is_a(value, (str, bytes))
    if holds_others or is_a(value, PruningStage) or plain_text(value) in PRESETS:
        return {""}  # what is wrong may be an entry of it, or what it does not go with
    number, text = plain_number(value), plain_text(value)
    read = [item for item in (number, text) if item is not None]
    read += [float(number)] if number is not None and abs(number) < 1e300 else []
    return {quoted(item)[:8] for item in (value, *read)}


# One pruning of each kind, written out: their places are all that there are.
WRITTEN = [
    {"preset": name, **values, "min_tokens": 2, "execution": "padded", "protected_token_ids": [3]}
    for name, values in PRESET_ARGUMENTS.items()
]
WRITTEN += [{**WRITTEN[8], "objective": OBJECTIVE}]
WRITTEN += [{"preset": name, **PRESET_ARGUMENTS[name], "budgets": budgets} for name, budgets in BUDGETS.items()]
WRITTEN += [PruningConfig.coerce(value).to_dict() for value in (WRITTEN[3], WRITTEN[11], *WRITTEN[-3:])]


@pytest.mark.parametrize("name", HOSTILE)
def test_each_hostile_value_in_each_place(name):
    refused = 0
    for valid in WRITTEN:
        for path in places(valid)[1:]:
            value = HOSTILE[name]()
            made = exchanged(valid, path, value)
            try:
                config = PruningConfig.coerce(made, 4)
            except Exception as error:
                assert_refused_well(error)
                assert any(said in str(error) for said in said_of(value)), (path, str(error))
                refused += 1
            else:
                assert_round_trip(config)
    assert refused > 50


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HOSTILE)
def test_each_hostile_value_by_each_way(name, way):
    answer(lambda: WAYS[way](HOSTILE[name]()))


TOP_P = PruningConfig.preset("top_p", layers=[1, 2], budgets=[[0.5, [0.6, 0.5]], [0.8, [0.9, 0.8]]])
CUTS = PruningConfig.preset("power_bert", retention=[20, 12])
FURTHER: dict[str, Callable[[Any], Any]] = {
    "resolve": PruningConfig.preset("tome").resolve,
    "coerce, the depth": lambda value: PruningConfig.coerce("top_k", value),
    "with_values": TOP_P.with_values,
    "with_values, one": lambda value: TOP_P.with_values([0.9, value]),
    "with_learned": TOP_P.with_learned,
    "eased": lambda value: CUTS.eased(value, 30),
    "eased, the length": lambda value: CUTS.eased(0.5, value),
    "at_budget": lambda value: TOP_P.at_budget(value, 30),
    "at_budget, the length": lambda value: replace(CUTS, budgets=[[0.5, [20, 12]]]).at_budget(0.7, value),
    "objective": Objective.coerce,
    "set_budget": lambda value: prune(NATIVE, TOP_P).set_budget(value),
    "weights": lambda value: setattr(TokenPruneBertConfig(), "transformers_weights", value),
    "a stage's layers": lambda value: PruningStage(value, "cls_attention", "keep_rate", [0.5]),
    "a stage's values": lambda value: PruningStage([1], "cls_attention", "keep_rate", value),
    "a stage's rule": lambda value: PruningStage([1], "cls_attention", value, [0.5]),
    "a stage's seed": lambda value: PruningStage([1], "cls_attention", "keep_rate", [0.5], seed=value),
}


@pytest.mark.parametrize("way", FURTHER)
def test_hostile_values_elsewhere(way):
    for name, value in HOSTILE.items():
        given = value()
        try:
            made = FURTHER[way](given)
        except Exception as error:
            assert_refused_well(error)
            assert any(said in str(error) for said in said_of(given)), (name, str(error))
        else:
            assert_round_trip(made if is_a(made, PruningConfig) else None)


@pytest.mark.parametrize("name", ["array", "tensor", "broken", "long text", "1e308"])
def test_no_decoder_whatever_says_so(name):
    with pytest.raises(ValueError, match=r"is_decoder .* must be False") as error:
        TokenPruneBertConfig(is_decoder=HOSTILE[name]())
    assert_refused_well(error.value)


@pytest.mark.parametrize("auto", [AutoModel, AutoConfig, TokenPruneBertModel])
def test_hostile_prunings_of_a_checkpoint(auto, tmp_path):
    prune(NATIVE, TOP_P).save_pretrained(tmp_path)
    on_disk = (tmp_path / "config.json").read_text()
    for value in (10**400, "x" * 5000, deep(40), [1], True, {"preset": ["top_k"]}, math.nan, {"": {}}):
        if auto is not AutoConfig:  # given by the caller
            with pytest.raises(ValueError) as error:
                auto.from_pretrained(tmp_path, pruning=value)
            assert_refused_well(error.value)
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(on_disk), "pruning": value}))
        with pytest.raises(ValueError) as error:
            auto.from_pretrained(tmp_path)
        assert_refused_well(error.value)
        (tmp_path / "config.json").write_text(on_disk)


def test_numbers_of_others_become_pythons():
    value = {
        "preset": np.str_("adaptive"),
        "layers": (np.int64(1), np.uint8(2)),
        "threshold": [np.float32(0.5), Fraction(1, 4)],
        "min_tokens": Level.TWO,
        "execution": Way.PACKED,
        "protected_token_ids": deque([np.int32(7)]),
        "objective": {"name": np.str_("budget"), "target_macs": np.float32(0.5), "penalty": Fraction(3)},
        "budgets": [(np.float16(0.5), np.array([0.5, 0.25]).tolist()), [Fraction(3, 4), range(2)]],
    }
    same = {
        "preset": "adaptive",
        "layers": [1, 2],
        "threshold": [0.5, 0.25],
        "min_tokens": 2,
        "execution": "packed",
        "protected_token_ids": [7],
        "objective": {"name": "budget", "target_macs": 0.5, "penalty": 3.0},
        "budgets": [[0.5, [0.5, 0.25]], [0.75, [0.0, 1.0]]],
    }
    made = PruningConfig.coerce(value)
    assert made == PruningConfig.coerce(same)
    assert_round_trip(made)
    waiting = PruningConfig.preset("ltp", final_token_threshold=Fraction(1, 3))
    assert_round_trip(waiting)
    assert waiting == PruningConfig.preset("ltp", final_token_threshold=1 / 3)
    assert_round_trip(PruningConfig(preset_name="tome", awaiting_depth={"r": np.int64(3)}))


@pytest.mark.parametrize(
    "name, budgets, words",
    [
        ("tome", -math.inf, r"budgets \(-inf\) must be a list"),
        ("tome", "low", r"budgets \('low'\)"),
        ("tome", max, "budgets .*built-in function max.* must be a list"),
        ("tome", [[0.5]], r"budgets \(\[0.5\]\) must be pairs"),
        ("tome", [[0.5, []]], r"a budget's values \(\(\)\) must be one per site"),
        ("tome", [[0.5, [1, 2]], [0.6, [1]]], r"a budget's values \(\(1,\)\) must be one per site, .* 2"),
        ("tome", [[0.5, [1, -2]]], r"remove_count \(-2\)"),
        ("tome", [[0.5, [1, 2]], [0.4, [1, 1]]], r"\(\[0.5, 0.4\]\) must rise"),
        ("length_adaptive", [[0.5, [0.4, 0.6]]], r"a budget's keep_rate \(\[0.4, 0.6\]\) must not rise"),
        ("ltp", [[1.5, [0.1]]], r"MAC ratio \(1.5\)"),
    ],
)
def test_budgets_are_checked_before_the_depth_is_known(name, budgets, words):
    with pytest.raises(ValueError, match=words):
        PruningConfig.preset(name, **PRESET_ARGUMENTS[name], budgets=budgets)


def test_budgets_of_another_depth_are_refused_with_it():
    waiting = PruningConfig.preset("tome", budgets=BUDGETS["tome"])
    assert waiting.resolve(4).at_budget(0.5, 30).values == (4, 4, 4, 4)
    with pytest.raises(ValueError, match="must be one per site, and there are 6"):
        waiting.resolve(6)


def test_an_objective_is_checked_before_the_depth_is_known():
    with pytest.raises(ValueError, match="objective 'ltp' trains stages with rule 'threshold'"):
        PruningConfig.preset("tome", objective="ltp")
    assert PruningConfig.preset("ltp", final_token_threshold=0.1, objective="ltp").awaiting_depth


def test_hyper_parameters_that_are_named_as_arguments_are():
    for name in ("name", "cls", "self", "num_layers"):
        with pytest.raises(ValueError, match=f"no hyper-parameter '{name}'"):
            PruningConfig.coerce({"preset": "top_k", "layers": [1], name: 3})


def test_rates_are_exact_whatever_decimals_are_to_others():
    expected = PruningConfig.preset("top_k", layers=range(9), keep_rate=0.7)
    with localcontext() as around:
        around.prec, around.traps[Inexact] = 2, True
        assert PruningConfig.preset("top_k", layers=range(9), keep_rate=0.7) == expected


def test_a_value_is_quoted_in_one_short_line():
    for name, value in HOSTILE.items():
        text = quoted(value())
        assert 0 < len(text) <= LONGEST and text.isprintable(), (name, text)
    assert quoted([0.343, 1, "a"]) == "[0.343, 1, 'a']"
    assert quoted(-(10**5000) - 7) == "-100000000000...00000007"
    assert quoted([10**39, Broken()]) == f"[{10**39}, <Broken that cannot be shown>]"


def test_hostile_prunings():
    fuzz(SMALL)


@pytest.mark.fuzz
def test_many_hostile_prunings():
    fuzz(LARGE)
