"""Fuses an adapter into its base model and checks that quantization has not lost the adapter.

The result is one folder that mlx-lm loads without Graft. Quantizing the sum of a weight and its
update can round the update away. So the fused model is compared with the adapter on sample text. If
they differ too much, layers are quantized with GPTQ, and if that is not enough, to more bits.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter, apply_adapter
from graft.console import note
from graft.data.batches import group_rows, sample_rows
from graft.data.collate import collate
from graft.data.examples import Example, load_splits
from graft.data.sources import check_data_name
from graft.errors import InputError, RunError
from graft.exporting.fused_model import WEIGHTS, Fusion, quantized_bits, write_fused_model
from graft.pretrained.context_length import context_length
from graft.pretrained.load import load_model, read_model
from graft.pretrained.tokenizer import Tokenizer
from graft.pretrained.transformers_names import KNOWN
from graft.pretrained.vocabulary import check_token_ids
from graft.quantization.bit_allocation import BitAllocator
from graft.quantization.divergence import Comparison, Sample, compare, take_sample
from graft.storage.atomic import check_free, new_folder

MAX_KL = 0.01
MAX_GROWTH = 0.09
SAMPLE_ROWS, SAMPLE_TOKENS = 16, 256
# English prose, lists, dialogue, tables and code, written for Graft.
SAMPLE_TEXT = Path(__file__).parents[1] / "assets" / "sample_text.txt"


@dataclass(frozen=True)
class FusionResult:
    """The fused model beside its adapter and its base model.

    Attributes:
        comparison: how the fused model compares with the adapter on sample text.
        more_bits: from path to bits, for layers with more bits than in the base model;
            `UNQUANTIZED` for layers that are not quantized.
        bytes_before: the size of the base model's weights.
        bytes_after: the size of the fused model's weights.
        max_kl: the divergence aimed at, in nats per token.
    """

    comparison: Comparison
    more_bits: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    max_kl: float


def fuse(
    adapter: Adapter,
    out: str | Path,
    *,
    model: str | None = None,
    dequantize: bool = False,
    q_bits: int | None = None,
    max_kl: float | None = None,
    check_data: str | None = None,
    force: bool = False,
    name: str = "the adapter",
) -> FusionResult:
    """Write a model with an adapter fused into it, and compare the two.

    Args:
        adapter: the adapter.
        out: the folder to write; it appears complete or not at all.
        model: folder or Hub name of the base model; by default the adapter's.
        dequantize: write unquantized weights.
        q_bits: the bits of every quantized layer; by default those of the base model.
        max_kl: the largest mean divergence from the adapter, in nats per token; by default
            `MAX_KL`, unless the model would grow by more than `MAX_GROWTH` to reach it.
        check_data: the data to compare on, in any form that training reads; by default the data of
            the run that trained the adapter, or Graft's sample text.
        force: replace `out`.
        name: the adapter's name in messages.

    Raises:
        InputError: an option is out of range, the adapter does not fit the model, or a file is
            missing or damaged.
        RunError: the loss of the adapter or of the fused model is not finite.
    """
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise InputError(f"--max-kl {max_kl}: give more than 0")
    out = Path(out)
    check_free(out, replace=force)
    if model is None:
        model = adapter.base_model
    elif model != adapter.base_model:
        recorded = adapter.base_model or "the included base model, or it records none"
        note(f"{name} was trained on {recorded}; fusing into {model}")
    fusion = Fusion(model, adapter, dequantize, q_bits, name=name)
    with new_folder(out, replace=force) as folder:
        return _fuse_and_check(fusion, folder, max_kl, check_data)


def _fuse_and_check(
    fusion: Fusion, folder: Path, max_kl: float | None, check_data: str | None
) -> FusionResult:
    model, tokenizer, config = load_model(fusion.model)
    if fusion.dequantize and config["model_type"] not in KNOWN:
        note(
            "the tensors keep mlx-lm's names: it loads the folder, but transformers may not, as "
            f"its names for {config['model_type']} are not known"
        )
    data = fusion.adapter.options.get("data")
    trained_on = data if isinstance(data, str) else None
    examples, calibration = sample_text(tokenizer, config, named=check_data, trained_on=trained_on)
    check_token_ids(model, (example.tokens for example in [*examples, *calibration]))
    apply_adapter(model, fusion.adapter, name=fusion.name)
    model.eval()
    limit = MAX_KL if max_kl is None else max_kl
    with tempfile.TemporaryDirectory() as scratch:
        sample = take_sample(model, examples, Path(scratch))
        before, after = write_fused_model(fusion, folder)
        allocator = BitAllocator(
            model,
            quantized_bits(fusion, model),
            sample=sample,
            calibration=[collate(calibration, rows) for rows in group_rows(calibration, 4)],
            scratch=Path(scratch),
            limit=limit,
            room_bytes=math.inf if max_kl is not None else (1 + MAX_GROWTH) * before - after,
        )
        allocator.comparison = compare_fused(sample, folder, fusion.name)
        for allocation in allocator:
            (folder / WEIGHTS).unlink()
            fusion = replace(fusion, more_bits=allocation.more_bits, prepared=allocation.prepared)
            before, after = write_fused_model(fusion, folder)
            allocator.comparison = compare_fused(sample, folder, fusion.name)
    return FusionResult(allocator.comparison, fusion.more_bits, before, after, limit)


def compare_fused(sample: Sample, folder: Path, name: str) -> Comparison:
    """Compare the fused model in a folder with a sample of the adapter called `name`.

    Raises:
        InputError: the adapter's loss is not finite.
        RunError: that of the fused model is not finite.
    """
    comparison = compare(sample, read_model(folder)[0])
    if not math.isfinite(comparison.adapter_loss):
        raise InputError(
            f"{name} has a loss of {comparison.adapter_loss} on the sample text before it is "
            "fused: train it again, or choose another one"
        )
    if not (math.isfinite(comparison.kl) and math.isfinite(comparison.fused_loss)):
        raise RunError(
            f"with {name} fused, the model has a loss of {comparison.fused_loss} and a "
            f"divergence of {comparison.kl}; nothing was written: try --dequantize"
        )
    return comparison


def sample_text(
    tokenizer: Tokenizer, config: Mapping[str, Any], *, named: str | None, trained_on: str | None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Validation rows of the named data, of the training data, or of Graft's sample text.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's configuration, for its longest context.
        named: the data that the user named, if any.
        trained_on: the data that the adapter was trained on, if recorded.

    Returns:
        Rows to compare on, and other rows to calibrate with.

    Raises:
        InputError: the named data is missing or damaged.
    """
    limit = min(SAMPLE_TOKENS, context_length(config) or SAMPLE_TOKENS)
    data = named or (trained_on if trained_on is not None and Path(trained_on).exists() else None)
    if data is None:
        note(
            "the data that the adapter was trained on is not here; comparing on Graft's sample "
            "text; choose other text with --check-data"
        )
        data = str(SAMPLE_TEXT)
    check_data_name(data)
    fraction = 1.0 if Path(data).is_file() else 0.1
    splits = load_splits(data, tokenizer, ["valid"], max_length=limit, valid_fraction=fraction)
    rows = sample_rows(splits["valid"].examples, 2 * SAMPLE_ROWS, seed=0)
    return rows[::2], rows[1::2] or rows
