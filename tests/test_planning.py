"""`plan`: the target that is asked for is the one that is met, or what stands in the way is said."""

import copy
import importlib
import shutil

import pytest
import torch
from tiny import BASES, BERT, HEADS, Case, build, image_inputs, inputs_for, text_inputs
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetModel

from hf_tokenprune import calibrate, count_macs, plan, prune, search_schedule
from hf_tokenprune.planning import LatencyCurve, latency_curve, measure_curve
from hf_tokenprune.profiling import Timing, speedup, time_interleaved


TEXT = Case(BertForSequenceClassification, BERT)


def _long(case: Case) -> dict[str, torch.Tensor]:
    return text_inputs([60, 41, 55], seed=2) if case.text else image_inputs(3)


@pytest.mark.parametrize("target", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_mac_ratios_are_met(target):
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=12, num_attention_heads=4, intermediate_size=128
    )
    native = build(Case(BertForSequenceClassification, config))
    inputs = text_inputs([180, 256, 230, 97], seed=1)
    planned = plan(native, inputs, target_macs=target, protected_token_ids=[3])
    assert planned.met and planned.pruning.protected_token_ids == (3,)
    measured = count_macs(prune(native, planned.pruning), inputs).ratio
    assert measured == planned.macs == pytest.approx(target, abs=0.01)
    assert f"{measured:.3f}" in planned.verdict


@pytest.mark.parametrize("case", BASES + HEADS)
def test_every_family_is_planned_for(case):
    native, inputs = build(case), _long(case)
    planned = plan(native, inputs, target_macs=0.6)
    assert planned.met == (abs(planned.macs - 0.6) <= 0.01)
    assert count_macs(prune(native, planned.pruning), inputs).ratio == planned.macs == pytest.approx(0.6, abs=0.03)


def test_sites_move_forward_only_when_they_must():
    native, inputs = build(TEXT), _long(TEXT)
    usual = plan(native, inputs, target_macs=0.7).pruning
    assert sorted(usual.sites) == [1, 2, 3]
    early = plan(native, inputs, target_macs=0.25).pruning
    assert sorted(early.sites)[0] == 0
    assert sorted(plan(native, inputs, target_macs=0.7, layers=[2]).pruning.sites) == [2]


def test_what_cannot_be_met_is_said_with_the_closest():
    native, inputs = build(TEXT), _long(TEXT)
    planned = plan(native, inputs, target_macs=0.01)
    assert not planned.met
    assert count_macs(prune(native, planned.pruning), inputs).ratio == planned.macs > 0.01
    assert "0.010 of the MACs cannot be met" in planned.verdict and f"{planned.macs:.3f}" in planned.verdict
    nothing = plan(native, inputs, target_macs=1.0)
    assert nothing.met and nothing.pruning is None


def test_where_each_token_counts_the_closest_is_not_said_to_meet():
    native, inputs = build(TEXT), text_inputs([5])
    within = [plan(native, inputs, target_macs=0.5, layers=layers) for layers in ([1, 2, 3], [0, 1, 2, 3])]
    planned = plan(native, inputs, target_macs=0.5)
    assert not planned.met and "0.500 of the MACs cannot be met within 0.01; the closest: top_k" in planned.verdict
    assert abs(planned.macs - 0.5) == min(abs(each.macs - 0.5) for each in within) > 0.01
    reached = plan(native, inputs, target_macs=round(planned.macs, 2))
    assert reached.met and reached.macs == planned.macs and "cannot" not in reached.verdict


def test_a_target_of_macs_says_that_it_did_not_look_at_time():
    for target in (0.6, 0.01):
        verdict = plan(build(TEXT), _long(TEXT), target_macs=target).verdict
        assert "Time on this device was not looked at: target_speedup" in verdict


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A device on which the time is a given function of the keep rate; counts its measurements."""
    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path))
    measured = []

    def set_to(seconds) -> list:
        def time_interleaved(calls: dict, **_: object) -> dict[object, Timing]:
            measured.append(list(calls))
            return {name: Timing((2.5 if name == "stock" else seconds(name),) * 3) for name in calls}

        monkeypatch.setattr(latency_curve, "time_interleaved", time_interleaved)
        return measured

    return set_to


def test_a_speedup_by_the_measured_curve(clock):
    measured = clock(lambda rate: 0.4 + 1.6 * rate)
    native, inputs = build(TEXT), _long(TEXT)
    planned = plan(native, inputs, target_speedup=1.5)
    (site, *_) = planned.pruning.sites.values()
    assert 2.0 / (0.4 + 1.6 * site.value) == pytest.approx(1.5, rel=0.03)
    assert planned.met and planned.speedup == 1.5 and planned.seconds == pytest.approx(2 / 1.5)
    assert planned.macs == count_macs(prune(native, planned.pruning), inputs).ratio
    same = plan(native, inputs, target_latency=2 / 1.5)
    assert same.pruning == planned.pruning
    assert len(measured) == 1, "measured once, then cached"
    plan(native, text_inputs([30]), target_speedup=1.5)
    assert len(measured) == 2, "another batch is another curve"


def test_a_speedup_out_of_reach(clock):
    clock(lambda rate: 1.0 + rate)
    planned = plan(build(TEXT), _long(TEXT), target_speedup=4.0)
    assert not planned.met and planned.speedup == pytest.approx(2 / 1.15)
    assert "4.00x cannot be met" in planned.verdict and "1.74x" in planned.verdict


def test_earlier_sites_where_the_usual_ones_are_too_slow(monkeypatch):
    def measure_curve(_, __, layers, **___) -> LatencyCurve:
        best = 3.0 if 0 in layers else 1.5
        return LatencyCurve((1.0, 0.5, 0.2), (1.0, 1.2, best), (6.0, 5.0, 6.0 / best), None)

    monkeypatch.setattr(importlib.import_module("hf_tokenprune.planning.plan"), "measure_curve", measure_curve)
    native, inputs = build(TEXT), _long(TEXT)
    assert sorted(plan(native, inputs, target_speedup=1.4).pruning.sites) == [1, 2, 3]
    for target in ({"target_speedup": 2.0}, {"target_latency": 3.0}):
        early = plan(native, inputs, **target)
        assert early.met and early.speedup == 2.0 and sorted(early.pruning.sites) == [0, 1, 2, 3]
    closest = plan(native, inputs, target_speedup=4.0)
    assert not closest.met and closest.speedup == 3.0 and sorted(closest.pruning.sites) == [0, 1, 2, 3]
    assert "4.00x cannot be met with sites at [1, 2, 3] or [0, 1, 2, 3]; the closest: top_k" in closest.verdict
    own = plan(native, inputs, target_speedup=2.0, layers=[1, 2])
    assert not own.met and own.speedup == 1.5 and sorted(own.pruning.sites) == [1, 2]


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_input_is_left_alone_or_gains_what_is_promised(monkeypatch, tmp_path):
    native, inputs = build(TEXT), text_inputs([4])
    for attempt in range(3):  # a busy machine may be wrong once
        monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path / str(attempt)))
        planned = plan(native, inputs, target_speedup=1.5)
        if planned.pruning is None:
            assert not planned.met and planned.speedup == 1.0 and "Leave pruning off" in planned.verdict
            return
        models = {name: prune(native, pruning) for name, pruning in (("slow", None), ("fast", planned.pruning))}
        calls = {name: lambda model=model: model(**inputs) for name, model in models.items()}
        with torch.inference_mode():
            timings = time_interleaved(calls, rounds=41, warmup=3)
        if speedup(timings["slow"], timings["fast"]) >= 0.9 * planned.speedup:
            return
    pytest.fail(planned.verdict)


def test_pruning_that_would_lose_is_left_off(clock):
    clock(lambda rate: 2.0 if rate == 1.0 else 2.2)
    planned = plan(build(TEXT), text_inputs([5]), target_speedup=1.5)
    assert planned.pruning is None and not planned.met
    assert "Leave pruning off" in planned.verdict


def test_one_of_ours_is_timed_without_the_stock_model(clock):
    measured = clock(lambda rate: 1.0 + rate)
    curve = measure_curve(prune(build(TEXT), "top_k"), _long(TEXT), [1, 2])
    assert curve.unpadded_over_padded is None and "stock" not in measured[0]
    assert measure_curve(build(TEXT), _long(TEXT), [1, 2]).unpadded_over_padded == 1.25


def test_rates_are_interpolated():
    curve = LatencyCurve((1.0, 0.9, 0.5), (1.0, 1.0, 2.0), (1.0, 1.0, 0.5), None)
    assert curve.rate_for(1.5) == pytest.approx(0.7) and curve.rate_for(2.0) == 0.5
    assert curve.rate_for(2.1) is None


def test_what_sites_cost_is_not_interpolated(clock):
    rates = (1.0, 0.9, 0.5)
    assert LatencyCurve(rates, (1.0, 1.1, 2.0), (1.0, 0.9, 0.5), None).rate_for(1.02) == 0.9
    assert LatencyCurve(rates, (1.0, 0.95, 2.0), (1.0, 1.05, 0.5), None).rate_for(1.02) == pytest.approx(
        0.9 - 0.4 * 0.07 / 1.05
    )
    clock(lambda rate: 1.0 if rate == 1.0 else 0.3 + 0.6 * rate)
    planned = plan(build(TEXT), _long(TEXT), target_speedup=1.1)
    assert planned.speedup == pytest.approx(1 / 0.84) and planned.met
    assert planned.pruning.values[0] == 0.9


@pytest.mark.filterwarnings("ignore")
def test_a_real_curve_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(latency_curve, "STEADY", 0.0)  # of two rounds, on whatever else the machine does
    curve = measure_curve(build(TEXT), inputs_for(TEXT), [1, 2], rounds=2)
    assert all(value > 0 for value in (*curve.speedups, *curve.seconds, curve.unpadded_over_padded))
    assert measure_curve(build(TEXT), inputs_for(TEXT), [1, 2]) == curve


@pytest.mark.parametrize("saliency", ["cls_attention", "received_attention"])
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_a_threshold_that_costs_so_much_on_average(target, saliency):
    native = build(TEXT)
    batches = [text_inputs([60, 41, 55, 20], seed=seed) | {"labels": torch.zeros(4).long()} for seed in range(5)]
    found = calibrate(native, batches, target_macs=target, saliency=saliency, protected_token_ids=[3])
    model = prune(native, found.pruning)
    for batch in batches:
        batch.pop("labels")
    counts = [count_macs(model, batch) for batch in batches]
    measured = sum(count.total for count in counts) / sum(count.unpruned for count in counts)
    assert found.met and found.inputs == 20
    assert measured == pytest.approx(found.macs, rel=1e-9) and found.macs == pytest.approx(target, abs=0.02)
    assert found.least < found.macs < found.most, "each input has its own"
    assert found == calibrate(native, batches, target_macs=target, saliency=saliency, protected_token_ids=[3])


def test_a_share_goes_by_the_prior_alone():
    native, inputs = build(TEXT), text_inputs([30, 25, 19, 12], seed=5)
    found = calibrate(native, [inputs], target_macs=0.5, prior_share=0.25, layers=[1, 2], protected_token_ids=[3])
    prior, rest = found.pruning.stages
    assert (prior.layers, prior.saliency, prior.place) == ((0,), "token_prior", "before") and rest.layers == (1, 2)
    assert found.macs == pytest.approx(0.5, abs=0.03)
    model = prune(native, found.pruning)
    model.base_model.set_token_prior(found.prior)
    assert count_macs(model, inputs).ratio == pytest.approx(found.macs)
    with torch.no_grad():
        trace = model(**inputs, output_token_trace=True).token_trace
    free = (inputs["attention_mask"].bool() & (inputs["input_ids"] != 3))[:, 1:].sum().item()
    gone = ((trace.source[0] < 0) & inputs["attention_mask"].bool()).sum().item()
    assert gone / free == pytest.approx(0.25, abs=0.05)
    with pytest.raises(ValueError, match=r"prior_share \(1\) must be in \[0, 1\)"):
        calibrate(native, [inputs], target_macs=0.5, prior_share=1)


def test_a_quantile_of_more_scores_than_torch_takes():
    quantile = importlib.import_module("hf_tokenprune.planning.calibrate")._quantile
    assert quantile(torch.arange(2**24 + 3).remainder(5).float(), 0.5) == 2.0
    assert quantile(torch.tensor([0.0, 1.0]), 0.25) == 0.25


def test_a_prior_needs_a_layer_beside_its_own():
    config = copy.deepcopy(BERT)
    config.num_hidden_layers = 1
    native = build(Case(BertForSequenceClassification, config))
    with pytest.raises(ValueError, match=r"prior_share \(0.2\) must be 0 with a model of one layer"):
        calibrate(native, [_long(TEXT)], target_macs=0.5, prior_share=0.2)


def test_a_calibration_out_of_reach():
    found = calibrate(build(TEXT), [_long(TEXT)], target_macs=0.05)
    assert not found.met and found.macs > 0.05
    sharp = build(TEXT)
    for layer in sharp.bert.encoder.layer:  # most scores are zero, and go together
        for part in (layer.attention.self.query, layer.attention.self.key):
            part.weight.data *= 20
    found = calibrate(sharp, [_long(TEXT)], target_macs=0.5, relative_to="mean")
    assert not found.met and abs(found.macs - 0.5) > 0.02
    nothing = calibrate(build(TEXT), [_long(TEXT)], target_macs=1.0)
    assert nothing.met and nothing.pruning.stages[0].values == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("target, batches, words", [(0.0, 1, "(0.0)"), (1.2, 1, "(1.2)"), (0.5, 0, "batches (0)")])
def test_calibrations_that_make_no_sense(target, batches, words):
    with pytest.raises(ValueError) as error:
        calibrate(build(TEXT), [_long(TEXT)] * batches, target_macs=target)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "targets, words",
    [
        ({}, ["exactly one", "target_macs"]),
        ({"target_macs": 0.5, "target_speedup": 2.0}, ["exactly one", "0.5", "2.0"]),
        ({"target_macs": 1.5}, ["1.5", "(0, 1]"]),
        ({"target_speedup": -1}, ["-1", "above 0"]),
        ({"target_latency": "fast"}, ["'fast'", "above 0"]),
        ({"target_macs": 0.5, "layers": [9]}, ["layer (9)", "[0, 3]"]),
    ],
)
def test_targets_that_make_no_sense(targets, words):
    with pytest.raises(ValueError) as error:
        plan(build(TEXT), _long(TEXT), **targets)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_in_training_is_measured_as_it_will_serve(clock):
    clock(lambda rate: 0.4 + 1.6 * rate)
    config = copy.deepcopy(BERT)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.5
    native, inputs = build(Case(BertForSequenceClassification, config)), _long(TEXT)
    common = {"protected_token_ids": [3], "min_tokens": 4}
    wishes = [{"target_macs": 0.5}, {"target_speedup": 1.3}]
    quiet = [plan(native, inputs, **wish, **common) for wish in wishes]
    found = calibrate(native, [inputs], target_macs=0.5)
    native.train()
    native.bert.pooler.eval()  # frozen by its user
    assert [plan(native, inputs, **wish, **common) for wish in wishes] == quiet
    assert calibrate(native, [inputs], target_macs=0.5) == found
    assert native.training and native.bert.encoder.layer[0].training and not native.bert.pooler.training


def test_a_curve_is_of_the_pruning_that_is_planned(clock):
    measured = clock(lambda rate: 0.4 + 1.6 * rate)
    for common in ({}, {"min_tokens": 9}):
        plan(build(TEXT), _long(TEXT), target_speedup=1.3, **common)
    assert len(measured) == 2  # another pruning is another curve


def test_a_clock_that_cannot_be_believed(monkeypatch, clock):
    speeds = dict(zip((1.0, *latency_curve.RATES), (1.0, 2.5, 1.27, 2.78, 2.8, 3.0, 3.2)))
    measured = clock(lambda rate: 1 / speeds[rate])
    for times in (2, 4):
        planned = plan(build(TEXT), _long(TEXT), target_speedup=2.6)
        assert not planned.met and "The clock was too unsteady" in planned.verdict
        assert len(measured) == times, "once more, and nothing is kept"
    honest = latency_curve.time_interleaved

    def second_time(calls: dict, **given: object) -> dict[object, Timing]:
        timings = honest(calls, **given)
        return timings if len(measured) == 5 else {name: Timing((name if name != "stock" else 2.0,)) for name in calls}

    monkeypatch.setattr(latency_curve, "time_interleaved", second_time)
    for _ in range(2):
        planned = plan(build(TEXT), _long(TEXT), target_speedup=2.0)
        assert planned.met and "unsteady" not in planned.verdict and len(measured) == 6


def test_a_curve_is_of_the_modules_that_run(clock):
    measured = clock(lambda rate: 0.4 + 1.6 * rate)
    native, wide = build(TEXT), build(TEXT)
    for layer in wide.bert.encoder.layer:  # as adapters do
        layer.output.dense = torch.nn.Sequential(layer.output.dense, torch.nn.Linear(32, 32))
    for model in (native, wide, native):
        plan(model, _long(TEXT), target_speedup=1.3)
    assert len(measured) == 2


def test_a_curve_is_of_one_way_to_attend(clock):
    measured = clock(lambda rate: 0.4 + 1.6 * rate)
    for attention in ("sdpa", "eager", "sdpa"):
        plan(build(TEXT, attention=attention), _long(TEXT), target_speedup=1.3)
    assert len(measured) == 2


def test_a_curve_is_of_one_version_of_the_engine(monkeypatch, clock, tmp_path):
    measured = clock(lambda rate: 0.4 + 1.6 * rate)
    other = shutil.copytree(latency_curve.ENGINE, tmp_path / "modeling")
    with (other / "saliency.py").open("a") as file:
        file.write("# another\n")
    for engine in (latency_curve.ENGINE, other, latency_curve.ENGINE):
        monkeypatch.setattr(latency_curve, "ENGINE", engine)
        plan(build(TEXT), _long(TEXT), target_speedup=1.3)
    assert len(measured) == 2


def test_a_curve_that_cannot_be_kept_is_used(monkeypatch, clock, tmp_path, caplog):
    measured = clock(lambda rate: 0.4 + 1.6 * rate)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    for times in (1, 2):
        assert plan(build(TEXT), _long(TEXT), target_speedup=1.5).speedup == 1.5 and len(measured) == times
    (said,) = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert str(tmp_path / "file" / "cache" / "latency") in said


UNSUPPORTED = {
    "linear": lambda: torch.nn.Linear(2, 2),
    "no layers": lambda: ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_families_that_are_not_supported(name):
    model, inputs = UNSUPPORTED[name](), _long(TEXT)
    labelled = [inputs | {"labels": torch.zeros(3).long()}]
    calls = [
        lambda: plan(model, inputs, target_macs=0.5),
        lambda: calibrate(model, [inputs], target_macs=0.5),
        lambda: search_schedule(model, labelled, target_macs=0.5, metric=lambda *_: 0.0),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"cannot be pruned; supported: BertModel, "):
            call()


def test_one_batch_in_place_of_several():
    inputs, words = _long(TEXT), r"batches \(dict of input_ids, attention_mask.*\) must be several batches: \[batch\]"
    with pytest.raises(TypeError, match=words):
        calibrate(build(TEXT), inputs, target_macs=0.5)
    with pytest.raises(TypeError, match=words):
        search_schedule(build(TEXT), inputs | {"labels": torch.zeros(3).long()}, target_macs=0.5)
