import graft  # noqa: F401
from graft.adapters.attach import attach, count_parameters, detach, lora_layers
from graft.adapters.layer_config import LayerConfig
from graft.adapters.targets import block_paths, choose_layers
from graft.errors import InputError
from models import LoRALinear

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from support.tiny import LLAMA, QWEN2, make_model

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
LINEAR = [*(f"self_attn.{name}" for name in ATTENTION), "mlp.down_proj", "mlp.gate_proj"]
TOKENS = mx.array([[1, 5, 9, 300, 7, 2]])
SETTING = LayerConfig(rank=4, alpha=8.0)


def quantized(bits: int, group_size: int, mode: str = "affine") -> nn.Module:
    model = make_model({**LLAMA, "hidden_size": 128, "num_hidden_layers": 2})
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    return model


def attach_all(model: nn.Module, *, seed: int = 0) -> nn.Module:
    attach(model, dict.fromkeys(choose_layers(model), SETTING), seed=seed)
    return model


def fill_b(model: nn.Module) -> None:
    """Give every B values, as training would."""
    for number, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(number)) * 0.1


def frozen_bytes(model: nn.Module) -> dict[str, bytes]:
    """The base's parameters, by their names in the base."""
    return {
        name.replace(".linear.", "."): bytes(memoryview(array.view(mx.uint8)))
        for name, array in tree_flatten(model.parameters())
        if not name.endswith(("lora_a", "lora_b"))
    }


def test_step_zero_has_the_logits_of_the_base_model_bit_for_bit() -> None:
    for config in (LLAMA, QWEN2):
        model = make_model(config)
        expected = model(TOKENS)
        assert mx.array_equal(attach_all(model)(TOKENS), expected)
        assert len(lora_layers(model)) == 21


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [
        *((bits, size, "affine") for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)),
        (4, 32, "mxfp4"),
        (4, 16, "nvfp4"),
        (8, 32, "mxfp8"),
    ],
)
def test_step_zero_over_a_quantized_model_has_its_logits_bit_for_bit(
    bits: int, group_size: int, mode: str
) -> None:
    model = quantized(bits, group_size, mode)
    expected = model(TOKENS)
    assert mx.array_equal(attach_all(model)(TOKENS), expected)
    assert len(lora_layers(model)) == 14


def test_only_the_adapter_is_trained() -> None:
    model = attach_all(make_model(LLAMA))
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    expected = {f"{p}.{half}" for p in choose_paths() for half in ("lora_a", "lora_b")}
    assert names == expected


def choose_paths() -> list[str]:
    return choose_layers(make_model(LLAMA))


@pytest.mark.parametrize("bits", [None, 3])
def test_an_optimizer_step_leaves_the_base_byte_for_byte(bits: int | None) -> None:
    model = make_model(LLAMA) if bits is None else quantized(bits, 32)
    mx.eval(model.parameters())
    before = frozen_bytes(model)
    attach_all(model)

    def loss(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    start, gradients = nn.value_and_grad(model, loss)(model, TOKENS)
    optimizer = optim.Adam(learning_rate=1e-2)
    optimizer.update(model, gradients)
    mx.eval(model.parameters())
    assert loss(model, TOKENS).item() < start.item()
    assert frozen_bytes(model) == before


def test_detach_puts_the_very_same_modules_back() -> None:
    model = make_model(LLAMA)
    before = dict(model.named_modules())
    expected = model(TOKENS)
    attach_all(model)
    fill_b(model)
    assert not mx.array_equal(model(TOKENS), expected)
    detach(model)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[path] is before[path] for path in before)
    assert mx.array_equal(model(TOKENS), expected)


def test_attach_holds_the_very_same_base_modules() -> None:
    model = make_model(LLAMA)
    before = dict(model.named_modules())
    attach_all(model)
    assert all(layer.base is before[path] for path, layer in lora_layers(model))


def test_a_model_can_be_adapted_again_after_detaching() -> None:
    model = attach_all(make_model(LLAMA))
    detach(model)
    assert lora_layers(model) == []
    assert len(lora_layers(attach_all(model))) == 21


def test_each_layer_has_its_own_rank_and_alpha() -> None:
    model = make_model(LLAMA)
    settings = {
        "model.layers.0.self_attn.q_proj": LayerConfig(2, 1.0),
        "model.layers.2.mlp.up_proj": LayerConfig(6, 3.0),
    }
    attach(model, settings)
    found = {path: LayerConfig(layer.rank, layer.alpha) for path, layer in lora_layers(model)}
    assert found == settings


def test_the_same_seed_draws_the_same_a_and_layers_differ() -> None:
    first, again, other = (attach_all(make_model(LLAMA), seed=seed) for seed in (3, 3, 4))
    draws = [[layer.lora_a for _, layer in lora_layers(model)] for model in (first, again, other)]
    assert all(mx.array_equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not any(mx.array_equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))
    assert not mx.array_equal(draws[0][0], draws[0][1])  # both (64, 4)


def test_drawing_a_leaves_the_global_randomness_alone() -> None:
    mx.random.seed(5)
    expected = mx.random.uniform()
    model = make_model(LLAMA)
    mx.random.seed(5)
    attach_all(model)
    assert mx.random.uniform().item() == expected.item()


def test_dropout_reaches_every_layer() -> None:
    model = make_model(LLAMA)
    attach(model, dict.fromkeys(choose_layers(model), SETTING), dropout=0.5)
    fill_b(model)
    model.eval()
    assert mx.array_equal(model(TOKENS), model(TOKENS))
    model.train()
    for _, layer in lora_layers(model):
        x = mx.ones((1, layer.lora_a.shape[0]))
        assert not mx.array_equal(layer(x), layer(x))


def test_paths_that_are_not_there_are_all_named_and_nothing_changes() -> None:
    model = make_model(LLAMA)
    settings = {
        "model.layers.9.self_attn.q_proj": SETTING,
        "model.layers.0.self_attn.q_proj": SETTING,
        "model.norm": SETTING,
    }
    with pytest.raises(InputError) as error:
        attach(model, settings)
    assert "model.layers.9.self_attn.q_proj" in str(error.value)
    assert "model.norm" in str(error.value)
    assert "layers.0" not in str(error.value)
    assert lora_layers(model) == []
    assert tree_flatten(model.trainable_parameters())


def test_a_rank_above_what_a_layer_can_have_names_every_such_layer() -> None:
    model = make_model(LLAMA)
    with pytest.raises(InputError) as error:
        attach(model, dict.fromkeys(choose_layers(model, num_layers=1), LayerConfig(33, 1.0)))
    # Two key-value heads of 16 make outputs of 32; every other layer has 64 or more.
    assert "rank 33" in str(error.value) and "32" in str(error.value)
    assert all(f"layers.2.self_attn.{name}" in str(error.value) for name in ("k_proj", "v_proj"))
    assert "q_proj" not in str(error.value)
    assert lora_layers(model) == []
    assert tree_flatten(model.trainable_parameters())


def test_a_rank_as_large_as_the_layer_is_allowed() -> None:
    model = make_model(LLAMA)
    attach(model, {"model.layers.0.self_attn.k_proj": LayerConfig(32, 1.0)})
    assert model.model.layers[0].self_attn.k_proj.rank == 32


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank}"):
        attach(make_model(LLAMA), {"model.layers.0.self_attn.k_proj": LayerConfig(rank, 1.0)})


def test_all_linear_finds_the_seven_projections_of_each_block_and_not_the_head() -> None:
    paths = choose_layers(make_model(LLAMA))
    names = [*LINEAR, "mlp.up_proj"]
    assert sorted(paths) == sorted(f"model.layers.{n}.{name}" for n in range(3) for name in names)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]),
        ("mlp.up_proj", [f"model.layers.{n}.mlp.up_proj" for n in range(3)]),
        ("model.layers.1.self_attn.v_proj", ["model.layers.1.self_attn.v_proj"]),
        ("*.1.mlp.*", [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "down", "up")]),
        ("*.[02].*.k_proj", [f"model.layers.{n}.self_attn.k_proj" for n in (0, 2)]),
    ],
)
def test_a_target_is_a_name_a_suffix_a_path_or_a_glob(target: str, expected: list[str]) -> None:
    assert sorted(choose_layers(make_model(LLAMA), [target])) == sorted(expected)


def test_several_targets_add_up_and_a_layer_comes_once() -> None:
    paths = choose_layers(make_model(LLAMA), ["q_proj", "self_attn.q_proj", "v_proj"])
    assert len(paths) == len(set(paths)) == 6


def test_part_of_a_name_is_no_target() -> None:
    with pytest.raises(InputError):
        choose_layers(make_model(LLAMA), ["proj"])


@pytest.mark.parametrize(("count", "blocks"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (-1, None)])
def test_the_last_blocks_are_adapted(count: int, blocks: list[int] | None) -> None:
    paths = choose_layers(make_model(LLAMA), ["q_proj"], num_layers=count)
    assert paths == [f"model.layers.{n}.self_attn.q_proj" for n in blocks or range(3)]


def test_without_a_number_the_last_sixteen_blocks_are_adapted_in_order() -> None:
    small = {**LLAMA, "num_hidden_layers": 18, "hidden_size": 16, "intermediate_size": 16}
    paths = choose_layers(make_model(small), ["q_proj"])
    assert paths == [f"model.layers.{n}.self_attn.q_proj" for n in range(2, 18)]


@pytest.mark.parametrize("count", [4, 0, -2])
def test_more_blocks_than_there_are_is_an_error_that_tells_how_many(count: int) -> None:
    with pytest.raises(InputError, match=rf"--lora-layers {count}: .* 3 layers.*1 to 3.*-1"):
        choose_layers(make_model(LLAMA), num_layers=count)


def test_targets_that_match_nothing_list_the_names_that_there_are() -> None:
    with pytest.raises(InputError) as error:
        choose_layers(make_model(LLAMA), ["q_porj", "v_proj", "wk"])
    message = str(error.value)
    assert "q_porj" in message and "wk" in message
    assert all(name in message for name in (*ATTENTION, "down_proj", "gate_proj", "up_proj"))
    assert "\n" not in message


def test_a_target_outside_the_chosen_blocks_matches_nothing() -> None:
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj"):
        choose_layers(make_model(LLAMA), ["model.layers.0.mlp.up_proj"], num_layers=1)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no list of transformer blocks"):
        block_paths(nn.Linear(2, 2))


def test_block_paths_are_in_order() -> None:
    small = {**LLAMA, "num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 16}
    assert block_paths(make_model(small)) == [f"model.layers.{n}" for n in range(12)]


def test_lora_layers_come_in_the_order_of_the_model() -> None:
    small = {**LLAMA, "num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 16}
    model = make_model(small)
    attach(model, dict.fromkeys(reversed(choose_layers(model, ["q_proj"])), LayerConfig(1, 1.0)))
    numbers = [int(path.split(".")[2]) for path, _ in lora_layers(model)]
    assert numbers == list(range(12))


LLAMA_PARAMETERS = (
    2 * 512 * 64  # embedding and head
    + 64  # last norm
    + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
)


def test_parameters_are_counted() -> None:
    model = make_model(LLAMA)
    assert count_parameters(model) == (LLAMA_PARAMETERS, LLAMA_PARAMETERS)
    attach(model, dict.fromkeys(choose_layers(model, ["q_proj"]), SETTING))
    trained = 3 * 2 * 64 * 4
    assert count_parameters(model) == (trained, LLAMA_PARAMETERS + trained)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_weight_counts_as_what_it_stands_for(bits: int) -> None:
    model = make_model(LLAMA)
    nn.quantize(model, group_size=32, bits=bits)
    assert count_parameters(model)[1] == LLAMA_PARAMETERS


def test_biases_count_and_tied_weights_count_once() -> None:
    expected = LLAMA_PARAMETERS - 512 * 64 + 3 * (64 + 2 * 32)
    model = make_model(QWEN2)
    assert count_parameters(model)[1] == expected
    nn.quantize(model, group_size=32, bits=4)
    assert count_parameters(model)[1] == expected


def test_rotary_frequencies_are_no_parameters() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    assert count_parameters(make_model({**LLAMA, "rope_scaling": scaling}))[1] == LLAMA_PARAMETERS


def test_lora_layers_are_of_the_type_in_the_table() -> None:
    for model in (make_model(LLAMA), quantized(4, 32)):
        assert all(isinstance(layer, LoRALinear) for _, layer in lora_layers(attach_all(model)))
