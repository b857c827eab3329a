"""Uploads an adapter, or a model with an adapter fused into it, with a model card."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from graft.adapters.adapter import Adapter
from graft.adapters.formats import Usage
from graft.exporting.adapter import names_repository
from graft.exporting.model_card import Card, read_losses, write_card
from graft.pretrained.hub import upload_folder

FUSED_MODEL_USAGE = Usage(
    "mlx-lm",
    "mlx",
    """\
```console
$ mlx_lm.generate --model {name} --prompt "Hello"
```""",
)


def publish(out: Path, card: Card, *, files: Sequence[str]) -> str:
    """Upload a folder, or a file, with a model card.

    Args:
        out: the folder or the file.
        card: the card; it names the repository.
        files: names and globs of what belongs to it in the folder, or beside the file; nothing else
            is uploaded.

    Returns:
        The address of the commit.

    Raises:
        RunError: the Hub refuses it; what was written stays.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "upload"
        folder.mkdir()
        place = out if out.is_dir() else out.parent
        chosen = {path for name in files for path in place.glob(name) if path.is_file()}
        for file in chosen if out.is_dir() else chosen | {out}:
            shutil.copy(file, folder)
        (folder / "README.md").write_text(write_card(card), encoding="utf-8")
        return upload_folder(folder, card.repository)


def make_card(
    repository: str,
    usage: Usage,
    adapter: Adapter,
    source: Path,
    *,
    file: str = "",
    relation: str = "adapter",
) -> Card:
    """The card of an adapter, or of a model with the adapter fused into it.

    Args:
        repository: owner/name.
        usage: how it is used.
        adapter: what the card describes.
        source: its file; the losses come from metrics.jsonl beside it.
        file: the name of the file that is uploaded, for `usage`.
        relation: to the base model, as the Hub calls it.
    """
    base = adapter.base_model
    if base is not None and not names_repository(base):
        base = None  # A path on this machine means nothing to readers of the card.
    losses = read_losses(source.with_name("metrics.jsonl"))
    methods = summarize_methods(adapter)
    return Card(repository, usage, base, methods, adapter.options, losses, file, relation)


def summarize_methods(adapter: Adapter) -> str:
    """Such as "lora, rank 8, 21 layers"."""
    counts = Counter((config.method, config.rank) for config in adapter.layers.values())
    return "; ".join(f"{m}, rank {rank}, {count} layers" for (m, rank), count in counts.items())
