"""The README.md of an upload to the Hub: what it is, how it was made, how to use it.

Reference: https://huggingface.co/docs/hub/model-cards
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.adapters.formats import Usage
from graft.storage.json_file import parse_json


@dataclass(frozen=True)
class Card:
    """The content of a card.

    Attributes:
        repository: owner/name.
        usage: how the files are used.
        base_model: a Hub name, or `None` if it has none.
        methods: such as "lora, rank 8".
        options: of the run, as recorded.
        losses: from a split's name to the last measured loss, in nats per token.
        file: the file with the weights.
        relation: to the base model, as the Hub calls it: "adapter" or "finetune".
    """

    repository: str
    usage: Usage
    base_model: str | None
    methods: str
    options: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    file: str = ""
    relation: str = "adapter"


def read_losses(metrics: Path) -> dict[str, float]:
    """The last loss of each split in a run's metrics.jsonl; none if there is no such file."""
    if not metrics.is_file():
        return {}
    losses: dict[str, float] = {}
    for line in metrics.read_bytes().splitlines():
        try:
            row = parse_json(line.decode())
            if row.get("kind") == "eval":
                losses[str(row["split"])] = float(row["loss"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # The last line of a killed run may be cut off.
    return losses


def write_card(card: Card) -> str:
    """README.md, with the front matter that the Hub reads."""
    name = card.repository.rpartition("/")[2]
    base = card.base_model or "the base model"
    use = card.usage.text.format(base=base, name=card.repository, folder=name, file=card.file)
    front_matter, facts = "\n".join(_front_matter(card)), "\n".join(_facts(card, base))
    return (
        f"---\n{front_matter}\n---\n\n# {name}\n\nMade with Graft.\n\n{facts}\n\n"
        f"## Use in {card.usage.tool}\n\n{use}\n"
    )


def _front_matter(card: Card) -> list[str]:
    lines = [f"library_name: {card.usage.library}"]
    if card.base_model is not None:
        lines.append(f"base_model: {json.dumps(card.base_model)}")
        lines.append(f"base_model_relation: {card.relation}")
    return [*lines, "pipeline_tag: text-generation", "tags:", "- lora", "- graft"]


def _facts(card: Card, base: str) -> list[str]:
    lines = [f"- Base model: {base}", f"- Method: {card.methods}"]
    if data := card.options.get("data"):
        lines.append(f"- Data: {data}")
    lines += [f"- Loss on {split}: {loss:.3f}" for split, loss in card.losses.items()]
    names = ("iters", "epochs", "batch_size", "learning_rate", "optimizer", "seed")
    options = [f"{n} {card.options[n]}" for n in names if card.options.get(n) is not None]
    return lines + ([f"- Training: {', '.join(options)}"] if options else [])
