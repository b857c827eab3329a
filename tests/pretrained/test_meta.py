"""Meta's layout: names, sizes and shards, or all that is wrong with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.folder import read_folder
from graft.pretrained.meta import open_meta_folder
from graft.storage.lazy_tensors import read

import numpy as np
import pytest

from support import torch_zip

PARAMS = {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": -1}


def tensors(**changes: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """One layer in Meta's layout, 8 wide, with 12 hidden units and 10 tokens."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (10, 8),
        "norm": (8,),
        "output": (10, 8),
        "layers.0.attention_norm": (8,),
        "layers.0.ffn_norm": (8,),
        **{f"layers.0.attention.{name}": (8, 8) for name in ("wq", "wk", "wv", "wo")},
        "layers.0.feed_forward.w1": (12, 8),
        "layers.0.feed_forward.w2": (8, 12),
        "layers.0.feed_forward.w3": (12, 8),
        **changes,
    }
    generator = np.random.default_rng(0)
    return {
        f"{name}.weight": generator.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(folder: Path, *shards: Mapping[str, np.ndarray[Any, Any]], **params: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for index, shard in enumerate(shards):
        torch_zip.save(folder / f"consolidated.{index:02}.pth", shard)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as refusal:
        open_meta_folder(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_sizes_that_params_json_leaves_out_come_from_the_shapes(tmp_path: Path) -> None:
    config, _ = open_meta_folder(write(tmp_path, tensors(), ffn_dim_multiplier=1.3))
    assert config["intermediate_size"] == 12
    assert config["vocab_size"] == 10
    assert config["num_key_value_heads"] == 2
    assert config["tie_word_embeddings"] is False


def test_a_head_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    untied = tensors()
    del untied["output.weight"]
    config, found = open_meta_folder(write(tmp_path / "absent", untied))
    assert config["tie_word_embeddings"] is True
    # The same, with both names over one storage.
    raw = np.arange(80, dtype=np.float32).tobytes()
    names = ("tok_embeddings.weight", "output.weight")
    entries = [torch_zip.view(name, (10, 8), elements=80) for name in names]
    hidden = torch_zip.view("layers.0.feed_forward.w1.weight", (10, 8), elements=80)
    folder = write(tmp_path / "shared")
    pickled = torch_zip.dictionary(*entries, hidden)
    torch_zip.write(folder / "consolidated.00.pth", pickled, {"0": raw})
    config, found = open_meta_folder(folder)
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in found


@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["llama3", "llama2"])
def test_shards_join_to_the_whole(tmp_path: Path, embedding_axis: int) -> None:
    whole = tensors()
    axes = dict.fromkeys(whole, 0)
    axes |= {f"layers.0.{name}.weight": 1 for name in ("attention.wo", "feed_forward.w2")}
    axes["tok_embeddings.weight"] = embedding_axis
    shards = [
        {
            name: array if array.ndim == 1 else np.split(array, 2, axes[name])[index].copy()
            for name, array in whole.items()
        }
        for index in range(2)
    ]
    config, found = open_meta_folder(write(tmp_path / "split", *shards))
    expected_config, expected = open_meta_folder(write(tmp_path / "whole", whole))
    assert config == expected_config
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read(found[name]), read(tensor), err_msg=name)
        for row in range(tensor.shape[0]):
            np.testing.assert_array_equal(found[name].rows(row, row + 1), tensor.rows(row, row + 1))


def test_everything_wrong_with_the_shards_is_named(tmp_path: Path) -> None:
    first, second = tensors(), tensors(**{"layers.0.attention.wk": (4, 6)})
    del second["norm.weight"]
    second["layers.0.attention.wq.lora.weight"] = np.zeros((1, 1), np.float32)
    second["output.weight"] = second["output.weight"].astype(np.float16)
    error = refused(write(tmp_path, first, second))
    assert "norm.weight is missing in consolidated.01.pth" in error
    assert "layers.0.attention.wq.lora.weight is not part of Meta's layout" in error
    assert "layers.0.attention.wk.weight do not fit together: (8, 8) mlx.core.float32, (4," in error
    assert "output.weight do not fit together" in error


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors(), tensors(), tensors())
    (folder / "consolidated.01.pth").unlink()
    assert "lacks consolidated.01.pth" in refused(folder)


def test_experts_that_differ_in_shape_are_refused(tmp_path: Path) -> None:
    names = [f"layers.0.feed_forward.experts.{index}.w1" for index in range(2)]
    shapes = {names[0]: (12, 8), names[1]: (10, 8)}
    error = refused(write(tmp_path, tensors(**shapes), moe={"num_experts": 2}))
    assert "experts of model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight differ" in error


def test_experts_stack_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shapes = {f"layers.0.feed_forward.experts.{index}.w1": (12, 8) for index in range(11)}
    arrays = tensors(**shapes)
    folder = write(tmp_path, dict(reversed(arrays.items())), moe={"num_experts": 11})
    config, found = read_folder(folder)
    stacked = found["model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight"]
    expected = [arrays[f"layers.0.feed_forward.experts.{i}.w1.weight"] for i in range(11)]
    np.testing.assert_array_equal(stacked, expected)
    assert config["model_type"] == "mixtral"


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, None),
        ({"use_scaled_rope": True}, 8.0),
        ({"use_scaled_rope": True, "dim": 2048}, 32.0),
        ({"use_scaled_rope": True, "dim": 2048, "rope_scaling_factor": 16}, 16.0),
    ],
    ids=["llama3", "llama3.1", "llama3.2", "said"],
)
def test_scaled_rotary_embeddings_of_each_generation(
    tmp_path: Path, params: dict[str, Any], expected: float | None
) -> None:
    # The factors are those of Meta's Llama 3.1 and 3.2 releases on the Hub.
    config, _ = open_meta_folder(write(tmp_path, tensors(), **params))
    assert config.get("rope_scaling", {}).get("factor") == expected


def test_all_that_is_wrong_in_params_json_is_named(tmp_path: Path) -> None:
    error = refused(write(tmp_path, dim=None, n_heads=0, vocab_size="many", moe=[], norm_eps=None))
    assert "dim is missing, vocab_size is 'many', moe is [], n_heads is 0" in error
