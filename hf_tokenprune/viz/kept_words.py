"""A self-contained HTML page: what became of the words of texts, or the patches of images, site by site.

Everything comes from the token trace of a forward pass; no model is needed here.

Shapes: B samples, N padded length, S pruning sites.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from jinja2 import Environment, StrictUndefined

from ..files import write_atomically


if TYPE_CHECKING:
    from torch import Tensor

_TEMPLATE = "kept_words.html.jinja"
_SPECIAL = frozenset(
    ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "<s>", "</s>", "<pad>", "<mask>", "<unk>", "<cls>", "<eos>", "<bos>"]
)
_WORD_PIECE = "##"
_WORD_START = ("Ġ", "▁")  # byte-level BPE, SentencePiece
_LINE_BREAK = ("Ċ", "\n")
_OPENING = frozenset("([{")
_CLOSING = frozenset(".,;:!?)]}%")
_APOSTROPHES = frozenset("'’")
_LONGEST_LEGEND = 5
_MANY_GROUPS = 12  # hues alone tell no more of them apart
_SHADES = (0, -15, 15)


class TokenTrace(Protocol):
    """What this page reads of a model's `token_trace`."""

    layers: list[int]
    """The site layers, S of them."""
    counts: Tensor
    """`[S, B]`, tokens alive after each site."""
    source: Tensor
    """`[S, B, N]`, for each original position the row that carries it now; -1 dropped."""


@dataclass(frozen=True)
class Picture:
    """An image under its patches."""

    png: bytes
    columns: int
    """Patches side by side."""
    first: int = 1
    """Structural tokens before the first patch."""


@dataclass(frozen=True)
class DocumentView:
    """One document, or one image, as the page shows it.

    Lists over positions have one entry per original token, without padding.
    """

    words: list[str]
    """The tokens as the tokenizer spells them ("##ing", "Ġword", "▁word"); the page joins pieces of one word."""
    last_site: list[int]
    """How many sites each position survived, 0..S. A token merged into another lives on in that one."""
    layers: list[int]
    """The site layers, S of them."""
    label: str
    prediction: str
    prediction_unpruned: str
    confidence: float | None
    """Probability of `prediction`, 0..1."""
    counts: list[int] | None = None
    """Tokens alive after each site. None: as many as there are surviving positions, true where nothing is merged."""
    carriers: list[list[int]] | None = None
    """After each site, the token that carries each position, -1 where there is none; those with the same are one."""
    scores: list[list[float | None]] | None = None
    """At each site, what each position's token was judged by; None where it was gone."""
    picture: Picture | None = None
    """Of an image, whose `words` are its structural tokens and then its patches, row by row."""

    def __post_init__(self) -> None:
        sites = len(self.layers)
        if len(self.last_site) != len(self.words):
            raise ValueError(f"last_site ({len(self.last_site)} entries) must have one per word ({len(self.words)})")
        if outside := [depth for depth in self.last_site if not 0 <= depth <= sites]:
            raise ValueError(f"last_site ({outside[0]}) must be in [0, {sites}], the number of sites")
        if self.counts is not None and len(self.counts) != sites:
            raise ValueError(f"counts ({len(self.counts)} entries) must have one per site ({sites})")
        for name in ("carriers", "scores"):
            rows = getattr(self, name)
            if rows is not None and [len(row) for row in rows] != [len(self.words)] * sites:
                raise ValueError(f"{name} must have one entry per site and word ({sites} x {len(self.words)})")
        patches = 0 if self.picture is None else len(self.words) - self.picture.first
        if patches and patches % self.picture.columns:
            raise ValueError(f"columns ({self.picture.columns}) of the picture must divide its {patches} patches")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence ({self.confidence}) must be in [0, 1]")

    def surviving(self) -> list[int]:
        """Original positions still carried at the input and after each site, `S + 1` numbers."""
        return [sum(depth >= site for depth in self.last_site) for site in range(len(self.layers) + 1)]

    def merges(self) -> bool:
        """Whether several positions are ever one token."""
        return any(self.colours())

    def colours(self) -> list[dict[int, tuple[float, int]]]:
        """After each site, of each token that carries several positions: hue in degrees, and points of lightness more
        or less."""
        return [_colours(row) for row in self.carriers or ()]

    def trace(self) -> str:
        """What the page's script reads, as JSON."""
        scores = [[None if value is None else float(f"{value:.3g}") for value in row] for row in self.scores or ()]
        known = {"carriers": self.carriers or [], "scores": scores, "colours": self.colours()}
        return json.dumps(known, separators=(",", ":"))

    def alive(self) -> list[int]:
        """Tokens the model computes on at the input and after each site, `S + 1` numbers."""
        return self.surviving() if self.counts is None else [len(self.words), *self.counts]


def _colours(carriers: list[int]) -> dict[int, tuple[float, int]]:
    """Hues spread evenly over the groups; where there are many, those of neighbouring hues differ in lightness."""
    members = Counter(carrier for carrier in carriers if carrier >= 0)
    groups = [carrier for carrier, count in members.items() if count > 1]  # in the order of their first positions
    many, hues = len(groups) > _MANY_GROUPS, len(groups)
    if many:
        hues = math.ceil(hues / len(_SHADES)) * len(_SHADES)  # the first and the last one are neighbours too
    colours = {}
    for number, carrier in enumerate(groups):
        # Groups that follow each other often lie side by side: they get opposite hues.
        place = number // 2 + number % 2 * math.ceil(hues / 2)
        colours[carrier] = round(360 * place / hues, 1), _SHADES[place % len(_SHADES)] if many else 0
    return colours


def document_views(
    tokens: Sequence[Sequence[str]],
    trace: TokenTrace,
    *,
    labels: Sequence[str] | None = None,
    predictions: Sequence[str] | None = None,
    predictions_unpruned: Sequence[str] | None = None,
    confidences: Sequence[float | None] | None = None,
    attention_mask: Tensor | None = None,
    scores: Tensor | None = None,
    pictures: Sequence[Picture] | None = None,
) -> list[DocumentView]:
    """Build the views of a batch from its token trace.

    Args:
        tokens: token strings of each of the B samples, without padding.
        trace: `layers` (S), `counts` `[S, B]` and `source` `[S, B, N]` of the forward pass of these samples.
        labels, predictions, predictions_unpruned, confidences: one entry per sample; left out, the page omits them.
        attention_mask: `[B, N]`, needed only where padding is not on the right.
        scores: `[S, B, N]`, NaN where a position's token was gone.
        pictures: of images, one per sample.

    Raises:
        ValueError: the trace and the tokens do not belong together.
    """
    batch = len(tokens)
    _check_trace(trace, batch)
    columns = {
        "labels": labels,
        "predictions": predictions,
        "predictions_unpruned": predictions_unpruned,
        "confidences": confidences,
        "pictures": pictures,
    }
    for name, column in columns.items():
        if column is not None and len(column) != batch:
            raise ValueError(f"{name} ({len(column)} entries) must have one per document ({batch})")

    # A token that is gone stays gone, so the product over the sites counts the leading sites it survived.
    depths = (trace.source >= 0).long().cumprod(0).sum(0).tolist()  # [B][N]
    counts = trace.counts.t().tolist()  # [B][S]
    masks = [None] * batch if attention_mask is None else attention_mask.tolist()
    own = [_without_padding(depths[b], len(tokens[b]), masks[b], b) for b in range(batch)]
    return [
        DocumentView(
            words=list(tokens[b]),
            last_site=[depths[b][place] for place in own[b]],
            layers=[int(layer) for layer in trace.layers],
            label=labels[b] if labels else "",
            prediction=predictions[b] if predictions else "",
            prediction_unpruned=predictions_unpruned[b] if predictions_unpruned else "",
            confidence=confidences[b] if confidences else None,
            counts=counts[b],
            carriers=[[row[place] for place in own[b]] for row in trace.source[:, b].tolist()],
            scores=None if scores is None else [_known(row, own[b]) for row in scores[:, b].tolist()],
            picture=pictures[b] if pictures else None,
        )
        for b in range(batch)
    ]


def _check_trace(trace: TokenTrace, batch: int) -> None:
    sites = len(trace.layers)
    if tuple(trace.counts.shape) != (sites, batch):
        raise ValueError(f"trace.counts ({tuple(trace.counts.shape)}) must be [sites, documents] ({(sites, batch)})")
    if trace.source.dim() != 3 or tuple(trace.source.shape[:2]) != (sites, batch):
        raise ValueError(f"trace.source ({tuple(trace.source.shape)}) must be [sites, documents, N] for {sites} sites")


def _known(row: list[float], places: list[int]) -> list[float | None]:
    return [row[place] if math.isfinite(row[place]) else None for place in places]


def _without_padding(depths: list[int], length: int, mask: list[int] | None, document: int) -> list[int]:
    """The positions, of the N of `depths`, that belong to the document's own `length` tokens."""
    own = range(min(length, len(depths))) if mask is None else [place for place, there in enumerate(mask) if there]
    if len(own) != length:
        raise ValueError(f"document {document} has {length} tokens, but its trace covers {len(own)}")
    if mask is None and any(depths[length:]):
        # Left-padded samples would otherwise be shown shifted, which looks plausible and is wrong.
        raise ValueError(f"document {document}: tokens survive beyond its {length} tokens; pass attention_mask")
    return list(own)


class _Piece(NamedTuple):
    text: str
    glued: bool
    """No space between it and the piece before it."""
    special: bool
    depth: int


class _Step(NamedTuple):
    name: str
    alive: int
    percent: float
    sentence: str


def _pieces(document: DocumentView) -> list[_Piece]:
    """The document's tokens as readable text, one piece per token."""
    words = document.words
    word_pieces = any(word.startswith(_WORD_PIECE) and len(word) > len(_WORD_PIECE) for word in words)
    marked = not word_pieces and any(word.startswith(_WORD_START) for word in words)
    pieces: list[_Piece] = []
    for word, depth in zip(words, document.last_site, strict=True):
        before = pieces[-1] if pieces else None
        special = word in _SPECIAL
        inner = before is not None and not before.special and not special
        if marked:
            glued = inner and not word.startswith((*_WORD_START, *_LINE_BREAK))
            text = _strip_marker(word)
        elif word.startswith(_WORD_PIECE) and len(word) > len(_WORD_PIECE):
            glued = inner
            text = word.removeprefix(_WORD_PIECE)
        else:
            glued = inner and _sticks(before.text, word)
            text = word
        pieces.append(_Piece(text, glued, special, depth))
    return pieces


def _split(document: DocumentView) -> tuple[list[_Piece], list[_Piece]]:
    """What is shown as text, and as patches of the picture."""
    pieces = _pieces(document)
    first = len(pieces) if document.picture is None else document.picture.first
    return pieces[:first], pieces[first:]


def _address(picture: Picture | None) -> str:
    return "" if picture is None else f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _strip_marker(word: str) -> str:
    text = word[1:] if word.startswith(_WORD_START) else word
    for mark in _LINE_BREAK:
        text = text.replace(mark, "↵")
    return text or "␣"


def _sticks(before: str, text: str) -> bool:
    """Whether plain word-piece text reads better without the space between these two tokens."""
    return text in _CLOSING or before in _OPENING or text in _APOSTROPHES or before in _APOSTROPHES


def _site_names(layers: Sequence[int]) -> list[str]:
    return ["input", *(f"site {site} (layer {layer})" for site, layer in enumerate(layers, start=1))]


def _steps(document: DocumentView) -> list[_Step]:
    """What is alive at the input and after each site, as numbers and as a sentence."""
    total = len(document.words)
    steps = []
    for name, alive, carried in zip(_site_names(document.layers), document.alive(), document.surviving(), strict=True):
        sentence = f"{alive} of {total} tokens alive"
        if alive != carried:
            sentence += f", carrying {carried} of the original ones"
        steps.append(_Step(name, alive, 100 * alive / max(total, 1), sentence))
    return steps


def _legend(fates: Sequence[str], documents: Sequence[DocumentView]) -> list[tuple[int, str]]:
    """The fates that there are: all of them, or the ends and the middle where they are many."""
    depths = sorted({depth for document in documents for depth in document.last_site})
    depths = depths if len(depths) <= _LONGEST_LEGEND else [depths[0], depths[len(depths) // 2], depths[-1]]
    return [(depth, fates[depth]) for depth in depths]


def render_page(documents: Sequence[DocumentView], *, title: str, summary: str = "") -> str:
    """Render the documents as one HTML page that needs no network.

    The slider starts after the last site; `#site=k` in the page's address starts it after site k (0: the input).

    Args:
        documents: views with the same site layers, since one slider moves all of them.
        title: heading of the page, plain text.
        summary: a paragraph under the heading, plain text.

    Raises:
        ValueError: no documents, or documents with different sites.
    """
    if not documents:
        raise ValueError("documents is empty: a page needs at least one")
    layers = documents[0].layers
    for document in documents:
        if document.layers != layers:
            raise ValueError(f"documents must share their site layers: {document.layers} is not {layers}")
    names = _site_names(layers)
    fates = [*(f"dropped at {name}" for name in names[1:]), "kept to the end"]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title,
        summary=summary,
        sites=len(layers),
        names=names,
        legend=_legend(fates, documents),
        merged=any(document.merges() for document in documents),
        fates=fates,
        documents=[
            (document, _steps(document), *_split(document), _address(document.picture)) for document in documents
        ],
    )


def write_page(path: str | os.PathLike[str], html: str) -> Path:
    """Write the page so that a reader sees the old file or the whole new one, never a part."""
    return write_atomically(path, html.encode("utf-8", errors="replace"))
