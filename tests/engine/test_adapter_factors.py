"""What the bank takes of an adapter file, and what it refuses, by name."""

from pathlib import Path

from graft.adapters.adapter import Adapter
from graft.adapters.formats.graft import write_adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.rotary import interleave
from graft.cli.export import main as export
from graft.engine.adapter_factors import (
    BankFactors,
    check_bank_rank,
    make_factors,
    read_factors,
    width_of,
)
from graft.engine.errors import AdapterDoesNotFit, AdapterNotFound, RankTooLarge
from graft.errors import InputError

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.fast_cases import ARCHITECTURES, SMALL
from support.served import make_adapter, write
from support.tiny import LLAMA, make_model, write_model

Q = "model.layers.0.self_attn.q_proj"


def read(path: Path, model: nn.Module) -> BankFactors:
    return read_factors(path, model, dict(model.named_modules()))


def make(adapter: Adapter, model: nn.Module) -> BankFactors:
    return make_factors(adapter, model, dict(model.named_modules()), name="a")


@pytest.mark.parametrize(
    "rank, width", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (64, 64), (65, 128)]
)
def test_the_width_is_the_next_power_of_two(rank: int, width: int) -> None:
    assert width_of(rank) == width


def test_factors_are_padded_and_hold_the_scale() -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="q_proj", rank=3, alpha=12.0)
    factors = make(adapter, model)
    a, b = factors.layers[Q]
    assert (factors.rank, factors.width, a.shape, b.shape) == (3, 8, (64, 8), (8, 64))
    assert np.array_equal(a[:, :3], np.array(adapter.tensors[f"{Q}.lora_a"])) and not a[:, 3:].any()
    assert np.array_equal(b[:3], 4 * np.array(adapter.tensors[f"{Q}.lora_b"])) and not b[3:].any()
    assert factors.paths == frozenset(adapter.layers)


def test_equal_content_has_one_digest_and_other_content_another() -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="q_proj", rank=3)
    other = make_adapter(model, targets="q_proj", rank=3, alpha=1.0)
    assert make(adapter, model).digest == make(adapter, model).digest
    assert make(adapter, model).digest != make(other, model).digest


@pytest.mark.parametrize("form", ["mlx-lm", "peft", "gguf"])
def test_every_format_gives_the_same_factors(form: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    model = make_model(LLAMA)
    folder = write(tmp_path / "own", make_adapter(model, targets="q_proj,up_proj", rank=4))
    name = "a.gguf" if form == "gguf" else "a"
    places = ["--model", str(base), "--out", str(tmp_path / name)]
    assert export([str(folder), "--to", form, *places]) == 0
    own, theirs = read(folder, model), read(tmp_path / name, model)
    assert own.paths == theirs.paths
    for path in own.paths:
        for mine, other in zip(own.layers[path], theirs.layers[path], strict=True):
            assert np.allclose(mine, other, atol=1e-6)


def test_rows_of_q_in_another_order_are_put_into_the_model_s() -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="q_proj", rank=4)
    moved = {n: interleave(a, 4) if n.endswith("lora_b") else a for n, a in adapter.tensors.items()}
    theirs = make(Adapter(moved, adapter.layers, rotary="interleaved"), model)
    own = make(adapter, model)
    assert np.array_equal(theirs.layers[Q][1], own.layers[Q][1])


def test_an_adapter_of_another_base_is_refused_with_every_tensor() -> None:
    narrow = make_model({**LLAMA, "hidden_size": 32})
    adapter = make_adapter(narrow, targets="q_proj,down_proj", rank=2)
    with pytest.raises(AdapterDoesNotFit) as error:
        make(adapter, make_model(LLAMA))
    assert str(error.value).count("q_proj.lora_a has shape (32, 2), the model needs (64, 2)") == 3
    assert str(error.value).count("down_proj.lora_b has shape (2, 32)") == 3


def test_layers_that_the_model_lacks_are_named() -> None:
    adapter = make_adapter(make_model({**LLAMA, "num_hidden_layers": 4}), targets="q_proj")
    with pytest.raises(AdapterDoesNotFit, match=r"no adaptable layer model\.layers\.3\.self_attn"):
        make(adapter, make_model(LLAMA))


@pytest.mark.parametrize(
    "targets, method, said",
    [
        ("model.norm", "lora", r"model\.norm \(vector\)"),
        ("q_proj", "dora", r"layers\.2\.self_attn\.q_proj \(dora\)"),
        ("q_proj", "merge-first", r"layers\.2\.self_attn\.q_proj \(weight\)"),
    ],
)
def test_what_rows_cannot_have_of_their_own_is_named(targets: str, method: str, said: str) -> None:
    model = make_model({**SMALL, "model_type": "mixtral", **ARCHITECTURES["mixtral"]})
    paths = [
        path
        for path, _ in model.named_modules()
        if path.endswith(targets) and path.startswith("model.")
    ]
    adapter = Adapter({}, {path: LayerConfig(1, 4.0, method) for path in paths})
    with pytest.raises(AdapterDoesNotFit, match=said):
        make(adapter, model)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = make_model(LLAMA)
    adapter = make_adapter(model, targets="q_proj")
    b = adapter.tensors[f"{Q}.lora_b"]
    adapter.tensors[f"{Q}.lora_b"] = mx.full(b.shape, mx.inf)
    with pytest.raises(AdapterDoesNotFit, match=r"layers\.0\.self_attn\.q_proj has values"):
        make(adapter, model)


def test_a_rank_above_the_limit_is_told_with_it() -> None:
    model = make_model(LLAMA)
    factors = make(make_adapter(model, targets="q_proj", rank=9), model)
    check_bank_rank(factors, 9, name="wide")
    with pytest.raises(RankTooLarge, match="adapter wide has rank 9 and the limit is 8"):
        check_bank_rank(factors, 8, name="wide")


def test_no_file_is_not_found_and_a_damaged_one_is_said_to_be(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    with pytest.raises(AdapterNotFound, match=r"no adapter at .*nothing"):
        read(tmp_path / "nothing", model)
    folder = tmp_path / "torn"
    folder.mkdir()
    adapter = make_adapter(model, targets="q_proj")
    write_adapter(folder / "adapters.safetensors", adapter)
    whole = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        read(folder, model)
