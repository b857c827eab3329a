"""Writes a model with its adapter inside: one folder that mlx-lm loads without Graft.

python -m graft fuse --adapter-file adapters/adapters.npz --out fused

Quantizing again can round an adapter away. So adapter and fused model are both run on sample text
afterwards, and if too much is lost, layers are rounded with more care, or to more bits.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.adapters.adapter import apply_adapter
from graft.console import note
from graft.data.batches import group_rows, pad, sample_rows
from graft.data.examples import Example, load_splits
from graft.data.sources import check_data_name
from graft.errors import RunError
from graft.exporting.fused_model import WEIGHTS, Fusion, quantized_bits, write_fused_model
from graft.pretrained.load import load_model, read_model
from graft.pretrained.tokenizer import Tokenizer
from graft.quantization.bit_allocation import BitAllocator
from graft.quantization.divergence import Comparison, Sample, compare, take_sample
from graft.storage.atomic import new_folder

MAX_KL = 0.01
MAX_GROWTH = 0.09
SAMPLE_ROWS, SAMPLE_TOKENS = 16, 256
# English prose, lists, dialogue, tables and code, written for Graft.
SAMPLE_TEXT = Path(__file__).parents[1] / "assets" / "sample_text.txt"


@dataclass(frozen=True)
class FusionResult:
    """What a fusion gave.

    Attributes:
        comparison: of adapter and fused model.
        more_bits: layers that were given more bits.
        bytes_before: of the base's weights.
        bytes_after: of the fused ones.
        max_kl: what was aimed at.
    """

    comparison: Comparison
    more_bits: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    max_kl: float


def fuse_checked(
    fusion: Fusion,
    out: Path,
    *,
    max_kl: float | None = None,
    check_data: str | None = None,
    force: bool = False,
) -> FusionResult:
    """Fuse, compare, and give layers more care or bits until the divergence is small enough.

    Args:
        fusion: what is to be fused.
        out: the folder to make; it appears whole or not at all.
        max_kl: the largest mean divergence allowed, in nats a token; by default `MAX_KL`, unless
            the model would grow by more than `MAX_GROWTH` for it.
        check_data: what to compare on, as for `--data`.
        force: replace `out`.

    Raises:
        InputError: the adapter does not fit, or files are at fault.
        RunError: adapter or fused model give numbers that are none.
    """
    model, tokenizer, config = load_model(fusion.model)
    trained_on = fusion.adapter.options.get("data")
    examples, others = sample_text(tokenizer, check_data, trained_on, config)
    apply_adapter(model, fusion.adapter, name=fusion.name)
    model.eval()
    limit = MAX_KL if max_kl is None else max_kl
    with new_folder(out, replace=force) as folder, tempfile.TemporaryDirectory() as scratch:
        sample = take_sample(model, examples, Path(scratch))
        before, after = write_fused_model(fusion, folder)
        allocator = BitAllocator(
            model,
            quantized_bits(fusion, model),
            sample=sample,
            calibration=[pad(others, rows) for rows in group_rows(others, 4)],
            scratch=Path(scratch),
            limit=limit,
            room_bytes=math.inf if max_kl is not None else (1 + MAX_GROWTH) * before - after,
        )
        allocator.comparison = compared(sample, folder, fusion)
        for allocation in allocator:
            (folder / WEIGHTS).unlink()
            fusion = replace(fusion, more_bits=allocation.more_bits, prepared=allocation.prepared)
            before, after = write_fused_model(fusion, folder)
            allocator.comparison = compared(sample, folder, fusion)
    return FusionResult(allocator.comparison, fusion.more_bits, before, after, limit)


def compared(sample: Sample, folder: Path, fusion: Fusion) -> Comparison:
    """Run what was written and compare it with the adapter.

    Raises:
        RunError: one of them gives numbers that are none.
    """
    found = compare(sample, read_model(folder)[0])
    if not math.isfinite(found.adapter_loss):
        raise RunError(
            f"{fusion.name} has a loss of {found.adapter_loss} on the sample text before anything "
            "is fused: train it again, or name another"
        )
    if not (math.isfinite(found.kl) and math.isfinite(found.fused_loss)):
        raise RunError(
            f"with {fusion.name} inside, the model has a loss of {found.fused_loss} and a "
            f"divergence of {found.kl}; nothing was written: try --dequantize"
        )
    return found


def sample_text(
    tokenizer: Tokenizer, named: str | None, trained_on: str | None, config: Mapping[str, Any]
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Some validation rows of the data that was named, or trained on, or else of Graft's own text.

    Returns:
        Rows to compare on, and others to take inputs from.

    Raises:
        InputError: the data that was named is not there, or broken.
    """
    limit = min(SAMPLE_TOKENS, config.get("max_position_embeddings") or SAMPLE_TOKENS)
    data = named or (trained_on if trained_on is not None and Path(trained_on).exists() else None)
    if data is None:
        note(
            "the run's data is not here; comparing on Graft's sample text; --check-data names "
            "other text"
        )
        data = str(SAMPLE_TEXT)
    check_data_name(data)
    whole = 1.0 if Path(data).is_file() else 0.1
    found = load_splits(data, tokenizer, ["valid"], max_length=limit, valid_fraction=whole)
    rows = sample_rows(found["valid"].examples, 2 * SAMPLE_ROWS, seed=0)
    return rows[::2], rows[1::2] or rows
