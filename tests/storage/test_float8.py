"""8-bit floats: values by the definition of the formats; scales stay beside their bytes."""

import json
import struct
from pathlib import Path

from graft.errors import InputError
from graft.pretrained.lazy_model import open_base
from graft.pretrained.load import read_model
from graft.storage.float8 import with_decoded_floats
from graft.storage.lazy_tensors import read
from graft.storage.safetensors import open_safetensors

import mlx.core as mx
import numpy as np
import pytest

from support.tiny import LLAMA, write_model

Q = "model.layers.0.self_attn.q_proj.weight"


def write_bytes(file: Path, **tensors: tuple[str, np.ndarray]) -> None:
    """A safetensors file of single bytes under the given types."""
    header, start = {}, 0
    for name, (dtype, codes) in tensors.items():
        offsets = [start, start + codes.size]
        header[name] = {"dtype": dtype, "shape": list(codes.shape), "data_offsets": offsets}
        start += codes.size
    text = json.dumps(header).encode()
    data = b"".join(codes.astype(np.uint8).tobytes() for _, codes in tensors.values())
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def value(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """IEEE 754's value of a finite code: sign, exponent, mantissa."""
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if code >> 7 else 1.0
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias)
    return sign * (1 + mantissa) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(
    ("kind", "bits", "special"),
    [
        ("F8_E4M3", (4, 3), {0x7F, 0xFF}),
        ("F8_E5M2", (5, 2), {*range(0x7C, 0x80), *range(0xFC, 256)}),
    ],
)
def test_every_finite_code_has_its_value(
    kind: str, bits: tuple[int, int], special: set[int], tmp_path: Path
) -> None:
    write_bytes(tmp_path / "a.safetensors", a=(kind, np.arange(256)))
    tensor = with_decoded_floats(open_safetensors(tmp_path / "a.safetensors"))["a"]
    found = read(tensor).astype(mx.float32).tolist()
    finite = sorted(set(range(256)) - special)
    assert [found[code] for code in finite] == [value(code, *bits) for code in finite]
    assert not any(np.isfinite(found[code]) for code in special)


def test_bytes_with_scales_are_left_to_the_architecture(tmp_path: Path) -> None:
    codes = np.full((2, 2), 0x38)
    write_bytes(
        tmp_path / "a.safetensors",
        **{"x.weight": ("F8_E4M3", codes), "x.weight_scale_inv": ("F8_E8M0", codes[:1, :1])},
    )
    tensors = with_decoded_floats(open_safetensors(tmp_path / "a.safetensors"))
    assert tensors["x.weight"].dtype == mx.uint8


def quantized_projection(folder: Path, kind: str) -> np.ndarray:
    """A tiny model whose first q has 8-bit numbers of a type, in a shard of its own."""
    write_model(folder, LLAMA)
    arrays = mx.load(str(folder / "model.safetensors"))
    shape = arrays.pop(Q).shape
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    codes = np.random.default_rng(0).integers(0, 0x30, shape)
    write_bytes(folder / "model-q.safetensors", **{Q: (kind, codes)})
    return codes


@pytest.mark.parametrize(("kind", "bits"), [("F8_E4M3", (4, 3)), ("F8_E5M2", (5, 2))])
def test_a_model_with_8_bit_floats_has_their_values(
    kind: str, bits: tuple[int, int], tmp_path: Path
) -> None:
    codes = quantized_projection(tmp_path / "m", kind)
    expected = np.vectorize(lambda code: value(code, *bits))(codes)
    model, _ = read_model(tmp_path / "m")
    loaded = model.model.layers[0].self_attn.q_proj.weight
    np.testing.assert_array_equal(np.array(loaded.astype(mx.float32)), expected)
    with open_base(tmp_path / "m", tmp_path) as base:
        lazy = read(base.tensors[Q])
    np.testing.assert_array_equal(np.array(lazy.astype(mx.float32)), expected)


def test_integers_in_place_of_floats_are_refused(tmp_path: Path) -> None:
    quantized_projection(tmp_path / "m", "I8")
    with pytest.raises(InputError, match=rf"{Q} has type int8, which is not a float"):
        read_model(tmp_path / "m")
    with pytest.raises(InputError, match="has type int8"), open_base(tmp_path / "m", tmp_path):
        pass
