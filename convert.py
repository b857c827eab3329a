"""Convert PyTorch or Hugging Face weights to an MLX model, quantized or not.

    python convert.py --torch-path llama-2-7b --mlx-path llama-q4 -q
    python convert.py --hf-path Qwen/Qwen2-0.5B --mlx-path qwen --format safetensors

The tensors are read, converted and written a few rows at a time, so a model may be larger than
memory: `graft.pretrained.convert` does this, and `graft.quantization.choose` says which layers are
quantized.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from graft.cli.command import Parser, command
from graft.console import bytes_text, say, table
from graft.errors import InputError
from graft.pretrained.convert import (
    DTYPES,
    WEIGHT_WRITERS,
    Conversion,
    convert_checkpoint,
    open_source_model,
)
from graft.quantization.choose import (
    BITS,
    DEFAULT_BITS,
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    choose_quantized_layers,
    quantization_settings,
)
from graft.storage.atomic import check_free, new_folder


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--torch-path",
        metavar="DIR",
        help="Meta folder with consolidated.*.pth and params.json",
    )
    add("--hf-path", metavar="DIR_OR_REPO", help="Hugging Face folder, or owner/name on the Hub")
    add("--mlx-path", "--out", metavar="DIR", default="mlx_model", help="folder to write")
    add("--format", choices=WEIGHT_WRITERS, default="npz", help="file format of the weights")
    add("--dtype", choices=DTYPES, help="cast the weights (default: the checkpoint's own types)")
    add("-q", "--quantize", action="store_true", help="quantize the layers that mlx-lm quantizes")
    add(
        "--q-bits",
        type=int,
        metavar="N",
        help=f"bits per weight: {_listed(BITS)} (default: {DEFAULT_BITS})",
    )
    add(
        "--q-group-size",
        type=int,
        metavar="N",
        help="number of weights that share a scale and a bias: "
        f"{_listed(GROUP_SIZES)} (default: {DEFAULT_GROUP_SIZE})",
    )
    add(
        "--q-skip",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers not to quantize: names or globs, such as lm_head or 'layers.0.*'",
    )
    add("--force", action="store_true", help="replace the model in the folder, if there is one")
    return parser


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert according to the command line, and print a summary."""
    args = vars(build_parser().parse_args(argv))
    out = args.pop("mlx_path")
    report = convert(
        out,
        file_format=args.pop("format"),
        show_progress=sys.stderr.isatty(),
        **args,
    )
    print_report(report)
    # Without --model, `lora.py` takes the included model.
    program = "python lora.py" if Path(sys.argv[0]).name == "convert.py" else "graft lora"
    say(f"train on it: {program} --train --model {shlex.quote(out)}")
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
) -> Conversion:
    """Write the folder `mlx_path` with weights, config.json and the tokenizer's files.

    Args:
        mlx_path: the folder to make; it appears whole or not at all.
        torch_path: a folder in Meta's layout.
        hf_path: a Hugging Face folder or repository; give one of the two.
        file_format: "npz" or "safetensors".
        dtype: "float16", "bfloat16" or "float32" to cast to; `None` keeps the checkpoint's types.
        quantize: quantize the layers that mlx-lm quantizes.
        q_bits: bits per weight, 4 by default.
        q_group_size: weights that share a scale and a bias, 64 by default.
        q_skip: names or globs of layers not to quantize.
        force: replace `mlx_path`.
        show_progress: draw a progress bar on standard error.

    Raises:
        InputError: the checkpoint, the settings or the folder to write are invalid.
    """
    started = time.perf_counter()
    choose = None
    if quantize:
        settings = quantization_settings(q_bits, q_group_size)
        choose = partial(choose_quantized_layers, settings=settings, skip=q_skip)
    elif q_bits is not None or q_group_size is not None or q_skip:
        raise InputError("--q-bits, --q-group-size and --q-skip need -q")
    out = Path(os.path.abspath(mlx_path))
    check_free(out, replace=force)
    source = open_source_model(torch_path, hf_path)
    _check_replaceable(out, source.folder)
    with new_folder(out, replace=force) as folder:
        report = convert_checkpoint(
            source,
            folder,
            file_format=file_format,
            dtype=dtype,
            quantize=choose,
            show_progress=show_progress,
        )
    seconds = time.perf_counter() - started
    return replace(report, file=Path(mlx_path) / report.file.name, seconds=seconds)


def _check_replaceable(out: Path, checkpoint: Path) -> None:
    """Keep --force from deleting the checkpoint, the current folder, or what is not a model."""
    kept = {checkpoint: "the checkpoint", Path.cwd(): "the current folder"}
    real_out = Path(os.path.realpath(out))  # unlike resolve(), accepts a loop of links
    for path, meaning in kept.items():
        real = Path(os.path.realpath(path))
        if real_out in (real, *real.parents):
            raise InputError(f"--mlx-path {out} is or holds {meaning}; name another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise InputError(f"{out} holds no model (no config.json), so --force does not replace it")


def print_report(report: Conversion) -> None:
    """Print what a conversion wrote, as a table and notes."""
    sizes = (report.bytes_before, report.bytes_after)
    rows = [
        ("parameters", *(f"{report.parameters:,}",) * 2),
        ("size", *map(bytes_text, sizes)),
        ("bits per weight", *(f"{8 * size / report.parameters:.2f}" for size in sizes)),
        ("seconds", "", f"{report.seconds:.1f}"),
    ]
    say(f"wrote {report.file}")
    say(table(("", "before", "after"), rows, right=("before", "after")))
    for note in report.notes:
        say(note)


if __name__ == "__main__":
    sys.exit(main())
