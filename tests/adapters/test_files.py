import json
import math
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import (
    Adapter,
    adapter_tensors,
    apply_adapter,
    layer_configs,
)
from graft.adapters.attach import attach, lora_layers
from graft.adapters.factors import factors_of
from graft.adapters.files import load_adapter, save_adapter
from graft.adapters.formats import RECORD_NAME
from graft.adapters.formats import graft as graft_format
from graft.adapters.formats.graft import write_adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import EMBEDDING, LINEAR
from graft.adapters.targets import plan
from graft.errors import InputError
from graft.pretrained.load import read_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.tiny import LLAMA, make_model, write_model

TOKENS = mx.array([[1, 5, 9, 300, 7, 2]])
BOTH = ["adapters.npz", "adapters.safetensors"]
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.2.mlp.up_proj"


def paths_of(model: nn.Module) -> list[str]:
    """Every linear layer of the blocks."""
    return [p for p, m in model.named_modules() if p.endswith("_proj") and "layers." in p]


def make_adapted(*, settings: dict[str, LayerConfig] | None = None) -> nn.Module:
    """A model whose adapter changes what it says."""
    model = make_model(LLAMA)
    attach(model, settings or dict.fromkeys(sorted(paths_of(model)), LayerConfig(4, 6.0)))
    for number, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(number)) * 0.2
    model.eval()
    return model


def save(path: Path, model: nn.Module) -> Path:
    save_adapter(path, model, base_model="tiny", options={"rank": 4})
    return path


def apply(path: Path) -> nn.Module:
    model = make_model(LLAMA)
    apply_adapter(model, load_adapter(path), name=str(path))
    model.eval()
    return model


def change_record(path: Path, **changes: Any) -> None:
    file = path.with_name(RECORD_NAME)
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: v for key, v in content.items() if v != "gone"}))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        apply(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", BOTH)
def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = make_adapted()
    expected = model(TOKENS)
    path = save(tmp_path / name, model)
    tensors = load_adapter(path).tensors
    saved = adapter_tensors(model)
    assert tensors.keys() == saved.keys()
    for key, array in saved.items():
        assert tensors[key].dtype == array.dtype and mx.array_equal(tensors[key], array)
    again = apply(path)
    assert mx.array_equal(again(TOKENS), expected)
    assert not mx.array_equal(make_model(LLAMA)(TOKENS), expected)


@pytest.mark.parametrize("name", BOTH)
def test_an_adapter_comes_back_over_a_quantized_base(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "base", bits=3)
    model, _ = read_model(folder)
    attach(model, dict.fromkeys(paths_of(model), LayerConfig(4, 6.0)))
    for _, layer in lora_layers(model):
        layer.lora_b = mx.ones_like(layer.lora_b) * 0.05
    model.eval()
    path = save(tmp_path / name, model)
    again, _ = read_model(folder)
    apply_adapter(again, load_adapter(path), name=name)
    again.eval()
    assert mx.array_equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", BOTH)
def test_the_file_holds_a_and_b_under_the_names_of_mlx_lm_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    model = make_adapted()
    tensors = load_adapter(save(tmp_path / name, model)).tensors
    expected = {f"{path}.{half}" for path in paths_of(make_model(LLAMA)) for half in ("a", "b")}
    assert set(tensors) == {name.replace("_proj.", "_proj.lora_") for name in expected}
    assert tensors[f"{UP}.lora_a"].shape == (64, 4)
    assert tensors[f"{UP}.lora_b"].shape == (4, 128)


def test_the_record_tells_base_model_ranks_alphas_and_options(tmp_path: Path) -> None:
    settings = {Q: LayerConfig(4, 6.0), UP: LayerConfig(8, 12.0)}
    model = make_adapted(settings=settings)
    save_adapter(
        tmp_path / "adapters.npz",
        model,
        base_model="tiny",
        dropout=0.25,
        options={"rank": 4, "model": None},
    )
    content = json.loads((tmp_path / RECORD_NAME).read_text())
    assert (content["format"], content["format_version"]) == ("graft", 1)
    assert (content["base_model"], content["dropout"]) == ("tiny", 0.25)
    assert content["options"] == {"rank": 4, "model": None}
    assert content["layers"].keys() == settings.keys()
    assert (content["layers"][UP]["rank"], content["layers"][UP]["alpha"]) == (8, 12.0)
    adapter = load_adapter(tmp_path / "adapters.npz")
    facts = (adapter.layers, adapter.base_model, adapter.dropout, adapter.options)
    assert facts == (layer_configs(model), "tiny", 0.25, content["options"])


def test_layers_of_different_ranks_and_alphas_come_back(tmp_path: Path) -> None:
    model = make_adapted(settings={Q: LayerConfig(2, 6.0), UP: LayerConfig(8, 1.0)})
    again = apply(save(tmp_path / "adapters.npz", model))
    assert {path: (layer.rank, layer.alpha) for path, layer in lora_layers(again)} == {
        Q: (2, 6.0),
        UP: (8, 1.0),
    }
    assert mx.array_equal(again(TOKENS), model(TOKENS))


def test_dropout_comes_back(tmp_path: Path) -> None:
    model = make_adapted()
    save_adapter(tmp_path / "adapters.npz", model, dropout=0.5)
    again = apply(tmp_path / "adapters.npz")
    again.train()
    assert not mx.array_equal(again(TOKENS), again(TOKENS))


def in_mlx_lm(folder: Path) -> nn.Module:
    """What mlx-lm makes of an adapter's folder."""
    from mlx_lm.tuner.utils import load_adapters

    model = load_adapters(make_model(LLAMA), str(folder))
    model.eval()
    return model


def test_a_safetensors_folder_loads_in_mlx_lm_as_it_is(tmp_path: Path) -> None:
    model = make_adapted()
    save(tmp_path / "adapters.safetensors", model)
    logits = np.array(in_mlx_lm(tmp_path)(TOKENS))
    np.testing.assert_allclose(logits, np.array(model(TOKENS)), atol=1e-5)


def test_a_folder_of_some_layers_loads_in_mlx_lm_as_it_is(tmp_path: Path) -> None:
    model = make_adapted(settings={Q: LayerConfig(4, 6.0), UP: LayerConfig(4, 6.0)})
    save(tmp_path / "adapters.safetensors", model)
    logits = np.array(in_mlx_lm(tmp_path)(TOKENS))
    np.testing.assert_allclose(logits, np.array(model(TOKENS)), atol=1e-5)


def test_differing_ranks_at_one_scale_are_not_taken_by_mlx_lm_for_one_rank(tmp_path: Path) -> None:
    model = make_adapted(settings={Q: LayerConfig(4, 6.0), UP: LayerConfig(8, 12.0)})
    save(tmp_path / "adapters.safetensors", model)
    with pytest.raises((ValueError, AttributeError)):
        in_mlx_lm(tmp_path)


def test_differing_scales_are_not_taken_by_mlx_lm_for_one_scale(tmp_path: Path) -> None:
    # mlx-lm knows one scale: it must not load such a folder and compute something else.
    model = make_adapted(settings={Q: LayerConfig(4, 6.0), UP: LayerConfig(4, 12.0)})
    save(tmp_path / "adapters.safetensors", model)
    with pytest.raises((ValueError, AttributeError)):
        in_mlx_lm(tmp_path)


def test_layers_that_the_model_lacks_are_all_named(tmp_path: Path) -> None:
    path = save(tmp_path / "adapters.npz", make_adapted())
    small = make_model({**LLAMA, "num_hidden_layers": 2})
    with pytest.raises(InputError) as error:
        apply_adapter(small, load_adapter(path), name=str(path))
    text = str(error.value)
    assert f"adapter {path} does not fit the model: " in text
    names = [path for path in paths_of(make_model(LLAMA)) if "layers.2" in path]
    assert len(names) == 7 and all(name in text for name in names)
    assert "layers.1" not in text


def test_tensors_of_other_shapes_are_all_named(tmp_path: Path) -> None:
    path = save(tmp_path / "adapters.npz", make_adapted())
    wide = make_model({**LLAMA, "intermediate_size": 96})
    with pytest.raises(InputError) as error:
        apply_adapter(wide, load_adapter(path), name="mine")
    text = str(error.value)
    assert f"{UP}.lora_b has shape (4, 128), the model needs (4, 96)" in text
    # Three projections in three blocks touch the width; one side of each.
    assert text.count("has shape") == 9
    assert "q_proj" not in text


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "adapters.npz", make_adapted())
    tensors = load_adapter(path).tensors
    tensors["model.layers.0.other.lora_a"] = tensors.pop(f"{Q}.lora_a")
    del tensors[f"{UP}.lora_b"]
    mx.savez(str(path), **tensors)
    text = refusal(path)
    assert f"{Q}.lora_a is missing" in text and f"{UP}.lora_b is missing" in text
    assert "model.layers.0.other.lora_a belongs to no adapted layer" in text


def test_a_model_that_an_adapter_does_not_fit_stays_the_base_model(tmp_path: Path) -> None:
    path = save(tmp_path / "adapters.npz", make_adapted())
    wide = make_model({**LLAMA, "intermediate_size": 96})
    before = dict(wide.named_modules())
    expected = wide(TOKENS)
    with pytest.raises(InputError):
        apply_adapter(wide, load_adapter(path), name="mine")
    assert all(module is before[name] for name, module in wide.named_modules())
    assert mx.array_equal(wide(TOKENS), expected)


def test_applying_an_adapter_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    model = apply(save(tmp_path / "adapters.npz", make_adapted()))
    expected = dict(tree_flatten(make_model(LLAMA).parameters()))
    bases = {f"{path}.weight": layer.base.weight for path, layer in lora_layers(model)}
    assert len(bases) == 21
    assert all(mx.array_equal(array, expected[name]) for name, array in bases.items())


def test_a_missing_adapter_tells_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "adapters.npz"
    assert refusal(path) == f"there is no adapter {path}; train one with --train, or name another"


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "adapters.safetensors", make_adapted())
    (tmp_path / RECORD_NAME).unlink()
    expected = f"{path} does not say what it is, and {tmp_path / RECORD_NAME} is missing"
    assert refusal(path) == expected


@pytest.mark.parametrize("name", ["adapters.bin", "adapters", "adapters.npz.gz", "adapters.NPY"])
def test_another_suffix_is_refused_on_writing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"the name must end in \.npz or \.safetensors"):
        save(tmp_path / name, make_adapted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_a_damaged_adapter_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = save(tmp_path / name, make_adapted())
    path.write_bytes(content)
    assert f"{path} is damaged or incomplete" in refusal(path)


@pytest.mark.parametrize("name", BOTH)
def test_a_truncated_adapter_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, make_adapted())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert f"{path} is damaged or incomplete" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "peft"}, "is not a record of Graft"),
        ({"format_version": 99}, "has format_version 99; this Graft reads 1"),
        ({"format_version": "gone"}, "has format_version None"),
        ({"layers": "gone"}, "'layers'"),
        ({"layers": [Q]}, RECORD_NAME),
        ({"layers": {Q: 4}}, RECORD_NAME),
        ({"layers": {Q: {"rank": 4}}}, "'alpha'"),
        ({"layers": {Q: {"rank": "4", "alpha": 6.0}}}, "rank '4'"),
        ({"layers": {Q: {"rank": 4, "alpha": "six"}}}, "alpha 'six'"),
        ({"layers": {Q: {"rank": 4.5, "alpha": 6.0}}}, "rank 4.5"),
        ({"layers": {Q: {"rank": 0, "alpha": 6.0}}}, "rank 0"),
        ({"layers": {Q: {"rank": 4, "alpha": 6.0, "kind": "nope"}}}, "nope"),
        ({"layers": {Q: {"rank": 4, "alpha": 6.0, "method": "nope"}}}, "nope"),
        ({"layers": {}}, "belongs to no adapted layer"),
        ({"dropout": "gone"}, "'dropout'"),
        ({"dropout": "much"}, "dropout"),
        ({"dropout": 1.5}, "dropout"),
        ({"base_model": "gone"}, "'base_model'"),
    ],
)
def test_a_record_that_tells_nonsense_is_refused(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    path = save(tmp_path / "adapters.npz", make_adapted())
    change_record(path, **changes)
    assert expected in refusal(path)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"lora_b": mx.full((4, 64), math.nan)}, f"{Q}.lora_b holds numbers that are not finite"),
        ({"lora_b": None}, f"{Q}.lora_b is missing"),
        ({"lora_a": mx.zeros((64, 3))}, f"{Q}: lora_a (64, 3) and lora_b (4, 64) are not of rank"),
        ({"lora_a": None, "lora_b": None}, f"{Q}.lora_a is missing"),
        ({"foo.lora_a": mx.zeros((2, 2))}, f"{Q}.foo.lora_a belongs to no adapted layer"),
    ],
)
def test_tensors_that_contradict_the_record_are_named_without_a_model(
    tmp_path: Path, tensors: dict[str, Any], expected: str
) -> None:
    model = make_adapted(settings={Q: LayerConfig(4, 6.0)})
    changed = {f"{Q}.{name}": array for name, array in tensors.items()}
    kept = {n: a for n, a in (adapter_tensors(model) | changed).items() if a is not None}
    write_adapter(tmp_path / "adapters.npz", Adapter(kept, layer_configs(model)))
    with pytest.raises(InputError, match="do not agree") as error:
        load_adapter(tmp_path / "adapters.npz")
    assert expected in str(error.value)


def test_a_record_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "adapters.npz", make_adapted())
    (tmp_path / RECORD_NAME).write_text("{")
    assert f"{tmp_path / RECORD_NAME} is not valid JSON" in refusal(path)


@pytest.mark.parametrize("name", BOTH)
def test_a_save_that_fails_leaves_the_old_adapter(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / name, make_adapted())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {name, RECORD_NAME}

    def fail(file: str, *arguments: Any, **arrays: Any) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(graft_format, "write_npz", fail)
    monkeypatch.setattr(graft_format.mx, "save_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        save(path, make_adapted(settings={Q: LayerConfig(2, 2.0)}))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_save_replaces_the_old_adapter_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "adapters.npz", make_adapted())
    other = make_adapted(settings={Q: LayerConfig(2, 2.0)})
    save(path, other)
    assert {file.name for file in path.parent.iterdir()} == {"adapters.npz", RECORD_NAME}
    assert mx.array_equal(apply(path)(TOKENS), other(TOKENS))


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save(tmp_path / "file" / "adapters.npz", make_adapted())


def test_the_record_tells_the_layers_of_the_model_itself(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapters.npz", make_adapted(settings={Q: LayerConfig(2, 2.0)}))
    record = load_adapter(tmp_path / "adapters.npz")
    assert list(record.layers) == [Q]


PHI3: dict[str, Any] = {**LLAMA, "model_type": "phi3"}


def test_a_record_of_ranks_and_alphas_alone_is_of_lora(tmp_path: Path) -> None:
    """As the first records were, before there were methods and kinds."""
    model = make_adapted()
    path = save(tmp_path / "adapters.npz", model)
    old = {p: {"rank": s.rank, "alpha": s.alpha} for p, s in layer_configs(model).items()}
    change_record(path, layers=old)
    assert mx.array_equal(apply(path)(TOKENS), model(TOKENS))
    assert load_adapter(path).layers[Q] == LayerConfig(4, 6.0, "lora")


def test_the_parts_of_a_fused_projection_come_back(tmp_path: Path) -> None:
    model = make_model(PHI3)
    settings = plan(model, "qkv_proj.q,qkv_proj.v,o_proj", rank=2)
    attach(model, settings)
    save_adapter(tmp_path / "adapters.npz", model)
    adapter = load_adapter(tmp_path / "adapters.npz")
    path = "model.layers.0.self_attn.qkv_proj"
    assert adapter.layers[path].parts == settings[path].parts
    assert adapter.layers[path].kind == "fused"
    assert adapter.tensors[f"{path}.lora_a"].shape == (64, 4)
    assert adapter.tensors[f"{path}.lora_b"].shape == (2, 64 + 32)
    fresh = make_model(PHI3)
    apply_adapter(fresh, adapter, name="a")
    assert layer_configs(fresh) == layer_configs(model)


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "olora"])
def test_a_and_b_and_scale_can_be_had_without_a_model(method: str, tmp_path: Path) -> None:
    model = make_model(LLAMA)
    attach(model, plan(model, "q_proj,embed_tokens", rank=4, alpha=6.0, method=method))
    for _, layer in lora_layers(model):
        layer.lora_b = layer.lora_b + 0.1
    save_adapter(tmp_path / "adapters.npz", model)
    adapter = load_adapter(tmp_path / "adapters.npz")
    factors = factors_of(adapter, holder="a", kinds=(LINEAR, EMBEDDING))
    layers = dict(lora_layers(model))
    assert set(factors) == set(layers)
    for path, factor in factors.items():
        layer = layers[path]
        product = factor.scale * factor.a @ factor.b
        delta = layer.delta() if factor.kind is EMBEDDING else layer.delta().T
        assert factor.kind.name == layer.kind and factor.scale == layer.scale
        assert mx.allclose(product, delta, atol=1e-5)


def test_layers_that_are_more_than_a_product_are_all_named(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    settings = {
        **plan(model, "q_proj,model.norm"),
        **plan(model, "k_proj", method="dora"),
        **plan(model, "v_proj", method="ia3"),
    }
    attach(model, settings)
    save_adapter(tmp_path / "adapters.npz", model)
    adapter = load_adapter(tmp_path / "adapters.npz")
    with pytest.raises(InputError) as error:
        factors_of(adapter, holder="a", kinds=(LINEAR,))
    said = str(error.value)
    assert "model.norm (lora, a vector)" in said and "q_proj" not in said
    assert said.count("(dora)") == said.count("(ia3)") == 3
    alone = Adapter(adapter.tensors, {Q: adapter.layers[Q], UP: LayerConfig(1, 1.0)})
    with pytest.raises(InputError, match=r"lacks .*up_proj\.lora_a, .*up_proj\.lora_b"):
        factors_of(alone, holder="a", kinds=(LINEAR,))


def test_several_methods_in_one_adapter_come_back(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    settings = {
        **plan(model, "q_proj", method="pissa"),
        **plan(model, "k_proj", method="dora"),
        **plan(model, "v_proj", method="vera"),
        **plan(model, "o_proj", method="full"),
        **plan(model, "down_proj", method="ia3"),
        **plan(model, "*norm*", method="norm"),
    }
    attach(model, settings)
    for _, layer in lora_layers(model):
        for name in layer.tensors():
            layer[name] = layer[name] + 0.05
    path = tmp_path / "adapters.safetensors"
    save_adapter(path, model)
    model.eval()
    assert mx.array_equal(apply(path)(TOKENS), model(TOKENS))
    assert not mx.allclose(model(TOKENS), make_model(LLAMA)(TOKENS), atol=1e-2)


def test_loading_into_merged_layers_runs_the_loaded_ones(tmp_path: Path) -> None:
    model = make_adapted()
    layer = dict(lora_layers(model))[Q]
    tensors = {name: array + 0.1 for name, array in layer.tensors().items()}
    layer.merge()
    x = mx.ones((1, 64))
    merged = layer(x)
    layer.load(tensors)
    assert not mx.allclose(layer(x), merged, atol=1e-3)
    assert mx.array_equal(layer.lora_a, tensors["lora_a"])
