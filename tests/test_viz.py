"""The page of kept words, and the picture of patches."""

import colorsys
import io
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_tokenprune import prune
from hf_tokenprune.viz import (
    DocumentView,
    Picture,
    document_views,
    draw_patches,
    explain,
    kept_words,
    patches,
    render_page,
    write_page,
)


HOSTILE = ["<script>alert(1)</script>", '"quoted"', "it's", "😀", "</span>", "{{ 7 * 7 }}", "&lt;", "x\" onload='y'"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Trace:
    layers: list[int]
    counts: torch.Tensor  # [S, B]
    source: torch.Tensor  # [S, B, N]


def random_trace(lengths: list[int], sites: int, *, merge: bool = False, seed: int = 0) -> Trace:
    """Drop about a third of the alive tokens at each site, or merge them into the first token."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((sites, len(lengths), max(lengths) + 2), -1)  # two columns of padding
    counts = torch.zeros(sites, len(lengths), dtype=torch.long)
    for sample, length in enumerate(lengths):
        rows = list(range(length))  # row that carries each position
        for site in range(sites):
            alive = sorted(set(rows) - {-1})
            stays = [row for row in alive if row == 0 or torch.rand(1, generator=generator) < 0.65]
            new_row = {row: stays.index(row) if row in stays else (0 if merge else -1) for row in alive}
            rows = [new_row.get(row, -1) for row in rows]
            source[site, sample, :length] = torch.tensor(rows)
            counts[site, sample] = len(stays)
    return Trace([2 * site + 1 for site in range(sites)], counts, source)


def words_of(length: int) -> list[str]:
    return ["[CLS]", *(f"word{i}" if i % 3 else f"##piece{i}" for i in range(1, length - 1)), "[SEP]"][:length]


def view(words: list[str], last_site: list[int], sites: int = 2, **changes) -> DocumentView:
    plain = DocumentView(words, last_site, list(range(sites)), "label", "pruned", "unpruned", 0.5)
    return replace(plain, **changes)


class Page(HTMLParser):
    """What a reader of the page sees: the words with their state, the steps, the sentences; and what could run."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.words: list[list[str]] = []
        self.gone: list[list[bool]] = []
        self.glued: list[list[bool]] = []
        self.hues: list[list[str | None]] = []
        """Of words that are one token with others."""
        self.shades: list[list[str | None]] = []
        """Likewise."""
        self.edges: list[list[int]] = []
        """How many sides of a patch that is one token with others are drawn."""
        self.current: list[int] = []
        self.sentences: list[list[str]] = []
        self.alive: list[str] = []
        self.told: list[str] = []
        self.title = ""
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._into: list[str] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = (attrs.get("class") or "").split()
        self.tags.append(tag)
        self.attributes |= set(attrs)
        self._into = None
        if tag == "article":
            for column in (self.words, self.gone, self.glued, self.hues, self.shades, self.edges, self.sentences):
                column.append([])
        elif tag == "li":
            if "aria-current" in attrs:
                self.current.append(len(self.sentences[-1]))
            self.sentences[-1].append(attrs["data-alive"])
        elif "w" in classes and self.words:
            self.gone[-1].append("gone" in classes)
            self.glued[-1].append("on" in classes)
            style = attrs.get("style") or "" if "one" in classes else ""
            self.hues[-1].append(style.partition("--hue: ")[2].partition(";")[0] or None)
            self.shades[-1].append(style.partition("--shade: ")[2].partition("%;")[0] or None)
            self.edges[-1].append(style.count("inset"))
            self.words[-1].append("")
            self._into = self.words[-1]
        elif "alive" in classes:
            self.alive.append("")
            self._into = self.alive
        elif "told" in classes:
            self.told.append("")
            self._into = self.told

    def handle_endtag(self, tag):
        self._into = None

    def handle_data(self, data):
        self.text += data
        if self.tags[-1:] == ["title"]:
            self.title += data
        if self._into is not None:
            self._into[-1] += data


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("sites", [1, 3])
def test_views_match_a_naive_loop(merge, sites):
    lengths = [9, 30, 1]
    trace = random_trace(lengths, sites, merge=merge)
    tokens = [words_of(length) for length in lengths]
    for sample, document in enumerate(document_views(tokens, trace)):
        expected = []
        for position in range(lengths[sample]):
            survived = 0
            while survived < sites and trace.source[survived, sample, position] >= 0:
                survived += 1
            expected.append(survived)
        assert document.words == tokens[sample]
        assert document.last_site == expected
        assert document.layers == trace.layers
        assert document.alive() == [lengths[sample], *trace.counts[:, sample].tolist()]
        if not merge:
            assert document.surviving() == document.alive()


def test_views_carry_the_columns():
    trace = random_trace([4, 4], 1)
    documents = document_views(
        [words_of(4)] * 2,
        trace,
        labels=["a", "b"],
        predictions=["c", "d"],
        predictions_unpruned=["e", "f"],
        confidences=[0.25, None],
    )
    assert [(d.label, d.prediction, d.prediction_unpruned, d.confidence) for d in documents] == [
        ("a", "c", "e", 0.25),
        ("b", "d", "f", None),
    ]


def test_left_padding_needs_the_mask():
    trace = random_trace([5], 2)
    trace.source = trace.source.roll(2, dims=-1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    straight = random_trace([5], 2)
    assert document_views([words_of(5)], trace, attention_mask=mask) == document_views([words_of(5)], straight)
    trace.source[:, 0, -1] = 0
    with pytest.raises(ValueError, match="pass attention_mask"):
        document_views([words_of(5)], trace)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [words_of(5)]}, r"trace.counts \(\(2, 2\)\) must be"),
        ({"tokens": [words_of(5), words_of(40)]}, "document 1 has 40 tokens, but its trace covers 7"),
        ({"labels": ["one"]}, r"labels \(1 entries\) must have one per document \(2\)"),
        ({"confidences": [0.5, 1.5]}, r"confidence \(1.5\) must be in \[0, 1\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message):
    arguments = {"tokens": [words_of(5), words_of(5)], "trace": random_trace([5, 5], 2), **changes}
    with pytest.raises(ValueError, match=message):
        document_views(**arguments)


def test_a_view_checks_itself():
    with pytest.raises(ValueError, match=r"last_site \(3\) must be in \[0, 2\]"):
        view(["a"], [3])
    with pytest.raises(ValueError, match="one per word"):
        view(["a", "b"], [1])
    with pytest.raises(ValueError, match="one per site"):
        view(["a"], [1], counts=[1])


def test_pages_need_documents_of_the_same_sites():
    with pytest.raises(ValueError, match="at least one"):
        render_page([], title="t")
    with pytest.raises(ValueError, match=r"\[0\] is not \[0, 1\]"):
        render_page([view(["a"], [1]), view(["a"], [1], sites=1)], title="t")


@pytest.mark.parametrize("merge", [False, True])
def test_page_shows_the_counts_of_the_trace(merge):
    lengths = [30, 12]
    trace = random_trace(lengths, 3, merge=merge)
    documents = document_views([words_of(length) for length in lengths], trace)
    page = Page(render_page(documents, title="t"))
    for sample, length in enumerate(lengths):
        alive = [length, *trace.counts[:, sample].tolist()]
        assert [sentence.split(" tokens")[0] for sentence in page.sentences[sample]] == [
            f"{n} of {length}" for n in alive
        ]
        assert page.alive[sample] == page.sentences[sample][-1]
        carried = documents[sample].surviving()[-1]
        assert page.gone[sample].count(False) == carried
        assert (f"carrying {carried} of the original" in page.alive[sample]) == (carried != alive[-1])


def test_hostile_text_is_escaped():
    text = "".join(HOSTILE)
    document = view(HOSTILE, [2] * len(HOSTILE), label=text, prediction=text, prediction_unpruned=text + "!")
    html = render_page([document], title=text, summary=text)
    page = Page(html)
    assert page.words == [HOSTILE]
    assert page.tags.count("script") == 1
    assert page.tags.count("h1") == page.tags.count("h2") == 1
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "<script>alert" not in html
    assert page.text.count(text) >= 5  # title twice, summary, label, both predictions


def test_page_asks_nothing_of_the_network():
    html = render_page([view(["a"], [1])], title="t")
    for forbidden in ("http:", "https:", "//", "src=", "href=", "url(", "@import", "eval(", "innerHTML"):
        assert forbidden not in html


@pytest.mark.parametrize(
    ("words", "texts", "glued"),
    [
        (["[CLS]", "prun", "##ing", "!", "##"], ["[CLS]", "prun", "ing", "!", "##"], [0, 0, 1, 1, 0]),
        (["it", "'", "s", "(", "so", ")"], ["it", "'", "s", "(", "so", ")"], [0, 1, 1, 0, 1, 1]),
        (
            ["<s>", "Pr", "uning", "Ġhelps", "Ċ", "</s>"],
            ["<s>", "Pr", "uning", "helps", "↵", "</s>"],
            [0, 0, 1, 0, 0, 0],
        ),
        (["▁Pr", "uning", "▁", "."], ["Pr", "uning", "␣", "."], [0, 1, 0, 1]),
    ],
)
def test_pieces_join_to_words(words, texts, glued):
    page = Page(render_page([view(words, [2] * len(words))], title="t"))
    assert page.words == [texts]
    assert page.glued == [list(map(bool, glued))]


@pytest.mark.parametrize("sites", [0, 12])
def test_any_number_of_sites(sites):
    document = view(["a", "b"], [sites, 0], sites=sites)
    page = Page(render_page([document], title="t"))
    assert page.gone == [[False, sites > 0]]
    assert page.tags.count("option") == sites + 1


def test_a_long_document_stays_small():
    trace = random_trace([512], 12)
    html = render_page(document_views([words_of(512)], trace), title="t")
    assert len(html.encode()) < 200_000


def test_write_page_replaces_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "new" / "page.html"
    assert write_page(path, "old") == path
    write_page(str(path), "new 😀")
    assert path.read_text(encoding="utf-8") == "new 😀"
    assert os.listdir(path.parent) == ["page.html"]


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    path = write_page(tmp_path / "page.html", "old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(kept_words.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def browse(page: Path, address: str, profile: Path) -> tuple[Page, str]:
    """The page as chromium has it after its scripts ran, and chromium's log."""
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), f"--user-data-dir={profile}"]
        + ["--enable-logging=stderr", "--virtual-time-budget=1000", "--dump-dom", page.as_uri() + address],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    return Page(done.stdout), done.stderr


def test_the_legend_has_the_fates_that_there_are():
    words, layers = ["[CLS]", "a", "b", "c", "d", "e", "f"], list(range(8))
    few, many = [8, 8, 2, 8, 2, 8, 8], [8, 0, 1, 2, 3, 4, 5]
    for last_site, expected in ((few, [2, 8]), (many, [0, 3, 8])):
        html = render_page([DocumentView(words, last_site, layers, None, None, None, None)], title="t")
        legend = html[html.index('<div class="legend">') : html.index("</section>")]
        assert [int(depth) for depth in re.findall(r'data-d="(\d+)"', legend)] == expected
        assert "kept to the end" in legend


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_slider_in_a_browser(tmp_path):
    lengths = [30, 12]
    trace = random_trace(lengths, 3)
    documents = document_views([words_of(length) for length in lengths], trace)
    html = render_page(documents, title="".join(HOSTILE))
    move = "slider => { slider.value = 2; slider.dispatchEvent(new Event('input')); }"
    moved = html.replace("</body>", f"<script>({move})(document.getElementById('site'))</script></body>")
    visits = [(html, "", 3), (html, "#site=0", 0), (html, "#site=1", 1), (html, "#site=99", 3), (moved, "#site=1", 2)]
    for number, (content, address, site) in enumerate(visits):
        path = write_page(tmp_path / f"{number}.html", content)
        page, log = browse(path, address, tmp_path / "profile")
        assert "CONSOLE" not in log
        assert page.current == [site, site]
        for sample, document in enumerate(documents):
            alive = document.alive()[site]
            assert page.alive[sample] == f"{alive} of {lengths[sample]} tokens alive"
            assert page.gone[sample] == [depth < site for depth in document.last_site]
            assert page.gone[sample].count(False) == alive


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_browser_log_shows_script_errors(tmp_path):
    path = write_page(tmp_path / "page.html", "<!doctype html><script>missing()</script>")
    assert "CONSOLE" in browse(path, "", tmp_path / "profile")[1]


def tiny_classifiers() -> dict[str, tuple]:
    """A text and an image model with made-up inputs: model, batch, what makes inputs, labels."""
    text = tiny.cases(tiny.HEADS)[0]
    image = next(case for case in tiny.cases(tiny.HEADS) if not case.text)
    merging = {"preset": "value_merge", "layers": [0, 2], "keep_rate": 0.6}
    return {
        "text": (prune(tiny.build(text), merging), tiny.inputs_for(text), tiny.tokenizer()),
        "image": (prune(tiny.build(image), merging), tiny.inputs_for(image), ViTImageProcessorPil()),
    }


@pytest.mark.parametrize("kind", ["text", "image"])
def test_what_a_model_did_is_what_its_trace_says(kind):
    model, batch, processing = tiny_classifiers()[kind]
    views = explain(model, batch, processing)
    with torch.no_grad():
        output, whole = model(**batch, output_token_trace=True), prune(model, None)(**batch)
    trace = output.token_trace
    mask = batch.get("attention_mask", torch.ones(trace.source.shape[1:])).bool()
    for sample, document in enumerate(views):
        own = mask[sample]
        assert len(document.words) == own.sum()
        assert document.carriers == trace.source[:, sample, own].tolist()
        assert document.counts == trace.counts[:, sample].tolist()
        assert document.prediction == model.config.id2label[output.logits[sample].argmax().item()]
        assert document.prediction_unpruned == model.config.id2label[whole.logits[sample].argmax().item()]
        first, second = document.scores
        assert None not in first  # everybody was there
        # A merged token is judged once for all that it carries.
        for row in set(document.carriers[0]):
            assert len({second[place] for place, each in enumerate(document.carriers[0]) if each == row}) == 1
        assert (document.picture is None) == (kind == "text")
    if kind == "image":
        assert (views[0].picture.columns, views[0].picture.first, len(views[0].words)) == (6, 1, 37)


def test_the_scores_are_those_that_decided():
    """Threshold rules keep exactly what reaches the threshold, protected tokens aside."""
    text = tiny.cases(tiny.HEADS)[0]
    threshold = 0.9
    model = prune(tiny.build(text), {"preset": "adaptive", "layers": [1], "threshold": threshold})
    for document in explain(model, tiny.inputs_for(text), tiny.tokenizer()):
        (scores,), (carriers,) = document.scores, document.carriers
        for score, carrier in list(zip(scores, carriers))[1:]:
            assert (score >= threshold) == (carrier >= 0)


def test_a_model_without_sites_has_nothing_to_explain():
    text = tiny.cases(tiny.HEADS)[0]
    with pytest.raises(ValueError, match=r"pruning \(None\) must have sites"):
        explain(prune(tiny.build(text), None), tiny.inputs_for(text), tiny.tokenizer())


@pytest.mark.parametrize("kind", ["text", "image"])
def test_patches_as_a_picture(kind, tmp_path):
    model, batch, processing = tiny_classifiers()[kind]
    document = explain(model, batch, processing)[0]
    if kind == "text":
        with pytest.raises(ValueError, match="must be of an image"):
            draw_patches(document, tmp_path / "patches.png", title="t")
        return
    image_module = pytest.importorskip("PIL.Image")
    with image_module.open(draw_patches(document, tmp_path / "patches.png", title="a $title")) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10


def test_outlines_go_around_all_of_a_group():
    own = {(0, 0), (0, 1), (1, 1)}
    lines = [tuple(map(tuple, line)) for line in patches._outline(own, inset=0.0)]
    borders = {line for line in lines if lines.count(line) == 1}
    assert len(borders) == len(lines) == 8  # the sides of three squares, but for the two shared ones


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("kind", ["text", "image"])
def test_groups_in_a_browser(kind, tmp_path):
    """Words of one token have one colour of their own, and the sides of patches go around a group, as in the PNG."""
    model, batch, processing = tiny_classifiers()[kind]
    model.set_pruning({"preset": "tome", "r": 3})
    documents = explain(model, batch, processing)
    path = write_page(tmp_path / "page.html", render_page(documents, title="t"))
    for site in (1, 3):
        page, log = browse(path, f"#site={site}", tmp_path / "profile")
        assert "CONSOLE" not in log and page.text.count("outlined alike: one token") == 1
        for sample, document in enumerate(documents):
            carriers = document.carriers[site - 1]
            assert len(set(carriers)) == document.counts[site - 1]
            assert page.alive[sample].startswith(f"{document.counts[site - 1]} of {len(carriers)} tokens alive")
            shared = [carriers.count(carrier) > 1 for carrier in carriers]
            assert any(shared) or len(carriers) < 4
            assert [hue is not None for hue in page.hues[sample]] == shared
            groups = {carrier for carrier, merged in zip(carriers, shared) if merged}
            assert len(set(page.hues[sample]) - {None}) == len(groups)
            colours = [document.colours()[site - 1].get(carrier) for carrier in carriers]
            seen = zip(page.hues[sample], page.shades[sample])
            assert [None if hue is None else (float(hue), int(shade)) for hue, shade in seen] == colours
            if kind == "image":
                places = [divmod(place, 6) for place in range(36)]
                own = [{at for at, each in zip(places, carriers[1:]) if each == carrier} for carrier in groups]
                assert sum(page.edges[sample]) == sum(len(list(patches._outline(each))) for each in own)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 20, 31, 40])
def test_groups_of_a_panel_differ_in_colour(count):
    """Hues of those alike in lightness are 30 degrees apart, or three of the even steps where there are many."""
    carriers = [21 * place for place in range(count)] * 2
    (colours,) = view(["a"] * 2 * count, [1] * 2 * count, sites=1, carriers=[carriers]).colours()
    assert list(colours) == carriers[:count] and len({hue for hue, _ in colours.values()}) == count
    assert (len({shade for _, shade in colours.values()}) > 1) == (count > 12)
    least = 30 if count <= 12 else 3 * 360 / (count + 2)
    for number, (hue, shade) in enumerate(colours.values()):
        for other, alike in list(colours.values())[:number]:
            assert alike != shade or min((hue - other) % 360, (other - hue) % 360) > least - 0.2


def twenty_one_apart() -> DocumentView:
    """Two groups of three patches each, of 6 x 6, whose tokens are 21 apart."""
    image_module = pytest.importorskip("PIL.Image")
    content = io.BytesIO()
    image_module.new("RGB", (24, 24), "white").save(content, format="PNG")
    carriers = list(range(37))
    carriers[2] = carriers[3] = 1
    carriers[23] = carriers[24] = 22
    words = ["[CLS]", *[""] * 36]
    return view(words, [1] * 37, sites=1, carriers=[carriers], picture=Picture(content.getvalue(), columns=6))


def far_apart(hues: list[float]) -> bool:
    return any(min((hue - hues[0]) % 360, (hues[0] - hue) % 360) > 60 for hue in hues)


def test_a_picture_tells_tokens_that_are_21_apart_from_each_other(tmp_path):
    pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    with image_module.open(draw_patches(twenty_one_apart(), tmp_path / "patches.png", title="t")) as image:
        found = [colorsys.rgb_to_hsv(*(each / 255 for each in pixel)) for pixel in set(image.convert("RGB").getdata())]
    assert far_apart([360 * hue for hue, saturation, _ in found if saturation > 0.7])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_page_tells_tokens_that_are_21_apart_from_each_other(tmp_path):
    path = write_page(tmp_path / "page.html", render_page([twenty_one_apart()], title="t"))
    page, log = browse(path, "", tmp_path / "profile")
    assert "CONSOLE" not in log
    hues = [float(hue) for hue in page.hues[0] if hue is not None]
    assert len(hues) == 6 and far_apart(hues)


def test_the_legend_tells_of_groups_only_where_there_are_some():
    plain = view(["a", "b"], [2, 2], carriers=[[0, 1], [0, -1]])
    merging = view(["a", "b"], [2, 2], carriers=[[0, 1], [0, 0]])
    assert [each.merges() for each in (plain, merging, view(["a"], [2]))] == [False, True, False]
    assert "outlined alike" not in render_page([plain], title="t")
    assert "outlined alike" in render_page([plain, merging], title="t")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("kind", ["text", "image"])
def test_pointing_in_a_browser(kind, tmp_path):
    model, batch, processing = tiny_classifiers()[kind]
    documents = explain(model, batch, processing)
    place = next(i for i, each in enumerate(documents[0].carriers[0]) if documents[0].carriers[0].count(each) > 1)
    members = documents[0].carriers[0].count(documents[0].carriers[0][place])
    event = "new MouseEvent('mouseover', {bubbles: true})"
    point = f"document.querySelectorAll('article .w')[{place}].dispatchEvent({event})"
    html = render_page(documents, title="t").replace("</body>", f"<script>{point}</script></body>")
    page, log = browse(write_page(tmp_path / "page.html", html), "#site=1", tmp_path / "profile")
    assert "CONSOLE" not in log
    assert page.told[0].count(f"score {float(f'{documents[0].scores[0][place]:.3g}'):g}") >= 1
    assert f"one of {members} that are one token" in page.told[0]
    assert page.told[1].startswith("Point at a")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_long_document_opens_at_once(tmp_path):
    """A document of 512 tokens and twelve sites: under 2 MB, and there within a second of the page's own time."""
    trace = random_trace([512], 12, merge=True)
    scores = torch.rand(12, 1, trace.source.shape[-1])
    html = render_page(document_views([words_of(512)], trace, scores=scores), title="t")
    assert len(html.encode()) < 2_000_000
    when = "addEventListener('load', () => { document.title = Math.round(performance.now()); })"
    path = write_page(tmp_path / "page.html", html.replace("<style>", f"<script>{when}</script><style>"))
    page, log = browse(path, "", tmp_path / "profile")
    assert "CONSOLE" not in log and len(page.words[0]) == 512
    assert int(page.title) < 1000
