"""Converts a checkpoint to an MLX model folder, a few rows at a time.

Tensors are read, cast or quantized, and written in blocks of a few megabytes, so memory stays far
below the model's size. Which layers are quantized is up to the caller.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from graft.console import progress_bar
from graft.errors import InputError
from graft.pretrained.companions import copy_files, find_tokenizer
from graft.pretrained.folder import (
    CONVERTIBLE,
    find_folder,
    has_hugging_face_layout,
    has_meta_layout,
)
from graft.pretrained.foreign_quantization import quantizer_of
from graft.pretrained.hugging_face import open_hugging_face_folder
from graft.pretrained.lazy_model import fit_tensors
from graft.pretrained.meta import open_meta_folder
from graft.pretrained.tokenizer import SentencePieceTokenizer
from graft.storage.lazy_tensors import LazyTensor, Output, blocks, size_bytes, without_buffer_cache
from graft.storage.npz import write_npz
from graft.storage.safetensors import write_safetensors

import mlx.core as mx
import mlx.nn as nn

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
WEIGHT_WRITERS = {
    "npz": ("weights.npz", write_npz),
    "safetensors": ("model.safetensors", write_safetensors),
}


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint on disk, to be converted.

    Attributes:
        folder: where it is.
        config: its configuration, as mlx-lm reads it.
        tensors: by the names in its files, or those of mlx-lm for Meta's layout.
        tokenizer: the files that go along with the weights.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    tokenizer: list[Path]


class QuantizationPlan(NamedTuple):
    """What is to be quantized, and how.

    Attributes:
        layers: group_size, bits and mode of each layer to quantize, by path.
        record: what config.json says about it; empty if nothing is quantized.
        notes: why other layers are not, a line each.
    """

    layers: Mapping[str, dict[str, Any]]
    record: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        file: the weights.
        parameters: their number.
        bytes_before: size of the checkpoint's tensors.
        bytes_after: size of those written.
        notes: what was left out or not quantized, a line each.
        seconds: how long it took.
    """

    file: Path
    parameters: int
    bytes_before: int
    bytes_after: int
    notes: Sequence[str] = ()
    seconds: float = 0.0


def open_source_model(torch_path: str | Path | None, hf_path: str | Path | None) -> SourceModel:
    """Open a checkpoint without reading its weights.

    Args:
        torch_path: a folder in Meta's layout.
        hf_path: a folder in Hugging Face's layout, or owner/name on the Hub.

    Raises:
        InputError: not exactly one of the two is given, or the checkpoint is missing, incomplete or
            damaged.
    """
    if (torch_path is None) == (hf_path is None):
        raise InputError("give one of --torch-path (Meta's layout) and --hf-path (Hugging Face's)")
    if hf_path is not None:
        folder = find_folder(hf_path, option="--hf-path", weights=CONVERTIBLE)
        if has_meta_layout(folder):
            raise InputError(f"{folder} has Meta's layout; use --torch-path {folder}")
        config, tensors = open_hugging_face_folder(folder)
        return SourceModel(folder, config, tensors, find_tokenizer(folder))
    folder = Path(str(torch_path))
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; --torch-path takes a Meta checkpoint's")
    if has_hugging_face_layout(folder):
        raise InputError(f"{folder} has Hugging Face's layout; use --hf-path {folder}")
    config, tensors = open_meta_folder(folder)
    # Meta's download has one tokenizer next to the folders of all sizes.
    tokenizer = find_tokenizer(folder, fallback=folder.parent / "tokenizer.model")
    for file in tokenizer:
        if file.name == "tokenizer.model" and not (folder / "tokenizer.json").is_file():
            SentencePieceTokenizer(file)  # refuses Llama 3's, which nothing here can read
    return SourceModel(folder, config, tensors, tokenizer)


def convert_checkpoint(
    source: SourceModel,
    folder: Path,
    *,
    file_format: str,
    dtype: str | None = None,
    quantize: Callable[[nn.Module], QuantizationPlan] | None = None,
    show_progress: bool = False,
) -> Conversion:
    """Write weights, config.json and tokenizer of a checkpoint into an empty folder.

    Args:
        source: where everything comes from.
        folder: an empty folder.
        file_format: a key of `WEIGHT_WRITERS`.
        dtype: a key of `DTYPES` to cast to; `None` keeps the checkpoint's types.
        quantize: chooses what is quantized, given the architecture; `None` for nothing.
        show_progress: draw a progress bar on standard error.

    Raises:
        InputError: an unknown architecture, tensors that do not fit it, or a quantized checkpoint
            that is to be quantized.
    """
    if quantize and (quantizer := quantizer_of(source.config)):
        raise InputError(f"{source.folder} is quantized already, by {quantizer}; omit -q")
    staged = folder / "staged.safetensors"
    with without_buffer_cache():
        base = fit_tensors(source.folder, source.config, source.tensors, staged)
        plan = quantize(base.model) if quantize else QuantizationPlan({}, {}, [])
        bytes_before = sum(map(size_bytes, base.tensors.values()))
        outputs = plan_outputs(
            base.model, base.tensors, plan.layers, DTYPES[dtype] if dtype else None
        )
        bytes_after = sum(output.size_bytes for output in outputs)
        file = _write_weights(folder, outputs, file_format, show_progress=show_progress)
    staged.unlink(missing_ok=True)
    _write_config(base.config, base.model, folder, dtype=dtype, quantization=plan.record)
    copy_files(source.tokenizer, folder)
    notes = [*base.notes, *plan.notes]
    return Conversion(file, base.parameters, bytes_before, bytes_after, notes)


def plan_outputs(
    model: nn.Module,
    tensors: dict[str, LazyTensor],
    layers: Mapping[str, dict[str, Any]],
    dtype: mx.Dtype | None,
) -> list[Output]:
    """The tensors to write. Empties `tensors`, so that each is freed once it is written.

    Args:
        model: the architecture; it may exempt tensors from casting.
        tensors: under mlx-lm's names.
        layers: settings of the layers to quantize, by path.
        dtype: to cast to; `None` keeps each tensor's type.
    """
    castable = getattr(model, "cast_predicate", None) or (lambda name: True)
    outputs: list[Output] = []
    for name in list(tensors):
        tensor = tensors.pop(name)
        target = tensor.dtype
        if mx.issubdtype(target, mx.floating) and dtype is not None and castable(name):
            target = dtype
        elif target == mx.float64:
            target = mx.float32  # MLX computes with float64 on the CPU only
        path, _, kind = name.rpartition(".")
        if path in layers and kind == "weight":
            outputs += _quantized_outputs(path, tensor, target, layers[path])
        else:
            outputs.append(Output(name, target, tensor.shape, _cast(name, tensor, target)))
    return outputs


def _cast(name: str, tensor: LazyTensor, dtype: mx.Dtype) -> Iterator[mx.array]:
    """The blocks of a tensor in another type.

    Raises:
        InputError: numbers that are not finite, before or after.
    """
    for block in blocks(tensor):
        cast = block if block.dtype == dtype else block.astype(dtype, stream=mx.cpu)
        if mx.issubdtype(dtype, mx.floating) and not _is_finite(cast):
            if not _is_finite(block):
                raise InputError(f"{name} holds numbers that are not finite: fetch the model again")
            raise InputError(
                f"{name} holds numbers that are too large for {str(dtype).rpartition('.')[2]}: "
                "convert with --dtype bfloat16"
            )
        yield cast


def _is_finite(block: mx.array) -> bool:
    return bool(mx.isfinite(block, stream=mx.cpu).all(stream=mx.cpu).item())


def _quantized_outputs(
    path: str, tensor: LazyTensor, dtype: mx.Dtype, settings: dict[str, Any]
) -> list[Output]:
    """A layer's packed weight, scales and biases, made block by block: groups lie within rows."""

    def pack(block: mx.array) -> Sequence[mx.array]:
        return mx.quantize(block, **settings)

    # The scales and biases are written after the weight, and made along with it.
    names = ("weight", "scales", "biases")
    kept: dict[str, list[mx.array]] = {name: [] for name in names}

    def weight() -> Iterator[mx.array]:
        for block in _cast(f"{path}.weight", tensor, dtype):
            packed, *rest = pack(block)
            mx.eval(packed, *rest)
            for name, array in zip(names[1:], rest, strict=False):
                kept[name].append(array)
            yield packed

    shapes = [(a.dtype, tuple(a.shape)) for a in pack(mx.zeros(tensor.shape, dtype))]
    contents = (weight(), iter(kept["scales"]), iter(kept["biases"]))
    return [
        Output(f"{path}.{name}", kind, shape, content)
        for name, (kind, shape), content in zip(names, shapes, contents, strict=False)
    ]


def _write_weights(
    folder: Path, outputs: Sequence[Output], file_format: str, *, show_progress: bool
) -> Path:
    from rich.progress import DownloadColumn

    file_name, write = WEIGHT_WRITERS[file_format]
    total = sum(output.size_bytes for output in outputs)
    columns = [DownloadColumn()]
    with progress_bar("writing", total, enabled=show_progress, columns=columns) as update:

        def counted(tensor_blocks: Iterator[mx.array]) -> Iterator[mx.array]:
            for block in tensor_blocks:
                yield block
                update(advance=block.nbytes)

        write(folder / file_name, [o._replace(blocks=counted(o.blocks)) for o in outputs])
    return folder / file_name


def _write_config(
    config: dict[str, Any],
    model: nn.Module,
    folder: Path,
    *,
    dtype: str | None,
    quantization: dict[str, Any],
) -> None:
    from mlx_lm.utils import save_config

    if quantization:
        config = config | {"quantization": quantization}
    if dtype is not None:
        # transformers 5 writes `dtype` and reads both; mlx-lm reads the older name.
        config = config | dict.fromkeys({"torch_dtype", "dtype"} & {"torch_dtype", *config}, dtype)
    keep_vision = "vision_tower" in getattr(model, "model", {})
    save_config(dict(config), folder / "config.json", keep_vision_config=keep_vision)
