"""The pruning config: what it refuses, and that it survives a JSON round trip."""

import json

import methods
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_tokenprune
from hf_tokenprune import PruningConfig, PruningStage, TokenPruneBertConfig
from hf_tokenprune.modeling.pruning_config import default_layers
from hf_tokenprune.modeling.pruning_stage import keep_count, rate_ratio


def preset(name: str = "top_k", **values: object) -> PruningConfig:
    return PruningConfig.preset(name, **{"layers": [1, 2], **values})


def stage(**values: object) -> PruningStage:
    usual = {"layers": [1, 2], "saliency": "cls_attention", "rule": "keep_rate", "values": [0.5, 0.3]}
    return PruningStage(**{**usual, **values})


REFUSED = {
    "preset": (lambda: preset("topk"), ["'topk'", "top_k", "adaptive"]),
    "hyper-parameter": (lambda: preset(keeprate=0.5), ["'keeprate'", "keep_rate"]),
    "missing": (lambda: PruningConfig.preset("top_k"), ["'layers'"]),
    "rate": (lambda: preset(keep_rate=1.3), ["1.3", "(0, 1]"]),
    "rate 0": (lambda: preset(keep_rate=0), ["(0)", "(0, 1]"]),
    "rate nan": (lambda: preset(keep_rate=float("nan")), ["nan", "finite"]),
    "rate text": (lambda: preset(keep_rate="half"), ["'half'", "number"]),
    "rate list": (lambda: preset(keep_rate=[0.7, 0.5]), ["[0.7, 0.5]", "number"]),
    "threshold": (lambda: preset("adaptive", threshold=-0.1), ["-0.1", ">= 0"]),
    "thresholds": (lambda: preset("adaptive", threshold=[0.1]), ["[0.1]", "one per layer"]),
    "saliency": (lambda: preset("adaptive", saliency="luck"), ["'luck'", "cls_attention"]),
    "execution": (lambda: preset(execution="fast"), ["'fast'", "packed"]),
    "min_tokens": (lambda: preset(min_tokens=0), ["(0)", ">= 1"]),
    "protected": (lambda: preset(protected_token_ids=[-1]), ["-1", ">= 0"]),
    "layers negative": (lambda: preset(layers=[-1]), ["-1", ">= 0"]),
    "layers twice": (lambda: preset(layers=[2, 2]), ["[2, 2]", "rise"]),
    "layers none": (lambda: preset(layers=[]), ["[]", "at least one"]),
    "layers float": (lambda: preset(layers=[1.5]), ["1.5", "integer"]),
    "rising": (lambda: stage(values=[0.3, 0.5]), ["[0.3, 0.5]", "not rise"]),
    "rising stages": (
        lambda: PruningConfig([stage(layers=[3], values=[0.5]), stage(layers=[1], values=[0.3])]),
        ["[0.3, 0.5]", "not rise"],
    ),
    "layer in two stages": (lambda: PruningConfig([stage(), stage()]), ["[1, 2]", "one site"]),
    "rule": (lambda: stage(rule="best"), ["'best'", "keep_rate"]),
    "reduction": (lambda: stage(reduction="melt"), ["'melt'", "drop"]),
    "place": (lambda: stage(place="after"), ["'after'", "between"]),
    "stage": (lambda: PruningConfig([7]), ["7", "PruningStage"]),
    "stage field": (lambda: PruningConfig([{"layers": [1]}]), ["'saliency'"]),
    "field": (lambda: PruningConfig.from_dict({**preset().to_dict(), "speed": 2}), ["'speed'", "known"]),
    "version": (lambda: PruningConfig.from_dict({**preset().to_dict(), "format_version": 99}), ["99", "must be 1"]),
    "no version": (lambda: PruningConfig.from_dict({"stages": []}), ["None", "must be 1"]),
    "preset name": (lambda: PruningConfig(preset_name=3), ["preset_name", "3"]),
    "stage unknown field": (
        lambda: PruningConfig([{"layers": [1], "saliency": "a", "rule": "b", "values": [1], "speed": 2}]),
        ["'speed'", "known"],
    ),
    "stages text": (lambda: PruningConfig("top_k"), ["'top_k'", "list"]),
    "protected text": (lambda: preset(protected_token_ids="12"), ["'12'", "list"]),
    "protected bool": (lambda: preset(protected_token_ids=[True]), ["True", "integer"]),
    "execution list": (lambda: preset(execution=["packed"]), ["['packed']", "packed, padded"]),
    "threshold huge": (lambda: preset("adaptive", threshold=10**400), ["threshold", "finite"]),
    "common in from_dict": (lambda: PruningConfig.from_dict({"format_version": 1, "min_tokens": 1.5}), ["1.5", ">= 1"]),
    "not a dict": (lambda: PruningConfig.from_dict([1]), ["[1]", "dict"]),
    "coerce": (lambda: PruningConfig.coerce(3), ["3", "PruningConfig"]),
    "fuse_token": (lambda: preset("evit", fuse_token="half"), ["'half'", "'normalized'"]),
    "evit rates": (lambda: preset("evit", keep_rate=[0.5]), ["[0.5]", "one per layer"]),
    "evit rate": (lambda: preset("evit", keep_rate=[0.5, 0]), ["(0)", "(0, 1]"]),
    "r": (lambda: PruningConfig.preset("tome", r=-3), ["r (-3)", ">= 0"]),
    "r float": (lambda: PruningConfig.preset("tome", r=2.5), ["2.5", "integer"]),
    "inflect": (lambda: PruningConfig.preset("tome", r=(8, 3)), ["inflect (3", "[-1, 1]"]),
    "inflect true": (lambda: PruningConfig.preset("tome", r=(2, True)), ["(True)"]),
    "prune_kept rises": (
        lambda: PruningConfig.preset("diffrate", prune_kept=[9, 12], merge_kept=[8, 7]),
        ["prune_kept ([9, 12])", "not rise"],
    ),
    "r list": (lambda: PruningConfig.preset("tome", r=[3, 1, "4"]), ["'4'", "integer"]),
    "r for too many layers": (lambda: PruningConfig.preset("tome", r=[3] * 5).resolve(4), ["layer (4)", "[0, 3]"]),
    "proportional": (
        lambda: PruningConfig.preset("tome", proportional_attention=1),
        ["proportional_attention (1)", "True or False"],
    ),
    "base_rate": (lambda: preset("dynamicvit", base_rate=2), ["base_rate (2)", "(0, 1]"]),
    "retention": (lambda: PruningConfig.preset("power_bert", retention=[9, 0]), ["retention (0)", ">= 1"]),
    "retention rises": (lambda: PruningConfig.preset("power_bert", retention=[5, 9]), ["[5, 9]", "not rise"]),
    "retention missing": (lambda: PruningConfig.preset("power_bert"), ["'retention'"]),
    "both": (
        lambda: PruningConfig.preset("length_adaptive", length_config=[5], keep_rate=0.5),
        ["exactly one", "length_config", "keep_rate"],
    ),
    "neither": (lambda: PruningConfig.preset("ltp"), ["exactly one", "final_token_threshold", "thresholds"]),
    "ltp threshold": (lambda: PruningConfig.preset("ltp", final_token_threshold=-1), ["-1", ">= 0"]),
    "padded_scores": (lambda: PruningConfig.preset("ltp", thresholds=[0.1], padded_scores="yes"), ["'yes'", "True"]),
    "diffrate lengths": (
        lambda: PruningConfig.preset("diffrate", prune_kept=[9, 8], merge_kept=[7]),
        ["[7]", "one per layer"],
    ),
    "diffrate merges more": (
        lambda: PruningConfig.preset("diffrate", prune_kept=[9, 8], merge_kept=[9, 9]),
        ["merge_kept ([9, 9])", "prune_kept ([9, 8])"],
    ),
    "p": (lambda: preset("top_p", p=1.5), ["p (1.5)", "(0, 1]"]),
    "place of a score": (lambda: stage(place="before"), ["'before'", "'between'", "learned, token_prior, random"]),
    "prior of a later layer": (
        lambda: stage(saliency="token_prior", place="before", layers=[1, 2]),
        ["layers ([1, 2])", "must be [0]", "'token_prior'"],
    ),
    "prior threshold": (lambda: preset("adaptive", prior_threshold=-1), ["prior_threshold (-1)", ">= 0"]),
    "pairs by another rule": (
        lambda: stage(saliency="key_similarity", reduction="merge"),
        ["'key_similarity'", "'keep_rate'", "remove_count"],
    ),
    "cut without merging": (
        lambda: stage(rule="keep_count", values=[5, 4], cut=[9, 9]),
        ["cut ([9, 9])", "'drop'"],
    ),
    "seed": (lambda: stage(saliency="random", seed=-1), ["seed (-1)", ">= 0"]),
    "sites without a depth": (lambda: PruningConfig.preset("tome", r=4).sites, ["'tome'", "resolve(num_layers)"]),
    "waiting for what is no mapping": (
        lambda: PruningConfig(preset_name="tome", awaiting_depth=5),
        ["awaiting_depth (5)", "mapping"],
    ),
    "rate that comes to nothing": (
        lambda: PruningConfig.preset("top_k", layers=list(range(12)), keep_rate=1e-30),
        ["keep_rate (1e-30)", "12 sites"],
    ),
    "more tokens than there are": (lambda: preset("top_k", min_tokens=10**30), ["min_tokens (1000", "<= 2147483647"]),
    "id that no integer holds": (
        lambda: preset("top_k", protected_token_ids=[2**63]),
        ["protected_token_ids (9223372036854775808)", "<= "],
    ),
    "threshold beyond a float": (lambda: preset("adaptive", threshold=1e60), ["threshold (1e+60)", "<= 1e+30"]),
    "objective without a name": (lambda: preset("adaptive", objective={}), ["objective ({})", "'name'", "budget"]),
    "a name that is no text": (
        lambda: PruningConfig.coerce({"preset": "top_k", 3: 4}),
        ["name (3)", "text"],
    ),
    "waiting for nothing": (
        lambda: PruningConfig(preset_name="top_k", awaiting_depth={"layers": [1]}),
        ["awaiting_depth", "'top_k'"],
    ),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_value_and_the_rule(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


layers = st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True).map(sorted)
common = {
    "execution": st.sampled_from(["auto", "packed", "padded", "masked"]),
    "protected_token_ids": st.lists(st.integers(0, 99), max_size=3),
    "min_tokens": st.integers(1, 5),
}


@st.composite
def staged(draw: st.DrawFn) -> PruningConfig:
    """Two stages by different rules, taking turns."""
    depths = draw(st.lists(st.integers(0, 30), min_size=2, max_size=8, unique=True).map(sorted))
    rates = sorted(draw(st.lists(st.floats(0.01, 1), min_size=len(depths[::2]), max_size=len(depths[::2]))))
    saliency = st.sampled_from(["cls_attention", "received_attention"])
    stages = (
        PruningStage(depths[::2], draw(saliency), "keep_rate", rates[::-1]),
        PruningStage(depths[1::2], draw(saliency), "relative_threshold", [0.5] * len(depths[1::2])),
    )
    return PruningConfig(stages=stages, **{name: draw(value) for name, value in common.items()})


configs = st.one_of(
    staged(),
    st.sampled_from(list(methods.METHODS.values())),
    st.builds(PruningConfig.preset, st.just("tome"), r=st.tuples(st.integers(0, 20), st.sampled_from([-1, 0, 0.3, 1]))),
    st.builds(PruningConfig.preset, st.just("tome"), r=st.lists(st.integers(0, 20), min_size=1, max_size=12)),
    st.builds(PruningConfig.preset, st.just("top_k"), layers=layers, keep_rate=st.floats(0.01, 1.0), **common),
    st.builds(PruningConfig.preset, st.just("adaptive"), layers=layers, threshold=st.floats(0, 9), **common),
)


@settings(derandomize=True, max_examples=100)
@given(configs)
def test_equal_after_a_json_round_trip(config):
    again = PruningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    config, again = config.resolve(31), again.resolve(31)
    assert again.sites == config.sites
    assert sorted(again.sites) == sorted(layer for stage in config.stages for layer in stage.layers)


def test_a_preset_is_the_same_as_its_stages():
    assert preset(keep_rate=0.7).stages == (stage(values=[0.7, 0.49]),)
    assert [site.value for site in preset(keep_rate=0.7, layers=[1, 2, 5]).sites.values()] == [0.7, 0.49, 0.343]


@pytest.mark.parametrize(
    "r, expected",
    [
        (12, [12] * 6),
        ((16, -0.5), [24, 20, 17, 14, 11, 8]),
        ([16, -0.5], [24, 20, 17, 14, 11, 8]),  # as JSON has it
        ((10, 1), [0, 4, 8, 12, 16, 20]),
        ((10, 0), [10] * 6),
        ((10, 0.9), [1, 4, 8, 11, 15, 19]),  # 10 x (1 - 0.9) is 1, and not 0 as in floats
        ([10, 1], [10, 1, 0, 0, 0, 0]),
        ([3, 2, 1], [3, 2, 1, 0, 0, 0]),
    ],
)
def test_schedules_of_tome(r, expected):
    config = PruningConfig.preset("tome", r=r)
    again = PruningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert [site.value for site in again.resolve(6).sites.values()] == expected
    assert config.resolve(6) == again.resolve(6)
    assert config.resolve(6).resolve(6) == config.resolve(6)


def test_schedules_by_depth():
    ltp = PruningConfig.preset("ltp", final_token_threshold=0.012).resolve(4)
    assert [site.value for site in ltp.sites.values()] == pytest.approx([0, 0.003, 0.006, 0.009])
    length = PruningConfig.preset("length_adaptive", keep_rate=0.9).resolve(3)
    assert [site.value for site in length.sites.values()] == [0.9, 0.81, 0.729]


def test_a_score_by_a_class_token_needs_one():
    class WithoutClassToken(TokenPruneBertConfig):
        class_token = False

    with pytest.raises(ValueError, match=r"'cls_attention'.*class token.*received_attention, .*usual substitute"):
        WithoutClassToken(num_hidden_layers=4, pruning=preset())
    fine = WithoutClassToken(num_hidden_layers=4, pruning=preset(saliency="received_attention"))
    with pytest.raises(ValueError, match="'cls_value_norm'"):
        fine.pruning = {"preset": "value_merge"}
    assert fine.pruning == preset(saliency="received_attention")


@pytest.mark.parametrize("form", ["top_k", {"preset": "top_k"}, {"preset": "top_k", "keep_rate": 0.7}])
def test_coerced_forms(form):
    assert PruningConfig.coerce(form, 12) == preset(layers=[3, 6, 9], keep_rate=0.7)
    assert PruningConfig.coerce(None, 12) is None


@pytest.mark.parametrize("depth, sites", [(12, [3, 6, 9]), (6, [1, 3, 4]), (2, [0, 1]), (1, [0])])
def test_default_layers(depth, sites):
    assert default_layers(depth) == sites


def test_counts_are_exact():
    assert keep_count(90, rate_ratio(0.7)) == 63 and int(0.7 * 90) == 62
    for tokens in range(1001):
        for percent in range(1, 101):
            assert keep_count(tokens, rate_ratio(percent / 100)) == tokens * percent // 100


def test_nested_in_the_model_config(tmp_path):
    config = TokenPruneBertConfig(num_hidden_layers=4, pruning=preset(protected_token_ids=[3]))
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["pruning"] == config.pruning.to_dict() and on_disk["pruning"]["format_version"] == 1
    again = TokenPruneBertConfig.from_pretrained(tmp_path)
    assert again.pruning == config.pruning
    assert again.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=r"layer \(7\) must be in \[0, 3\]"):
        again.pruning = preset(layers=[7])
    with pytest.raises(ValueError, match=r"layer \(2\) must be in \[0, 1\]"):
        again.num_hidden_layers = 2
    assert again.pruning == config.pruning and again.num_hidden_layers == 4


def test_rates_are_the_decimals_as_written():
    assert keep_count(90, rate_ratio(0.3333333333333333)) == 29
    assert keep_count(7_000_000, rate_ratio(0.123456789012345)) == 864_197


def test_numpy_numbers_are_numbers():
    made = preset(layers=list(np.array([1, 2])), keep_rate=np.float64(0.7), min_tokens=np.int64(2))
    assert made == preset(keep_rate=0.7, min_tokens=2)
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()


def test_all_names_can_be_imported():
    assert all(getattr(hf_tokenprune, name) for name in hf_tokenprune.__all__)
    assert set(hf_tokenprune.__all__) <= set(dir(hf_tokenprune))
