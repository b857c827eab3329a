"""PyTorch's files are read exactly, or refused with a reason; nothing in them runs."""

import io
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.lazy_tensors import blocks, read
from graft.storage.torch_file import open_torch_file

import mlx.core as mx
import numpy as np
import pytest

from support import torch_zip

ELEVEN = np.arange(11, dtype=np.float32)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as refusal:
        open_torch_file(path)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def one_view(path: Path, raw: bytes = ELEVEN.tobytes(), **wrong: Any) -> Path:
    """A file whose tensor `w` is (2, 3) of eleven numbers, but for what is `wrong`."""
    view = {"shape": (2, 3), "elements": 11, **wrong}
    return torch_zip.write(path, torch_zip.dictionary(torch_zip.view("w", **view)), {"0": raw})


@pytest.mark.reference
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64", "int64", "uint8"])
def test_a_file_of_torch_reads_bit_for_bit(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    tensor = (torch.randn(37, 5) * 50).to(getattr(torch, name))
    torch.save({"w": tensor, "scalar": tensor[3, 2].clone()}, tmp_path / "c.pth")
    found = open_torch_file(tmp_path / "c.pth")
    for key, expected in {"w": tensor, "scalar": tensor[3, 2]}.items():
        assert found[key].shape == tuple(expected.shape)
        assert str(found[key].dtype) == f"mlx.core.{name}"
        bits = np.asarray(read(found[key]).reshape(-1).view(mx.uint8)).tobytes()
        assert bits == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.reference
def test_views_and_shared_storages_of_torch_read_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(60.0).reshape(6, 10)
    views = {
        "base": base,
        "same": base,
        "transposed": base.T,
        "rows": base[2:5],
        "every_other_column": base[:, 1::2],
        "expanded": base[:1].expand(4, 10),
        "cube": base.reshape(3, 2, 10).permute(2, 0, 1),
        "empty": torch.empty(0, 4),
    }
    torch.save(views, tmp_path / "c.pth")
    assert (tmp_path / "c.pth").stat().st_size < 5000, "torch saved the storage more than once"
    found = open_torch_file(tmp_path / "c.pth")
    assert found["base"] == found["same"]
    for key, expected in views.items():
        for size in (1, 24, 1 << 20):
            monkeypatch.setattr("graft.storage.lazy_tensors.BLOCK_BYTES", size)
            parts = [np.array(part) for part in blocks(found[key])]
            joined = np.concatenate(parts) if parts else np.empty(found[key].shape)
            np.testing.assert_array_equal(joined, expected.numpy(), err_msg=f"{key}, {size}")


@pytest.mark.reference
def test_a_state_dict_with_parameters_and_metadata_reads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "state.pth")
    torch.save(dict(layer.named_parameters()) | {"step": 3}, tmp_path / "parameters.pth")
    for name in ("state.pth", "parameters.pth"):
        found = open_torch_file(tmp_path / name)
        assert set(found) == {"weight", "bias"}
        np.testing.assert_array_equal(read(found["weight"]), layer.weight.detach().numpy())


def test_a_file_reads_without_torch(tmp_path: Path) -> None:
    arrays = {"a": ELEVEN.reshape(1, 11), "b": np.array([1, -2], np.int64)}
    found = open_torch_file(torch_zip.save(tmp_path / "c.pth", arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(read(found[name]), array)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict.__init__"),
    ],
)
def test_code_in_a_pickle_is_refused_and_does_not_run(
    tmp_path: Path, module: str, name: str
) -> None:
    code = torch_zip.call(module, name, f"touch {tmp_path}/ran")
    pickled = torch_zip.dictionary(torch_zip.entry("w", code))
    message = refused(torch_zip.write(tmp_path / "c.pth", pickled, {}))
    assert f"{module}.{name}" in message
    assert "refused" in message
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_change_what_a_view_points_at(tmp_path: Path) -> None:
    # BUILD ("b") sets attributes on what was made before it; here on the tensor.
    attack = torch_zip.view("w", (2, 3), elements=11) + b"}(" + torch_zip.entry("offset", b"L9L\n")
    path = torch_zip.write(
        tmp_path / "c.pth", torch_zip.dictionary(attack + b"ub"), {"0": ELEVEN.tobytes()}
    )
    assert "data.pkl cannot be read" in refused(path)


# A tuple that holds itself twice, 60 levels deep: 2**60 to hash or to print.
NESTED = b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60


@pytest.mark.parametrize(
    "pickled",
    [
        torch_zip.dictionary(NESTED + b"K\x02"),
        torch_zip.dictionary(NESTED + torch_zip.entry("w", b"")),
        torch_zip.dictionary(torch_zip.entry("w", NESTED + b"Q")),
        b"\x80\x04\x8f(" + NESTED + b"\x90.",  # a set
        b"\x80\x02" + NESTED + b".",
        b"\x80\x02ccollections\nOrderedDict\n]" + NESTED + b"K\x02\x86a\x85R.",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # the memo's last index
        b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00.",  # a bytearray of 2**48 bytes
        b"\x80\x02" + b"(" * 100_000 + b".",
    ],
    ids=["key", "name", "storage", "set", "root", "dict", "memo", "bytes", "marks"],
)
def test_a_pickle_does_not_decide_how_long_it_takes(tmp_path: Path, pickled: bytes) -> None:
    refused(torch_zip.write(tmp_path / "c.pth", pickled, {}))


def test_a_view_that_repeats_a_number_too_often_is_refused(tmp_path: Path) -> None:
    path = one_view(tmp_path / "c.pth", shape=(2**30, 2**30), strides=(0, 0))
    assert "bytes of tensors in a file of" in refused(path)
    assert "the shape" in refused(one_view(tmp_path / "c.pth", shape=(2**31, 0), strides=(1, 1)))


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    path = torch_zip.save(tmp_path / "c.pth", {"w": np.zeros(1000, np.float32)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += [archive.getinfo("archive/data/0")] * 100
        archive._didModify = True  # type: ignore[attr-defined]
    assert "bytes in a file of" in refused(path)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"offset": 6}, "reaches beyond its storage"),
        ({"strides": (9, 1)}, "reaches beyond its storage"),
        ({"offset": -1}, "not a valid view"),
        ({"strides": (-3, 1)}, "not a valid view"),
        ({"strides": (3,)}, "not a valid view"),
        ({"key": "1"}, "missing or cut off"),
        ({"elements": 12}, "missing or cut off"),
        ({"storage": "HalfStorage"}, "missing or cut off"),
        ({"storage": "NoSuchStorage"}, "torch.NoSuchStorage"),
    ],
)
def test_a_view_outside_its_storage_is_refused(
    tmp_path: Path, wrong: dict[str, Any], reason: str
) -> None:
    assert reason in refused(one_view(tmp_path / "c.pth", **wrong))


def test_a_sound_view_at_the_very_end_of_its_storage_reads(tmp_path: Path) -> None:
    found = open_torch_file(one_view(tmp_path / "c.pth", offset=5))
    np.testing.assert_array_equal(read(found["w"]), ELEVEN[5:].reshape(2, 3))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = torch_zip.save(tmp_path / "c.pth", {"w": ELEVEN}).read_bytes()
    for length in (1, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        assert re.search("truncated|does not begin", refused(tmp_path / "cut.pth"))


def test_a_changed_byte_in_a_weight_is_found(tmp_path: Path) -> None:
    raw = bytearray(torch_zip.save(tmp_path / "c.pth", {"w": ELEVEN}).read_bytes())
    raw[raw.index(ELEVEN.tobytes()) + 5] ^= 1
    (tmp_path / "c.pth").write_bytes(raw)
    assert "checksum of archive/data/0" in refused(tmp_path / "c.pth")


def test_other_formats_are_named_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"rest")
    assert "legacy format" in refused(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "tar format" in refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "does not begin like a zip file" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.npy", b"")
    assert "holds 0 data.pkl" in refused(path)
    torch_zip.write(path, torch_zip.dictionary(), {}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)
    assert "is missing" in refused(tmp_path / "none.pth")


@pytest.mark.reference
def test_the_legacy_format_of_a_real_torch_is_recognised(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2)}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    assert "legacy format" in refused(tmp_path / "c.pth")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    archive = torch_zip.write(tmp_path / "c.pth", torch_zip.dictionary(), {})
    with zipfile.ZipFile(archive, "a") as members:
        members.writestr("archive/constants.pkl", b"")
    assert "TorchScript" in refused(archive)


def test_a_pickle_without_tensors_by_name_says_what_it_holds(tmp_path: Path) -> None:
    nested = torch_zip.dictionary(
        torch_zip.entry("model", b"}"), torch_zip.entry("epoch", b"L3L\n")
    )
    assert "its keys: model, epoch" in refused(torch_zip.write(tmp_path / "a.pth", nested, {}))
    assert "holds a list" in refused(torch_zip.write(tmp_path / "b.pth", b"\x80\x02].", {}))
    assert "data.pkl cannot be read" in refused(
        torch_zip.write(tmp_path / "c.pth", b"\x80\x02", {})
    )


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", torch_zip.dictionary())
        archive.writestr("c/byteorder", "big")
    assert "big-endian" in refused(path)
