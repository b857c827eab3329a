"""The README.md of what goes to the Hub: what it is, how it was made, how to use it.

Reference: https://huggingface.co/docs/hub/model-cards
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

USES = {
    "npz": """\
```console
$ python lora.py --model {base} --adapter-file {name} --prompt "Hello"
```""",
    "mlx-lm": """\
```console
$ mlx_lm.generate --model {base} --adapter-path {folder} --prompt "Hello"
```

where `{folder}` is a copy of this repository (`hf download {name} --local-dir {folder}`).""",
    "peft": """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
```""",
    "gguf": """\
```console
$ llama-cli -m base.gguf --lora {file} -p "Hello"
```

where `base.gguf` is {base} in GGUF.""",
    "model": """\
```console
$ mlx_lm.generate --model {name} --prompt "Hello"
```""",
}
LIBRARIES = {"npz": "mlx", "mlx-lm": "mlx", "peft": "peft", "gguf": "gguf", "model": "mlx"}
TITLES = {
    "npz": "Graft",
    "mlx-lm": "mlx-lm",
    "peft": "PEFT",
    "gguf": "llama.cpp",
    "model": "mlx-lm",
}


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        repository: owner/name.
        form: one of `USES`.
        base_model: a Hub name, or `None` if there is none to tell.
        methods: such as "lora, rank 8".
        options: of the run, as its record has them.
        losses: from a split's name to the loss that was measured last, in nats a token.
        file: the file with the weights.
    """

    repository: str
    form: str
    base_model: str | None
    methods: str
    options: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    file: str = ""


def read_losses(metrics: Path) -> dict[str, float]:
    """The last loss of each split in a run's metrics.jsonl; none if there is no such file."""
    if not metrics.is_file():
        return {}
    losses: dict[str, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row.get("kind") == "eval":
                losses[str(row["split"])] = float(row["loss"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that was cut off when a run was killed
    return losses


def write_card(card: Card) -> str:
    """README.md, with the front matter that the Hub reads."""
    front = [f"library_name: {LIBRARIES[card.form]}"]
    if card.base_model is not None:
        front.append(f"base_model: {json.dumps(card.base_model)}")
        kind = "finetune" if card.form == "model" else "adapter"
        front.append(f"base_model_relation: {kind}")
    front += ["pipeline_tag: text-generation", "tags:", "- lora", "- graft"]
    base = card.base_model or "the base model"
    facts = [f"- Base model: {base}", f"- Method: {card.methods}"]
    if data := card.options.get("data"):
        facts.append(f"- Data: {data}")
    facts += [f"- Loss on {split}: {loss:.3f}" for split, loss in card.losses.items()]
    settings = ("iters", "epochs", "batch_size", "learning_rate", "optimizer", "seed")
    told = [f"{n} {card.options[n]}" for n in settings if card.options.get(n) is not None]
    facts += [f"- Training: {', '.join(told)}"] if told else []
    name = card.repository.rpartition("/")[2]
    use = USES[card.form].format(base=base, name=card.repository, folder=name, file=card.file)
    title = TITLES.get(card.form, "mlx-lm")
    front_matter, list_of_facts = "\n".join(front), "\n".join(facts)
    return (
        f"---\n{front_matter}\n---\n\n# {name}\n\nMade with Graft.\n\n{list_of_facts}\n\n"
        f"## Use in {title}\n\n{use}\n"
    )
