"""Write a model card and its pictures from what `run_comparison.py` measured.

    python scripts/run_card.py --recipe recipes/minilm-20newsgroups-religion \\
        --evidence model_cards/evidence/minilm-20newsgroups-religion.json
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.files import write_atomically
from hf_tokenprune.hub.cards import measured_card, read_about, read_evidence, schedule_of
from hf_tokenprune.viz import comparison_picture


CARDS = Path(__file__).parents[1] / "model_cards"


@dataclass
class CardArguments:
    recipe: str = field(metadata={"help": "Folder of the recipe, with card.yaml."})
    evidence: str = field(metadata={"help": "comparison.json; the pictures are written beside it."})
    template: str = field(default=str(CARDS / "template.md"), metadata={"help": "A Jinja file."})
    address: str | None = field(
        default=None,
        metadata={"help": "Where the card loads the model from: user/name; what its own command writes if not given."},
    )
    output: str | None = field(default=None, metadata={"help": "The card; model_cards/<recipe>.md if not given."})

    @property
    def card(self) -> Path:
        return Path(self.output or CARDS / f"{Path(self.recipe).name}.md")


def card_text(arguments: CardArguments) -> str:
    evidence, recipe = Path(arguments.evidence), Path(arguments.recipe).name
    measured = read_evidence(evidence, arguments.recipe)
    folder = os.path.relpath(evidence.parent, arguments.card.parent)
    card = measured_card(
        read_about(arguments.recipe),
        measured,
        recipe=recipe,
        # Where the command of the card leaves it.
        address=arguments.address or f"outputs/{recipe}/seed-{measured['seeds'][0]}/pruned/model",
        picture=f"{folder}/{evidence.stem}.png",
        schedule=f"{folder}/{_schedule(evidence).name}",
        template=arguments.template,
    )
    return f"{str(card).rstrip()}\n"


def draw(arguments: CardArguments) -> None:
    path, about = Path(arguments.evidence), read_about(arguments.recipe)
    evidence = read_evidence(path, arguments.recipe)
    comparison_picture(evidence, path.with_suffix(".png"), title=about["title"])
    schedule_of(evidence, about, _schedule(path))


def _schedule(evidence: Path) -> Path:
    return evidence.with_name(f"{evidence.stem}-schedule.png")


def main() -> None:
    try:
        (arguments,) = parse_arguments(CardArguments)
        text = card_text(arguments)
        draw(arguments)
    except (ImportError, KeyError, OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    write_atomically(arguments.card, text.encode())
    print(f"wrote {arguments.card}")


if __name__ == "__main__":
    main()
