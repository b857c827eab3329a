"""Adapters of the MLX LoRA example: an npz file with A and B, and no record of anything else.

Until January 2024 the example named layers as Meta does and scaled every update by 2; since then it
names them as Hugging Face does and scales by 20.

Reference: https://github.com/ml-explore/mlx-examples/tree/main/lora
"""

from dataclasses import replace
from pathlib import Path

from graft.adapters.adapter import Adapter
from graft.adapters.factors import factors_at_scale, from_factors, paired
from graft.adapters.formats import Format, register_format
from graft.errors import InputError
from graft.pretrained.architectures import INTERLEAVED
from graft.pretrained.meta import path_from_meta
from graft.storage.tensor_file import read_tensor_file

OLD_SCALE, NEW_SCALE = 2.0, 20.0
_SUFFIXES = {".lora_a": "a", ".lora_b": "b"}


def read_npz(path: Path, *, alpha: float | None = None) -> Adapter:
    """An npz file without a record, of either generation.

    Args:
        path: the file.
        alpha: numerator of the scale; by default the scale is the one of the file's generation.

    Raises:
        InputError: the file is damaged, or not an adapter.
    """
    pairs, unknown = paired(read_tensor_file(path), _SUFFIXES)
    if unknown:
        raise InputError(f"{path} has tensors other than lora_a and lora_b: {', '.join(unknown)}")
    if not pairs:
        raise InputError(f"{path} holds no lora_a and lora_b")
    old = any(name.startswith("layers.") or path_from_meta(name) != name for name in pairs)
    scale = OLD_SCALE if old else NEW_SCALE
    factors = {}
    for name, halves in pairs.items():
        path_of_layer = path_from_meta(name)
        layer = factors_at_scale(path_of_layer, halves, scale)
        factors[path_of_layer] = layer if alpha is None else replace(layer, alpha=alpha)
    ranks = sorted({layer.rank for layer in factors.values() if layer.b.ndim > 1})
    assumed = f"scale {scale:g}, the default then" if alpha is None else f"alpha {alpha:g}"
    generation = "before 2024, with Meta's names" if old else "since 2024"
    note = (
        f"{path} has no record: read as the MLX example's ({generation}), rank "
        f"{', '.join(map(str, ranks))} from the shapes, {assumed}"
    )
    return from_factors(factors, rotary=INTERLEAVED if old else None, notes=(note,))


register_format(
    Format(
        name="npz",
        files=("adapters.npz",),
        # Other formats' zip files have a record beside them.
        recognizes=lambda start, config: (
            start.startswith(b"PK") and not {"format", "peft_type"} & config.keys()
        ),
        read=lambda path, alpha: read_npz(path, alpha=alpha),
    )
)
