"""graft/adapters/formats: the way between any two formats, and files that are broken."""

import json
import random
import re
import resource
import struct
import time
from pathlib import Path

import graft  # noqa: F401
from graft.adapters import formats
from graft.adapters.adapter import apply_adapter
from graft.adapters.files import load_adapter
from graft.adapters.formats import FORMATS, detect_format, find_file
from graft.adapters.layer_config import LayerConfig
from graft.errors import InputError
from graft.exporting.adapter import export

import mlx.core as mx
import numpy as np
import pytest

from support.adapter_cases import (
    BASE,
    DOWN,
    FORMS,
    METADATA,
    SHAPES,
    K,
    Q,
    deltas,
    embedding_adapter,
    ggla,
    gguf,
    half_layer,
    logits,
    make_adapter,
    old_npz,
    refusal,
    write,
)
from support.paths import ROOT
from support.tiny import LLAMA, make_model


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_every_pair_of_forms_round_trips_bit_for_bit(
    first: str, second: str, tmp_path: Path
) -> None:
    adapter = make_adapter()
    once = load_adapter(write(first, adapter, tmp_path / "1"))
    twice = load_adapter(write(second, once, tmp_path / "2"))
    assert twice.layers.keys() == SHAPES.keys()
    assert {(s.rank, s.alpha) for s in twice.layers.values()} == {(4, 6.0)}
    back = load_adapter(write("mlx-lm", twice, tmp_path / "3"))
    assert back.tensors.keys() == adapter.tensors.keys()
    for name, array in adapter.tensors.items():
        assert mx.array_equal(back.tensors[name], array), name
    np.testing.assert_array_equal(logits(twice), logits(adapter))


@pytest.mark.parametrize("form", FORMS)
def test_ranks_alphas_and_rslora_that_differ_come_through_to_rounding(
    form: str, tmp_path: Path
) -> None:
    settings = {
        Q: LayerConfig(2, 6.0),
        K: LayerConfig(8, 5.0),
        DOWN: LayerConfig(4, 3.0, "rslora"),
    }
    adapter = make_adapter(settings)
    found = deltas(load_adapter(write(form, adapter, tmp_path)))
    for path, delta in deltas(adapter).items():
        np.testing.assert_allclose(found[path], delta, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["peft", "gguf", "mlx-lm"])
def test_an_embedding_beside_its_own_head_goes_through(form: str, tmp_path: Path) -> None:
    adapter = embedding_adapter(LLAMA)
    again = load_adapter(write(form, adapter, tmp_path))
    np.testing.assert_array_equal(logits(again), logits(adapter))


@pytest.mark.parametrize(
    ("form", "settings", "named"),
    [
        ("peft", {Q: LayerConfig(1, 1.0, "vera"), K: LayerConfig(4, 6.0)}, f"{Q} (vera)"),
        ("mlx-lm", {Q: LayerConfig(1, 1.0, "ia3"), K: LayerConfig(4, 6.0)}, f"{Q} (ia3)"),
        ("gguf", {Q: LayerConfig(4, 6.0, "dora"), K: LayerConfig(4, 6.0)}, f"{Q} (dora)"),
        ("gguf", {Q: LayerConfig(1, 1.0, "full"), K: LayerConfig(1, 1.0, "bias")}, f"{K} (bias)"),
        ("gguf", {DOWN: LayerConfig(1, 1.0, "norm", "vector")}, f"{DOWN} (norm, a vector)"),
        ("mlx-lm", {Q: LayerConfig(4, 6.0, "merge-first", "weight")}, f"{Q} (of kind weight)"),
    ],
)
def test_what_a_form_cannot_hold_is_named(
    form: str, settings: dict[str, LayerConfig], named: str, tmp_path: Path
) -> None:
    assert named in refusal(lambda: write(form, make_adapter(settings), tmp_path))


@pytest.mark.parametrize("form", ["mlx-lm", "peft", "gguf"])
def test_an_output_that_exists_is_kept_without_force(form: str, tmp_path: Path) -> None:
    place = write(form, make_adapter(), tmp_path)
    assert "--force" in refusal(lambda: write(form, make_adapter(), tmp_path))
    export(make_adapter(), place, to=form, base=BASE, force=True)


@pytest.mark.parametrize("form", ["mlx-lm", "peft"])
def test_halves_that_are_missing_and_numbers_that_are_none_are_named(
    form: str, tmp_path: Path
) -> None:
    folder = write(form, make_adapter(), tmp_path)
    file = find_file(folder)
    tensors = mx.load(str(file))
    name = next(name for name in tensors if K in name and name.endswith(("lora_b", "B.weight")))
    mx.save_safetensors(str(file), {n: a for n, a in tensors.items() if n != name})
    assert f"{K} has no B" in refusal(lambda: load_adapter(folder)).replace("base_model.model.", "")
    mx.save_safetensors(str(file), {**tensors, name: tensors[name] * mx.array(float("nan"))})
    assert f"{K}: B holds numbers that are not finite" in refusal(lambda: load_adapter(folder))
    mx.save_safetensors(str(file), {**tensors, name: tensors[name].astype(mx.int32)})
    assert "int32" in refusal(lambda: load_adapter(folder))
    mx.save_safetensors(str(file), {**tensors, name: tensors[name][:, :3][:3]})
    assert f"{K}: A of shape" in refusal(lambda: load_adapter(folder))


def test_the_wrong_base_model_is_named(tmp_path: Path) -> None:
    folder = write("peft", make_adapter(), tmp_path)
    adapter = load_adapter(folder)
    wide = make_model({**LLAMA, "intermediate_size": 96})
    text = refusal(lambda: apply_adapter(wide, adapter, name="mine"))
    assert f"{DOWN}.lora_a has shape (128, 4), the model needs (96, 4)" in text


def test_folders_and_files_that_tell_nothing_are_named(tmp_path: Path) -> None:
    assert "holds no adapter" in refusal(lambda: load_adapter(tmp_path))
    (tmp_path / "adapters.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert "does not say what it is" in refusal(lambda: load_adapter(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"x": 1}')
    assert "no adapter that Graft knows" in refusal(lambda: load_adapter(tmp_path))
    (tmp_path / "adapters.npz").write_bytes(b"")
    assert "name one of them" in refusal(lambda: load_adapter(tmp_path))


def sample(form: str, folder: Path) -> Path:
    """A small file of a form, with what belongs beside it; returns the file."""
    if form == "ggla":
        folder.mkdir(parents=True)
        tensors = half_layer()
        content = {
            "blk.0.attn_v.weight.loraA": tensors["blk.0.attn_v.weight.lora_a"].T.copy(),
            "blk.0.attn_v.weight.loraB": tensors["blk.0.attn_v.weight.lora_b"],
        }
        (folder / "a.bin").write_bytes(ggla(content))
        return folder / "a.bin"
    if form == "old npz":
        folder.mkdir(parents=True)
        old_npz(folder / "adapters.npz")
        return folder / "adapters.npz"
    return find_file(write(form, make_adapter(), folder))


EVERY = [*FORMS, "ggla", "old npz"]


def outcome(path: Path) -> str:
    """What loading says: nothing, or one line; anything but an InputError is a failure."""
    try:
        load_adapter(path)
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("form", EVERY)
def test_truncated_files_are_named_in_one_line(form: str, tmp_path: Path) -> None:
    path = sample(form, tmp_path / "f")
    whole = path.read_bytes()
    for length in {*range(0, 64), *range(64, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert str(path) in outcome(path), length


@pytest.mark.parametrize("form", EVERY)
def test_fuzzed_files_give_one_line_quickly_and_little_memory(form: str, tmp_path: Path) -> None:
    path = sample(form, tmp_path / "f")
    whole, rng = path.read_bytes(), random.Random(form)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            # The head and the tail of a file are where its sizes stand.
            place = rng.choice((rng.randrange(len(whole)), rng.randrange(min(400, len(whole)))))
            content[rng.choice((place, -1 - place))] = rng.choice((0, 1, 127, 128, 255))
        path.write_bytes(content)
        refused += bool(outcome(path))
    assert refused > 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert time.perf_counter() - start < 120


def bomb(form: str, folder: Path) -> Path:
    """A small file whose header tells of terabytes."""
    folder.mkdir()
    path = folder / "adapters.safetensors"
    (folder / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "lora_parameters": {"scale": 1}}'
    )
    huge = 1 << 40
    if form == "safetensors":
        entry = {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}
        header = json.dumps({f"{Q}.lora_a": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
    elif form == "safetensors header":
        path.write_bytes(struct.pack("<Q", huge) + b"{}")
    elif form == "safetensors nesting":
        path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    elif form == "safetensors overlap":
        entry = {"dtype": "F32", "shape": [250_000], "data_offsets": [0, 1_000_000]}
        header = json.dumps({f"{n}.lora_a": entry for n in range(5000)}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1_000_000))
    elif form == "gguf list":
        path.write_bytes(
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"k"
            + struct.pack("<IIQ", 9, 0, huge)
        )
    elif form == "gguf counts":
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, huge, huge) + bytes(64))
    elif form == "gguf shape":
        content = gguf(half_layer(), METADATA)
        told = struct.pack("<2Q", 64, 2)
        path.write_bytes(content.replace(told, struct.pack("<2Q", huge, huge)))
    elif form == "ggla shape":
        name = b"blk.0.attn_v.weight.loraA"
        start = struct.pack("<IIii", 0x67676C61, 1, 2, 6) + struct.pack("<iii", 2, len(name), 0)
        path.write_bytes(start + struct.pack("<2i", 2**31 - 1, 2**31 - 1) + name)
    elif form == "npz shape":
        import io
        import zipfile

        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (huge,)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{Q}.lora_a.npy", header.getvalue())
    else:
        np.savez_compressed(path.with_suffix(".npz"), **{f"{Q}.lora_a": np.zeros((64, 1_000_000))})
        return path.with_suffix(".npz")
    return path


@pytest.mark.parametrize(
    "form",
    [
        *("safetensors", "safetensors header", "safetensors nesting", "safetensors overlap"),
        *("gguf list", "gguf counts", "gguf shape", "ggla shape", "npz shape", "npz bomb"),
    ],
)
def test_headers_that_lie_take_neither_time_nor_memory(form: str, tmp_path: Path) -> None:
    path = bomb(form, tmp_path / "f")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert "damaged or incomplete" in outcome(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert time.perf_counter() - start < 10


def test_content_tells_the_form_whatever_the_name(tmp_path: Path) -> None:
    for form, name in (("gguf", "gguf"), ("ggla", "ggla"), ("old npz", "npz")):
        path = sample(form, tmp_path / form)
        odd = path.rename(path.with_name("thing.dat"))
        assert detect_format(odd).name == name
        assert outcome(odd) == ""


@pytest.mark.parametrize("form", EVERY)
def test_a_file_is_recognized_by_one_format_alone(form: str, tmp_path: Path) -> None:
    path = sample(form, tmp_path / "f")
    record = path.with_name(formats.RECORD_NAME)
    config = json.loads(record.read_text()) if record.is_file() else {}
    start = path.read_bytes()[:4]
    by_magic = [f.name for f in FORMATS.values() if f.magic and start.startswith(f.magic)]
    by_record = [f.name for f in FORMATS.values() if f.recognizes(start, config)]
    assert (by_magic or by_record) == [detect_format(path).name]
    assert len(by_magic or by_record) == 1


TOY = """
import json
from graft.adapters.adapter import Adapter
from graft.adapters.formats import Format, Usage, register_format
from graft.adapters.layer_config import LayerConfig
import mlx.core as mx

def write_toy(adapter, out, *, base=None, force=False):
    out.write_text("TOY!" + json.dumps({n: a.tolist() for n, a in adapter.tensors.items()}))
    return ["written as text"]

def read_toy(path, alpha):
    tensors = {n: mx.array(a) for n, a in json.loads(path.read_text()[4:]).items()}
    layers = {n.rpartition(".")[0]: LayerConfig(4, alpha or 4.0) for n in tensors}
    return Adapter(tensors, layers)

register_format(
    Format(
        name="toy", files=("*.toy",), magic=b"TOY!", read=read_toy, write=write_toy,
        suffix=".toy", usage=Usage("Toy", "toy", "run {file}"),
    )
)
"""


def test_a_new_format_takes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))
    formats.import_formats()
    adapter = make_adapter()
    assert export(adapter, tmp_path / "a.toy", to="toy") == ["written as text"]
    again = load_adapter(tmp_path, alpha=6.0)
    assert again.layers == adapter.layers
    assert all(mx.array_equal(again.tensors[n], array) for n, array in adapter.tensors.items())


def test_the_page_lists_every_format_and_whether_it_is_written() -> None:
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| yes \| (yes)? ?\|$", text, re.MULTILINE)
    written = {name: bool(yes) for name, yes in rows}
    assert written == {name: format.write is not None for name, format in FORMATS.items()}
