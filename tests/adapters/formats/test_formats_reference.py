"""Adapters in PEFT, mlx-lm and llama.cpp themselves: the same logits on the same base."""

import json
import warnings
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, apply_adapter, layer_configs
from graft.adapters.attach import attach, lora_layers
from graft.adapters.files import load_adapter
from graft.adapters.formats.gguf import write_gguf
from graft.adapters.formats.mlx_lm import write_mlx_lm
from graft.adapters.formats.peft import write_peft
from graft.adapters.layer_config import LayerConfig
from graft.adapters.targets import plan
from graft.pretrained.base_config import BaseConfig

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.tiny import LLAMA, QWEN2, make_model, write_model, write_sentencepiece

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

IDS = [[1, 5, 9, 300, 7, 2, 42, 17]]
# The embedding beside a head of its own, and tied to the output.
CASES = [
    (LLAMA, "all-linear"),
    (QWEN2, "all-linear"),
    (LLAMA, "q_proj,embed_tokens,lm_head"),
    (QWEN2, "q_proj,embed_tokens"),
]


def torch_model(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def import_peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def torch_logits(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return np.array(model(torch.tensor(IDS)).logits)


def trained(config: dict[str, Any], targets: str, **settings: Any) -> tuple[nn.Module, Adapter]:
    """A model whose adapter changes what it says, and that adapter."""
    model = make_model(config)
    attach(model, plan(model, targets, num_layers=-1, **{"rank": 4, "alpha": 6.0, **settings}))
    for number, (_, layer) in enumerate(lora_layers(model)):
        for name in layer.tensors():
            noise = mx.random.normal(layer[name].shape, key=mx.random.key(number))
            layer[name] = layer[name] + 0.1 * noise
    model.eval()
    layers = layer_configs(model)
    tensors = {
        f"{path}.{name}": array
        for path, layer in lora_layers(model)
        for name, array in layer.tensors().items()
    }
    return model, Adapter(tensors, layers, "tiny")


def close(found: Any, expected: Any, *, base: Any, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=atol)
    assert np.abs(np.array(expected) - np.array(base)).max() > 100 * atol


def base_logits(config: dict[str, Any]) -> mx.array:
    model = make_model(config)
    model.eval()
    return model(mx.array(IDS))


# ---- PEFT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
@pytest.mark.parametrize(("config", "targets"), CASES)
def test_peft_gives_the_logits_of_graft(
    config: dict[str, Any], targets: str, method: str, tmp_path: Path
) -> None:
    peft = import_peft()
    if method == "dora" and "embed_tokens" in targets:
        pytest.skip("PEFT's length of an embedding is another: kind embedding-columns")
    model, adapter = trained(config, targets, method=method)
    write_model(tmp_path / "base", config)
    write_peft(adapter, tmp_path / "peft", base=BaseConfig("base", config))
    theirs = peft.PeftModel.from_pretrained(torch_model(tmp_path / "base"), tmp_path / "peft")
    close(torch_logits(theirs), model(mx.array(IDS)), base=base_logits(config))


def test_peft_takes_ranks_and_alphas_that_differ(tmp_path: Path) -> None:
    peft = import_peft()
    model, adapter = trained(
        LLAMA,
        "all-linear",
        rank_pattern={"q_proj": 8, "layers.1.mlp.up_proj": 2},
        alpha_pattern={"v_proj": 3.0},
    )
    write_model(tmp_path / "base", LLAMA)
    write_peft(adapter, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(torch_model(tmp_path / "base"), tmp_path / "peft")
    close(torch_logits(theirs), model(mx.array(IDS)), base=base_logits(LLAMA))


def test_an_interleaved_base_goes_to_peft_in_halves(tmp_path: Path) -> None:
    """An adapter of Meta's layout over the same model in Hugging Face's."""
    peft = import_peft()
    from graft.adapters.rotary import interleave

    from mlx.utils import tree_flatten

    meta = make_model(LLAMA | {"rope_traditional": True})
    for name, array in dict(tree_flatten(meta.parameters())).items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            meta.load_weights([(name, interleave(array.T, heads).T)], strict=False)
    attach(meta, plan(meta, "all-linear", rank=4, alpha=6.0))
    for number, (_, layer) in enumerate(lora_layers(meta)):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    meta.eval()
    tensors = {f"{p}.{n}": a for p, layer in lora_layers(meta) for n, a in layer.tensors().items()}
    adapter = Adapter(tensors, {p: LayerConfig(4, 6.0) for p, _ in lora_layers(meta)})
    base = BaseConfig("meta", LLAMA | {"rope_traditional": True})
    write_peft(adapter, tmp_path / "peft", base=base)
    write_model(tmp_path / "base", LLAMA)
    theirs = peft.PeftModel.from_pretrained(torch_model(tmp_path / "base"), tmp_path / "peft")
    close(torch_logits(theirs), meta(mx.array(IDS)), base=base_logits(LLAMA))


LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]}
PATTERNS = {
    "rank_pattern": {"k_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
    "alpha_pattern": {"up_proj": 5, "model.layers.0.self_attn.q_proj": 9},
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LLAMA, LORA),
        (LLAMA, {**LORA, **PATTERNS}),
        (LLAMA, {**LORA, **PATTERNS, "use_rslora": True}),
        (LLAMA, {**LORA, "use_dora": True}),
        (QWEN2, {**LORA, **PATTERNS, "use_rslora": True}),
        (LLAMA, {**LORA, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (LLAMA, {**LORA, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        (QWEN2, {**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
        (QWEN2, {**LORA, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    ],
)
def test_what_peft_trained_gives_its_logits_in_graft(
    config: dict[str, Any], settings: dict[str, Any], safe: bool, tmp_path: Path
) -> None:
    peft, torch = import_peft(), pytest.importorskip("torch")
    write_model(tmp_path / "base", config)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        torch_model(tmp_path / "base"), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    # Trained: three steps of a large rate move A and B alike.
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    ids = torch.tensor(IDS)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.eval()
    theirs.save_pretrained(tmp_path / "peft", safe_serialization=safe)
    if not safe and not (tmp_path / "peft" / "adapter_model.bin").exists():
        torch.save(  # as PEFT did before it wrote safetensors
            peft.get_peft_model_state_dict(theirs), tmp_path / "peft" / "adapter_model.bin"
        )
        (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    model = make_model(config)
    adapter = load_adapter(tmp_path / "peft")
    apply_adapter(model, adapter, name="peft")
    model.eval()
    close(model(mx.array(IDS)), torch_logits(theirs), base=base_logits(config))


# ---- mlx-lm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
@pytest.mark.parametrize(("config", "targets"), CASES)
def test_mlx_lm_gives_the_logits_of_graft_and_back_bit_for_bit(
    config: dict[str, Any], targets: str, method: str, tmp_path: Path
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    model, adapter = trained(config, targets, method=method)
    write_mlx_lm(adapter, tmp_path / "out", base=BaseConfig("base", config))
    theirs = load_adapters(make_model(config), str(tmp_path / "out"))
    theirs.eval()
    close(theirs(mx.array(IDS)), model(mx.array(IDS)), base=base_logits(config), atol=2e-5)
    loaded = load_adapter(tmp_path / "out")
    assert loaded.tensors.keys() == adapter.tensors.keys()
    assert all(mx.array_equal(loaded.tensors[n], array) for n, array in adapter.tensors.items())
    again = make_model(config)
    apply_adapter(again, loaded, name="mlx-lm")
    again.eval()
    assert mx.array_equal(again(mx.array(IDS)), model(mx.array(IDS)))


def test_what_mlx_lm_trained_gives_its_logits_in_graft(tmp_path: Path) -> None:
    """mlx-lm's own layers and its own file; keys within blocks, not whole paths."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {
        "rank": 4,
        "scale": 3.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "mlp.down_proj"],
    }
    theirs = make_model(LLAMA)
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, parameters)
    for number, (_, module) in enumerate(theirs.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(number))
    theirs.eval()
    weights = dict(tree_flatten(theirs.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = make_model(LLAMA)
    adapter = load_adapter(tmp_path)
    apply_adapter(model, adapter, name="mlx-lm")
    model.eval()
    close(model(mx.array(IDS)), theirs(mx.array(IDS)), base=base_logits(LLAMA), atol=2e-5)


# ---- llama.cpp ---------------------------------------------------------------------------------


def write_base_gguf(path: Path, config: dict[str, Any], tokenizer: Path) -> None:
    """The tiny model in float32 as llama.cpp's converter would write it: q and k interleaved."""
    gguf = pytest.importorskip("gguf")
    from mlx.utils import tree_flatten
    from sentencepiece import SentencePieceProcessor

    model = make_model(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    pieces = SentencePieceProcessor(model_file=str(write_sentencepiece(tokenizer)))
    count = pieces.vocab_size()
    texts = [pieces.id_to_piece(n) for n in range(count)]
    texts += [f"<extra{n}>" for n in range(config["vocab_size"] - count)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([-float(n) for n in range(len(texts))])
    writer.add_token_types(
        [
            2 if n == 0 else 3 if n < 3 else 6 if n < count and pieces.is_byte(n) else 1
            for n in range(len(texts))
        ]
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, array in dict(tree_flatten(model.parameters())).items():
        values = np.array(array)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = np.ascontiguousarray(values.reshape(array.shape))
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("targets", "patterns"),
    [
        ("all-linear", {}),
        ("q_proj,k_proj", {}),
        ("all-linear,lm_head", {"alpha_pattern": {"v_proj": 3.0}, "rank_pattern": {"q_proj": 8}}),
        ("q_proj,embed_tokens", {}),
    ],
)
def test_llama_cpp_gives_the_logits_of_graft(
    targets: str, patterns: dict[str, Any], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model, adapter = trained(LLAMA, targets, **patterns)
    write_gguf(adapter, tmp_path / "a.gguf", base=BaseConfig("base", LLAMA))
    write_base_gguf(tmp_path / "base.gguf", LLAMA, tmp_path / "tokenizer.model")

    def logits(**settings: Any) -> np.ndarray:
        theirs = llama_cpp.Llama(
            model_path=str(tmp_path / "base.gguf"),
            n_ctx=64,
            logits_all=True,
            n_threads=1,
            verbose=False,
            # Keys and values in half precision alone would move logits by 1e-3.
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            **settings,
        )
        theirs.eval(IDS[0])
        found = np.array(theirs.scores[: len(IDS[0])])
        theirs.close()
        return found

    base = base_logits(LLAMA)[0]
    np.testing.assert_allclose(logits(), np.array(base), atol=1e-5)
    adapted = logits(lora_path=str(tmp_path / "a.gguf"))
    close(adapted, model(mx.array(IDS))[0], base=base, atol=1e-5)
    record = load_adapter(tmp_path / "a.gguf")
    assert isinstance(record, Adapter)
