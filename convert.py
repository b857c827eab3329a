"""Convert PyTorch or Hugging Face weights to an MLX model, whole or quantized.

    python convert.py --torch-path llama-2-7b --mlx-path llama-q4 -q
    python convert.py --hf-path Qwen/Qwen2-0.5B --mlx-path qwen --format safetensors

A checkpoint flows through in rows: its tensors stay on disk under mlx-lm's names, a plan says how
each is to be cast or quantized, and a writer asks for them a few megabytes at a time. Memory stays
far below the model's size.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from graft.cli.command import command
from graft.errors import InputError
from graft.pretrained.companions import copy_files, find_tokenizer
from graft.pretrained.folder import (
    CONVERTIBLE,
    find_folder,
    has_hugging_face_layout,
    has_meta_layout,
)
from graft.pretrained.foreign_quantization import is_foreign, open_foreign, quantizer_of
from graft.pretrained.hugging_face import open_hugging_face_folder
from graft.pretrained.load import build_model, quantize_as_saved
from graft.pretrained.meta import open_meta_folder
from graft.pretrained.mlx_names import parameters_of, under_mlx_names
from graft.quantization.choose import (
    BITS,
    GROUP_SIZES,
    Quantization,
    quantization_settings,
    quantize,
)
from graft.storage.atomic import check_free, new_folder
from graft.storage.lazy_tensors import LazyTensor, Output, blocks, check_fit, size_bytes
from graft.storage.npz import write_npz
from graft.storage.safetensors import write_safetensors

import mlx.core as mx
import mlx.nn as nn

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
WRITERS = {
    "npz": ("weights.npz", write_npz),
    "safetensors": ("model.safetensors", write_safetensors),
}
Tensors = dict[str, LazyTensor]


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk."""

    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    tokenizer: list[Path]


@dataclass
class Report:
    """What a conversion did."""

    file: Path
    parameters: int
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch-path", metavar="DIR", help="Meta folder: consolidated.*.pth and params.json")
    add("--hf-path", metavar="DIR_OR_REPO", help="Hugging Face folder, or repository on the Hub")
    add("--mlx-path", metavar="OUT", default="mlx_model", help="folder to write (mlx_model)")
    add("--format", choices=WRITERS, default="npz", help="file format of the weights (npz)")
    add("--dtype", choices=DTYPES, help="type to cast to; without it tensors keep their own")
    add("-q", "--quantize", action="store_true", help="quantize as mlx-lm does")
    add("--q-bits", type=int, metavar="N", help=f"bits a weight, one of {_listed(BITS)} (4)")
    add("--q-group-size", type=int, metavar="N", help=f"one of {_listed(GROUP_SIZES)} (64)")
    add(
        "--q-skip",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers to leave whole: names or globs",
    )
    add("--force", action="store_true", help="replace OUT if it exists")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says, and print a summary."""
    args = vars(build_parser().parse_args(argv))
    report = convert(
        args.pop("mlx_path"),
        file_format=args.pop("format"),
        show_progress=sys.stderr.isatty(),
        **args,
    )
    print_report(report)
    return 0


def convert(
    mlx_path: str | Path,
    *,
    torch_path: str | Path | None = None,
    hf_path: str | Path | None = None,
    file_format: str = "npz",
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_skip: Sequence[str] = (),
    force: bool = False,
    show_progress: bool = False,
) -> Report:
    """Write the folder `mlx_path` with weights, config.json and the tokenizer's files.

    Args:
        mlx_path: the folder to make; it appears whole or not at all.
        torch_path: a Meta folder.
        hf_path: a Hugging Face folder or repository; give one of the two.
        file_format: "npz" or "safetensors".
        dtype: "float16", "bfloat16" or "float32" to cast to; `None` keeps what there is.
        quantize: quantize the layers that mlx-lm quantizes.
        q_bits: bits a weight, 4 by default.
        q_group_size: weights that share a scale and a bias, 64 by default.
        q_skip: names or globs of layers to leave whole.
        force: replace `mlx_path`.
        show_progress: draw a bar on standard error.

    Raises:
        InputError: the checkpoint, the settings or the place to write are at fault.
    """
    started = time.perf_counter()
    if not quantize and (q_bits is not None or q_group_size is not None or q_skip):
        raise InputError("--q-bits, --q-group-size and --q-skip need -q")
    settings = quantization_settings(q_bits, q_group_size) if quantize else None
    out = Path(os.path.abspath(mlx_path))
    check_free(out, replace=force)
    source = open_source(torch_path, hf_path)
    _check_replaceable(out, source.folder)
    with new_folder(out, replace=force) as folder, _without_buffer_cache():
        report = write_model(
            source,
            folder,
            file_format=file_format,
            dtype=DTYPES[dtype] if dtype else None,
            settings=settings,
            q_skip=q_skip,
            show_progress=show_progress,
        )
    report.file = Path(mlx_path) / report.file.name
    report.seconds = time.perf_counter() - started
    return report


def open_source(torch_path: str | Path | None, hf_path: str | Path | None) -> Source:
    """Find the configuration and the tensors of a checkpoint; no weight is read yet.

    Raises:
        InputError: not one of both is given, or the checkpoint is missing, incomplete or damaged.
    """
    if (torch_path is None) == (hf_path is None):
        raise InputError("give one of --torch-path (Meta's layout) and --hf-path (Hugging Face's)")
    if hf_path is not None:
        folder = find_folder(hf_path, option="--hf-path", weights=CONVERTIBLE)
        if has_meta_layout(folder):
            raise InputError(f"{folder} has Meta's layout; use --torch-path {folder}")
        config, tensors = open_hugging_face_folder(folder)
        return Source(folder, config, tensors, find_tokenizer(folder))
    folder = Path(str(torch_path))
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; --torch-path takes a Meta checkpoint's")
    if has_hugging_face_layout(folder):
        raise InputError(f"{folder} has Hugging Face's layout; use --hf-path {folder}")
    config, tensors = open_meta_folder(folder)
    # Meta's own download keeps one tokenizer beside the folders of all sizes.
    tokenizer = find_tokenizer(folder, fallback=folder.parent / "tokenizer.model")
    return Source(folder, config, tensors, tokenizer)


def write_model(
    source: Source,
    folder: Path,
    *,
    file_format: str,
    dtype: mx.Dtype | None,
    settings: Quantization | None,
    q_skip: Sequence[str],
    show_progress: bool,
) -> Report:
    """Write weights, config.json and tokenizer of `source` into an empty folder.

    Raises:
        InputError: an unknown architecture, tensors that do not fit it, or a quantized checkpoint
            that is to be quantized.
    """
    from mlx_lm.utils import save_config

    config, tensors = source.config, source.tensors
    if kind := quantizer_of(config):
        if settings:
            raise InputError(f"{source.folder} is quantized already, by {kind}; omit -q")
        if is_foreign(config):
            config, tensors = open_foreign(source.folder, config)
    model = build_model(config)
    parameters = sum(array.size for array in parameters_of(model).values())
    staged = folder / "staged.safetensors"
    tensors, notes = under_mlx_names(model, tensors, staged, place=str(source.folder))
    if "quantization" in config:
        quantize_as_saved(model, config["quantization"], cast(Any, tensors))
    check_fit(parameters_of(model), tensors, str(source.folder))
    layers: dict[str, Quantization] = {}
    if settings:
        layers, kept = quantize(model, settings, q_skip)
        notes += kept
        differing = {path: layer for path, layer in layers.items() if layer != settings}
        config = config | {"quantization": settings | differing}
    before = sum(map(size_bytes, tensors.values()))
    outputs = plan(model, tensors, layers, dtype)
    after = sum(output.size_bytes for output in outputs)
    save_weights(folder, outputs, file_format, show_progress=show_progress)
    staged.unlink(missing_ok=True)
    if dtype is not None:
        # transformers 5 writes `dtype` and reads both; mlx-lm reads the older name.
        names = {"torch_dtype", "dtype"} & {"torch_dtype", *config}
        config = config | dict.fromkeys(names, str(dtype).removeprefix("mlx.core."))
    towers = getattr(model, "model", {})
    save_config(dict(config), folder / "config.json", keep_vision_config="vision_tower" in towers)
    copy_files(source.tokenizer, folder)
    return Report(folder / WRITERS[file_format][0], parameters, before, after, notes=notes)


def plan(
    model: nn.Module,
    tensors: Tensors,
    layers: dict[str, Quantization],
    dtype: mx.Dtype | None,
) -> list[Output]:
    """What to write for each tensor. Empties `tensors`, so that what is written can be let go.

    Args:
        model: the architecture; it may keep some tensors from being cast.
        tensors: under mlx-lm's names.
        layers: settings of the layers to quantize, by path.
        dtype: to cast to, or `None` to keep what there is.
    """
    castable = getattr(model, "cast_predicate", None) or (lambda name: True)
    outputs: list[Output] = []
    for name in list(tensors):
        tensor = tensors.pop(name)
        target = tensor.dtype
        if mx.issubdtype(target, mx.floating) and dtype is not None and castable(name):
            target = dtype
        elif target == mx.float64:
            target = mx.float32  # MLX computes in float64 on the CPU only.
        path, _, kind = name.rpartition(".")
        if path in layers and kind == "weight":
            outputs += _quantized(path, tensor, target, layers[path])
        else:
            outputs.append(Output(name, target, tensor.shape, _cast(tensor, target)))
    return outputs


def _cast(tensor: LazyTensor, dtype: mx.Dtype) -> Iterator[mx.array]:
    for block in blocks(tensor):
        yield block if block.dtype == dtype else block.astype(dtype, stream=mx.cpu)


def _quantized(path: str, tensor: LazyTensor, dtype: mx.Dtype, layer: Quantization) -> list[Output]:
    """A layer's packed weight, scales and biases; groups lie within rows, so blocks of rows do."""

    def pack(block: mx.array) -> Sequence[mx.array]:
        group_size, bits, mode = layer["group_size"], layer["bits"], layer["mode"]
        return mx.quantize(block, group_size=group_size, bits=bits, mode=mode)

    # Written after the weight, which fills them as it goes.
    names = ("weight", "scales", "biases")
    kept: dict[str, list[mx.array]] = {name: [] for name in names}

    def weight() -> Iterator[mx.array]:
        for block in _cast(tensor, dtype):
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


def save_weights(
    folder: Path, outputs: Sequence[Output], file_format: str, *, show_progress: bool = False
) -> None:
    """Write the outputs in order into the folder's weight file."""
    from rich.console import Console
    from rich.progress import Progress

    file_name, write = WRITERS[file_format]
    total = sum(output.size_bytes for output in outputs)
    with Progress(console=Console(stderr=True), disable=not show_progress, transient=True) as bar:
        task = bar.add_task("writing", total=total)

        def counted(blocks_of_one: Iterator[mx.array]) -> Iterator[mx.array]:
            for block in blocks_of_one:
                yield block
                bar.advance(task, block.nbytes)

        write(folder / file_name, [o._replace(blocks=counted(o.blocks)) for o in outputs])


def print_report(report: Report) -> None:
    """Print what a conversion did, as a table and notes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "before", "after"):
        table.add_column(title, justify="right" if title else "left")
    sizes = (report.bytes_before, report.bytes_after)
    table.add_row("parameters", *(f"{report.parameters:,}",) * 2)
    table.add_row("size", *(f"{size / 1e6:,.1f} MB" for size in sizes))
    table.add_row("bits a weight", *(f"{8 * size / report.parameters:.2f}" for size in sizes))
    table.add_row("seconds", "", f"{report.seconds:.1f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"wrote {report.file}", markup=False)
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False)


def _check_replaceable(out: Path, source: Path) -> None:
    """Keep --force from deleting the checkpoint, the ground it stands on, or what is no model."""
    for path, meaning in ((source.resolve(), "the checkpoint"), (Path.cwd(), "the current folder")):
        if out.resolve() in (path, *path.parents):
            raise InputError(f"--mlx-path {out} is or holds {meaning}; name another place")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise InputError(f"{out} holds no model (no config.json), so --force does not replace it")


@contextmanager
def _without_buffer_cache() -> Iterator[None]:
    """Let MLX give freed buffers back at once; it would keep some of every size that occurs."""
    limit = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


if __name__ == "__main__":
    sys.exit(main())
