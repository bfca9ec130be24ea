"""`search_schedule`: the best of what was measured is chosen, and a search that was interrupted goes on."""

import copy
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import BERT, Case, build, text_inputs
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel, PreTrainedModel

from hf_tokenprune import count_macs, prune, search_schedule
from hf_tokenprune.planning import held_back
from hf_tokenprune.planning import search as searching
from hf_tokenprune.planning.search import Point, Search, accuracy
from hf_tokenprune.viz.search_plots import pareto_front


MODEL = build(Case(BertForSequenceClassification, BERT))


def labelled_batches() -> list[dict[str, torch.Tensor]]:
    """What the model itself says, so that less pruning is better."""
    batches = [text_inputs([50, 31, 44, 20], seed=seed) for seed in range(3)]
    with torch.no_grad():
        return [batch | {"labels": MODEL(**batch).logits.argmax(dim=-1)} for batch in batches]


@pytest.fixture(scope="module", autouse=True)
def small_samples():
    """Keep rates are found on two batches of the three, so that it shows where all are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "sample", lambda batches: held_back.sample(batches, 8))
        yield


GIVEN = {"target_macs": 0.5, "protected_token_ids": [3]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Path]:
    path = tmp_path_factory.mktemp("search") / "points.json"
    return search_schedule(MODEL, labelled_batches(), resume_from=path, **GIVEN), path


def test_the_best_at_the_target_is_chosen(found):
    search, _ = found
    assert search.points[0].pruning is None and search.points[0].score == 1.0 and search.points[0].divergence == 0.0
    assert search.met and abs(search.chosen.macs - 0.5) <= 0.01
    at_target = [point for point in search.points[1:] if abs(point.macs - 0.5) <= 0.01]
    assert search.chosen in at_target and len(at_target) > 8
    assert search.chosen.score == max(point.score for point in at_target)
    model = prune(MODEL, search.pruning)
    counts = [count_macs(model, {k: v for k, v in batch.items() if k != "labels"}) for batch in labelled_batches()]
    measured = sum(count.total for count in counts) / sum(count.unpruned for count in counts)
    assert measured == pytest.approx(search.chosen.macs) and search.pruning.protected_token_ids == (3,)
    front = search.front
    assert all(a.macs < b.macs and a.score < b.score for a, b in pairwise(front))
    prunings = [json.dumps(point.pruning) for point in search.points]
    assert len(set(prunings)) == len(prunings), "each once"
    assert not any(p.macs <= f.macs and p.score > f.score for f in front for p in search.points)


def test_the_closest_is_chosen_where_counts_are_coarse():
    batches = [text_inputs([6] * 4, seed=seed) | {"labels": torch.tensor([0, 1, 2, 0])} for seed in range(2)]
    search = search_schedule(MODEL, batches, target_macs=0.55, saliencies=("cls_attention",))
    at_all = [abs(point.macs - 0.55) for point in search.points[1:]]
    assert abs(search.chosen.macs - 0.55) <= max(0.01, min(at_all))
    assert search.met == (min(at_all) <= 0.01)


@pytest.mark.parametrize("size, inputs, batches", [(1, 8, 8), (4, 8, 2), (4, 64, 5), (3, 8, 3)])
def test_a_sample_is_of_so_many_inputs_whatever_a_batch_holds(size, inputs, batches):
    ids = torch.arange(20)
    taken = held_back.sample([{"ids": part} for part in ids.split(size)], inputs)
    assert len(taken) == batches and taken[-1]["ids"][0] >= 8, "from all over"
    assert sum(len(batch["ids"]) for batch in taken) >= min(inputs, 20)


def test_schedules_are_compared_at_the_target_though_batches_are_small(monkeypatch):
    monkeypatch.setattr(searching, "sample", held_back.sample)
    monkeypatch.setattr(searching, "_schedules", lambda *_: [([1, 2], "cls_attention")])
    monkeypatch.setattr(searching, "FRONT", ())
    lengths = [6, 60, 50, 55, 5, 41, 55, 30]
    single = [text_inputs([length], seed=seed) | {"labels": torch.tensor([0])} for seed, length in enumerate(lengths)]
    search = search_schedule(MODEL, single, target_macs=0.5)
    assert search.chosen.macs == pytest.approx(0.5, abs=0.02)


class Evaluations(list):
    """The prunings that were run, each with its number of batches; an interrupt comes after so many."""

    limit = float("inf")


@pytest.fixture
def evaluations(monkeypatch) -> Evaluations:
    ran, run = Evaluations(), searching.run_pruned

    def run_pruned(model, pruning, batches):
        if len(ran) >= ran.limit:
            raise KeyboardInterrupt
        ran.append((json.dumps(pruning and pruning.to_dict()), len(batches)))
        return run(model, pruning, batches)

    monkeypatch.setattr(searching, "run_pruned", run_pruned)
    return ran


def points(path: Path) -> list[dict]:
    return json.loads(path.read_text())["points"] if path.exists() else []


def test_an_interrupted_search_goes_on_where_it_was(found, evaluations, tmp_path):
    whole, path = found
    mine, starts, again = tmp_path / "points.json", 0, None
    evaluations.limit = 50
    while again is None:
        known, starts = {json.dumps(point["pruning"]) for point in points(mine)}, starts + 1
        evaluations.clear()
        try:
            again = search_schedule(MODEL, labelled_batches(), resume_from=mine, **GIVEN)
        except KeyboardInterrupt:
            assert len(points(mine)) > len(known)
        measured = [pruning for pruning, batches in evaluations if batches == 3]
        assert measured.count("null") == (2 if starts == 1 else 1)  # again for its logits, which all are compared with
        assert not known & (set(measured) - {"null"})
    assert starts > 2 and again == whole and json.loads(mine.read_text()) == json.loads(path.read_text())
    evaluations.clear()
    assert search_schedule(MODEL, labelled_batches(), resume_from=mine, **GIVEN) == whole and not evaluations


def test_batches_may_come_one_by_one(found, evaluations):
    whole, path = found
    again = search_schedule(MODEL, (batch for batch in labelled_batches()), resume_from=path, **GIVEN)
    assert again == whole and not evaluations


def other(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 1.0 - accuracy(logits, labels)


def test_only_the_same_search_goes_on(found):
    _, path = found
    batches = labelled_batches()
    turned = [batch | {"labels": (batch["labels"] + 1) % 3} for batch in batches]
    others = [
        (batches[:1], GIVEN),
        (turned, GIVEN),
        (batches, GIVEN | {"metric": other}),
        (batches, GIVEN | {"min_tokens": 9}),
    ]
    for inputs, given in others:
        with pytest.raises(ValueError, match="the same model, inputs, metric and options, and is of another"):
            search_schedule(MODEL, inputs, resume_from=path, **given)


class Metric:
    def __call__(self, *given: torch.Tensor) -> float:
        return accuracy(*given)


@pytest.mark.parametrize("metric", [lambda *_: 0.0, partial(accuracy), Metric(), Metric().__call__])
def test_a_metric_without_a_name_of_its_own_is_not_resumed(metric, tmp_path):
    with pytest.raises(ValueError, match=r"metric \(.*\) must be a function of a module"):
        search_schedule(MODEL, labelled_batches(), resume_from=tmp_path / "points.json", metric=metric, **GIVEN)
    assert not list(tmp_path.iterdir())


def test_all_that_is_measured_shows_as_progress(found):
    whole, path = found
    shown = []

    def progress(wishes):
        shown.append(len(wishes))
        return wishes

    search_schedule(MODEL, labelled_batches(), resume_from=path, progress=progress, **GIVEN)
    schedules, front = shown
    assert front == searching.BEST * len(searching.FRONT) and schedules + front + 1 >= len(whole.points) > schedules


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"target_macs \(0.001\) must be in reach"):
        search_schedule(MODEL, labelled_batches()[:1], target_macs=0.001)
    with pytest.raises(ValueError, match=r"target_macs \(2\)"):
        search_schedule(MODEL, labelled_batches(), target_macs=2)
    with pytest.raises(ValueError, match=r"batches \(1\) must be at least one, each with labels"):
        search_schedule(MODEL, [text_inputs([9])], target_macs=0.5)


def test_nothing_is_searched_for_where_nothing_pruned_meets_the_target(evaluations, tmp_path):
    search = search_schedule(MODEL, labelled_batches(), target_macs=0.9)
    assert search.pruning is None and search.chosen.macs <= 0.9 and search.points == [search.chosen]
    assert len(evaluations) == 2, "once for its logits, once as a point"
    pytest.importorskip("matplotlib")
    assert pareto_front(search, tmp_path / "front.png", title="A").exists()


def _with_head(head: type, **fields: object) -> PreTrainedModel:
    config = copy.deepcopy(BERT)
    for name, value in fields.items():
        setattr(config, name, value)
    return build(Case(head, config))


NO_CLASSES = {
    "regression": (BertForSequenceClassification, {"num_labels": 1}, torch.zeros(2), "logits ([2, 1])"),
    "multi-label": (BertForSequenceClassification, {}, torch.zeros(2, 3), "labels ([2, 3], torch.float32)"),
    "tokens": (BertForTokenClassification, {}, torch.zeros(2, 30).long(), "logits ([2, 30, 3])"),
    "no logits": (BertModel, {}, torch.zeros(2).long(), "it has no logits"),
}


@pytest.mark.parametrize("name", NO_CLASSES)
def test_heads_that_accuracy_is_not_defined_on(name, evaluations):
    head, fields, labels, words = NO_CLASSES[name]
    batches = [text_inputs([30, 21]) | {"labels": labels}, text_inputs([9, 12]) | {"labels": labels}]
    with pytest.raises((TypeError, ValueError)) as error:
        search_schedule(_with_head(head, **fields), batches, target_macs=0.5)
    assert words in str(error.value) and not evaluations


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    prunings = [prune(MODEL, {"preset": "top_k", "keep_rate": rate}).config.pruning.to_dict() for rate in (0.3, 0.6)]
    points = [Point(None, 1.0, 0.9, 0.0), Point(prunings[0], 0.4, 0.7, 0.1), Point(prunings[1], 0.5, 0.85, 0.05)]
    path = pareto_front(Search(points[2], points, met=True), tmp_path / "front.png", title="A $ sign")
    assert path.read_bytes()[:4] == b"\x89PNG"
