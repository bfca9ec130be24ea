"""`search_schedule`: the best of what was measured is chosen, and a search that was interrupted goes on."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import BERT, Case, build, text_inputs
from transformers import BertForSequenceClassification

from hf_tokenprune import count_macs, prune, search_schedule
from hf_tokenprune.planning.search import Point, Search
from hf_tokenprune.viz.search_plots import pareto_front


MODEL = build(Case(BertForSequenceClassification, BERT))


def labelled_batches() -> list[dict[str, torch.Tensor]]:
    """What the model itself says, so that less pruning is better."""
    batches = [text_inputs([50, 31, 44, 20], seed=seed) for seed in range(3)]
    with torch.no_grad():
        return [batch | {"labels": MODEL(**batch).logits.argmax(dim=-1)} for batch in batches]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Path]:
    path = tmp_path_factory.mktemp("search") / "points.json"
    return search_schedule(MODEL, labelled_batches(), target_macs=0.5, resume_from=path, protected_token_ids=[3]), path


def test_the_best_at_the_target_is_chosen(found):
    search, _ = found
    assert search.points[0].pruning is None and search.points[0].score == 1.0 and search.points[0].divergence == 0.0
    at_target = [point for point in search.points[1:] if abs(point.macs - 0.5) < 0.03]
    assert search.chosen in at_target and len(at_target) > 8
    assert search.chosen.score == max(point.score for point in at_target)
    model = prune(MODEL, search.pruning)
    counts = [count_macs(model, {k: v for k, v in batch.items() if k != "labels"}) for batch in labelled_batches()]
    measured = sum(count.total for count in counts) / sum(count.unpruned for count in counts)
    assert measured == pytest.approx(search.chosen.macs) and search.pruning.protected_token_ids == (3,)
    front = search.front
    assert all(a.macs < b.macs and a.score < b.score for a, b in pairwise(front))
    assert not any(p.macs <= f.macs and p.score > f.score for f in front for p in search.points)


def test_a_search_goes_on_where_it_was(found, tmp_path):
    search, path = found
    stored = json.loads(path.read_text())
    half = tmp_path / "half.json"
    half.write_text(json.dumps(stored | {"points": stored["points"][: len(stored["points"]) // 2]}))
    given = {"target_macs": 0.5, "protected_token_ids": [3]}
    again = search_schedule(MODEL, labelled_batches(), resume_from=half, **given)
    assert again == search and json.loads(half.read_text()) == stored
    with pytest.raises(ValueError, match="of the same model and inputs"):
        search_schedule(MODEL, labelled_batches()[:1], resume_from=half, **given)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"target_macs \(0.001\) must be in reach"):
        search_schedule(MODEL, labelled_batches()[:1], target_macs=0.001)
    with pytest.raises(ValueError, match=r"target_macs \(2\)"):
        search_schedule(MODEL, labelled_batches(), target_macs=2)
    with pytest.raises(ValueError, match=r"batches \(1\) must be at least one, each with labels"):
        search_schedule(MODEL, [text_inputs([9])], target_macs=0.5)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    prunings = [prune(MODEL, {"preset": "top_k", "keep_rate": rate}).config.pruning.to_dict() for rate in (0.3, 0.6)]
    points = [Point(None, 1.0, 0.9, 0.0), Point(prunings[0], 0.4, 0.7, 0.1), Point(prunings[1], 0.5, 0.85, 0.05)]
    path = pareto_front(Search(points[2], points), tmp_path / "front.png", title="A $ sign")
    assert path.read_bytes()[:4] == b"\x89PNG"
