"""What Graft must know of model architectures beyond mlx-lm's code: their quirks, in one table.

A quirk of one architecture is a field of its entry in `ARCHITECTURES`. What depends on the name of
a layer, whatever the architecture, is in the tables of names below. Knows only names: no model, no
adapter, no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# ---- architectures ---------------------------------------------------------------------------

# The order of the rows of q and k for rotary embeddings: as in transformers' checkpoints, which
# mostly rotate the first half of a head against the second, or with neighbors next to each other,
# as Meta and llama.cpp have it for some of the same models.
HALVES = "halves"
INTERLEAVED = "interleaved"

# How often the parts of a fused q, k, v projection recur within it.
ONCE, PER_HEAD, PER_KEY_VALUE_HEAD = "once", "per head", "per key-value head"

# Names of layers within a transformer block -> llama.cpp's names.
_LLAMA_CPP_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _llama_cpp_experts(path: str) -> dict[str, str]:
    """llama.cpp's names for the experts of a block."""
    return {f"{path}.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")}


@dataclass(frozen=True)
class LlamaCppNames:
    """What llama.cpp calls an architecture and its layers.

    Attributes:
        architecture: `general.architecture` of its GGUF files.
        interleaves: whether its converter interleaves the rows of q and k.
        layers: llama.cpp's names for layers of a block that differ from the usual ones, or are
            not among them.
    """

    architecture: str
    interleaves: bool = False
    layers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def block(self) -> dict[str, str]:
        """From the name of a layer within a block to llama.cpp's name for it."""
        special = set(self.layers.values())
        usual = {name: theirs for name, theirs in _LLAMA_CPP_BLOCK.items() if theirs not in special}
        return usual | dict(self.layers)


@dataclass(frozen=True)
class Architecture:
    """The quirks of one architecture.

    Attributes:
        fused_parts: how often q, k and v recur in a fused projection: `ONCE`, `PER_HEAD` or
            `PER_KEY_VALUE_HEAD`.
        reads_embedding: whether it multiplies by the weight of an embedding itself instead of
            calling the layer, so that the weight must not be quantized.
        llama_cpp: names in GGUF files, or `None` if Graft does not know them.
    """

    fused_parts: str = ONCE
    reads_embedding: bool = False
    llama_cpp: LlamaCppNames | None = None


_USUAL = Architecture()
_LLAMA = LlamaCppNames("llama", interleaves=True)

# By mlx-lm's name, which is `model_type` in config.json and the name of its module.
ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(llama_cpp=LlamaCppNames("gemma")),
    "gemma2": Architecture(llama_cpp=LlamaCppNames("gemma2")),
    "gpt_neox": Architecture(fused_parts=PER_HEAD),
    "granite": Architecture(llama_cpp=LlamaCppNames("granite", interleaves=True)),
    "internlm2": Architecture(fused_parts=PER_KEY_VALUE_HEAD),
    "llama": Architecture(llama_cpp=_LLAMA),
    "mistral": Architecture(llama_cpp=_LLAMA),
    "mixtral": Architecture(
        llama_cpp=LlamaCppNames(
            "llama", interleaves=True, layers=_llama_cpp_experts("block_sparse_moe.switch_mlp")
        )
    ),
    "phi3": Architecture(
        llama_cpp=LlamaCppNames(
            "phi3", layers={"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
        )
    ),
    "phi3small": Architecture(fused_parts=PER_KEY_VALUE_HEAD),
    "qwen2": Architecture(llama_cpp=LlamaCppNames("qwen2")),
    "qwen2_moe": Architecture(
        llama_cpp=LlamaCppNames("qwen2moe", layers=_llama_cpp_experts("mlp.switch_mlp"))
    ),
    "qwen3": Architecture(llama_cpp=LlamaCppNames("qwen3")),
    "qwen3_moe": Architecture(
        llama_cpp=LlamaCppNames("qwen3moe", layers=_llama_cpp_experts("mlp.switch_mlp"))
    ),
    "seed_oss": Architecture(reads_embedding=True),
    "smollm3": Architecture(llama_cpp=LlamaCppNames("smollm3", interleaves=True)),
    "starcoder2": Architecture(
        llama_cpp=LlamaCppNames(
            "starcoder2", layers={"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        )
    ),
}


def find_architecture(model_type: str) -> Architecture:
    """The quirks of an architecture by mlx-lm's name; none if the table does not have it."""
    return ARCHITECTURES.get(model_type, _USUAL)


def architecture_of(module: object) -> Architecture:
    """The quirks of the architecture whose module in mlx-lm defines the type of a layer."""
    package, _, name = type(module).__module__.rpartition(".")
    return find_architecture(name) if package == "mlx_lm.models" else _USUAL


# ---- names of layers -------------------------------------------------------------------------

# The last part of an embedding's path.
EMBEDDING_NAMES = (
    *("embed_tokens", "tok_embeddings", "wte", "embed_in", "word_embeddings"),
    *("embed", "embedding", "embeddings", "token_embeddings"),
)

# mlx-lm's types of layers that hold a matrix for each expert.
EXPERT_LAYERS = (
    "mlx_lm.models.switch_layers.SwitchLinear",
    "mlx_lm.models.switch_layers.QuantizedSwitchLinear",
)

# mlx-lm's blocks of such layers. A block is called with tokens and the indices of each token's
# experts, and passes the indices on to its layers, sorted by expert if there are many.
EXPERT_BLOCKS = (
    "mlx_lm.models.switch_layers.SwitchGLU",
    "mlx_lm.models.switch_layers.SwitchMLP",
)

# Layers, by the last part of their path, whose weight the architecture replaces in every pass, so
# that no adapter can stand in for them: gemma3n clips the coefficients of its alternating updates.
REWRITTEN_LAYERS = ("prediction_coefs", "correction_coefs")

# Fused projections by the last part of their path, with the parts in their order.
QUERY_KEY_VALUE = ("q", "k", "v")
FUSED_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "c_attn": QUERY_KEY_VALUE,
    "qkv": QUERY_KEY_VALUE,
    "qkv_proj": QUERY_KEY_VALUE,
    "query_key_value": QUERY_KEY_VALUE,
    "wqkv": QUERY_KEY_VALUE,
    "Wqkv": QUERY_KEY_VALUE,
    "gate_up_proj": ("gate", "up"),
}

# Attributes of an attention module that hold its numbers of heads and of key-value heads.
HEAD_COUNTS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
KEY_VALUE_HEAD_COUNTS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")

# The last projection of a feed-forward block by the end of its path: (IA)3 scales its input.
FEED_FORWARD_OUTPUTS = (
    *("down_proj", "mlp.c_proj", "fc2", "w2", "linear2", "dense_4h_to_h", "fc_out", "wo"),
    *("mlp.proj", "ffn.down", "feed_forward.w2"),
)

# Projections whose rows follow the order of rotary embeddings, with the entries of config.json that
# hold their numbers of heads; the first that is set counts.
ROTARY_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "q_proj": ("num_attention_heads",),
    "k_proj": ("num_key_value_heads", "num_attention_heads"),
}


def is_embedding(path: str) -> bool:
    """Whether the layer at a path is an embedding, by its name."""
    return path.rpartition(".")[2] in EMBEDDING_NAMES


def holds_experts(path: str) -> bool:
    """Whether the layer at a path holds a matrix for each expert, by the names in its path."""
    return "switch" in path or "experts" in path
