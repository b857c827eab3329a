"""transformers' names and layouts of tensors and layers, where mlx-lm's differ: both ways.

mlx-lm's `sanitize` turns a checkpoint of transformers into its own names and layouts. This is the
inverse, for the architectures of `KNOWN`; a test compares each of them with transformers itself.
"""

import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from graft.storage.lazy_tensors import Output

import mlx.core as mx

_Make = Callable[..., dict[str, mx.array]]


@dataclass(frozen=True)
class _Rule:
    """How tensors of mlx-lm become tensors of transformers.

    Attributes:
        names: the ends of the tensors' names in mlx-lm, as regular expressions; what comes before
            them is the same for all.
        make: (what comes before, *arrays) -> tensors by transformers' names; an empty name is
            the first tensor's own.
    """

    names: tuple[str, ...]
    make: _Make


def _unstacked(stack: str, gate: str, up: str, down: str) -> tuple[_Rule, ...]:
    """One matrix of all experts -> one for each."""

    def rule(name: str, theirs: str) -> _Rule:
        return _Rule(
            (rf"{stack}\.{name}\.weight",),
            lambda path, array: {
                f"{path}experts.{number}.{theirs}.weight": array[number]
                for number in range(array.shape[0])
            },
        )

    names = ("gate_proj", "up_proj", "down_proj")
    return tuple(rule(n, theirs) for n, theirs in zip(names, (gate, up, down), strict=True))


def _transposed(names: str) -> _Rule:
    return _Rule((rf"({names})\.weight",), lambda path, array: {"": array.T})


_PLAIN = ("gate_proj", "up_proj", "down_proj")
_SWITCH = _unstacked("switch_mlp", *_PLAIN)
_EXPERTS = _unstacked("experts", *_PLAIN)
_NUMBERED = _unstacked("switch_mlp", "w1", "w3", "w2")
# Of a depthwise convolution: (channels, window, 1) in MLX, (channels, 1, window) in PyTorch.
_CONVOLUTION = _Rule(
    (r"(conv1d|conv\.conv)\.weight",), lambda path, array: {"": array.moveaxis(2, 1)}
)
# Of latent attention: keys (heads, rank, dims) and values (heads, dims, rank), one above the other.
_KEYS_AND_VALUES = _Rule(
    (r"embed_q\.weight", r"unembed_out\.weight"),
    lambda path, keys, values: {
        f"{path}kv_b_proj.weight": mx.concatenate([keys.swapaxes(-1, -2), values], axis=1).reshape(
            -1, keys.shape[1]
        )
    },
)
# Norms that multiply by 1 + weight in transformers; the gated one of linear attention does not.
_NORMS = _Rule(
    (r"(input_layernorm|post_attention_layernorm|model\.norm|q_norm|k_norm)\.weight",),
    lambda path, array: {"": array - 1},
)
_GATE_AND_UP = _Rule(
    (r"switch_mlp\.gate_proj\.weight", r"switch_mlp\.up_proj\.weight"),
    lambda path, gate, up: {f"{path}input_linear.weight": mx.concatenate([gate, up], axis=1)},
)
_DOWN = _Rule(
    (r"switch_mlp\.down_proj\.weight",),
    lambda path, down: {f"{path}output_linear.weight": down},
)
_CORRECTION = _Rule(
    (r"gate\.e_score_correction_bias",),
    lambda path, array: {f"{path}e_score_correction_bias": array},
)

_RULES: dict[str, tuple[_Rule, ...]] = {
    **dict.fromkeys(("afmoe", "dots1"), _EXPERTS),
    **dict.fromkeys(("glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"), _SWITCH),
    **dict.fromkeys(("mixtral", "minimax_m2"), _NUMBERED),
    **dict.fromkeys(("falcon_mamba", "lfm2", "mamba"), (_CONVOLUTION,)),
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite"), (*_SWITCH, _KEYS_AND_VALUES)),
    "exaone_moe": (*_SWITCH, _CORRECTION),
    "gpt2": (_transposed(r"attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj"),),
    "granitemoe": (_GATE_AND_UP, _DOWN),
    "qwen3_next": (*_SWITCH, _CONVOLUTION, _NORMS),
}
_MIXTURES = frozenset(_RULES) - {"falcon_mamba", "gpt2", "lfm2", "mamba"}
_ROUTERS = (".gate", ".router.layer")
_PROJECTIONS = (".gate_proj", ".up_proj", ".down_proj")
# PEFT itself refuses the other two.
_LOST_IN_MAMBA = (".dt_proj", ".conv1d", ".out_proj")
# Mixtures in which PEFT does not take the names of all projections for experts'.
_TAKEN_FOR_WHAT_THEY_ARE = ("qwen2_moe",)
# Beginnings of names: mlx-lm's, and transformers' in their place. The first that fits counts.
_BEGINNINGS: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("gpt2", "gptj"), (("model.", "transformer."),)),
    "gpt_neox": (
        ("model.h.", "gpt_neox.layers."),
        ("model.embed_out", "embed_out"),
        ("model.", "gpt_neox."),
    ),
}
_SAME = (
    *("cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4"),
    *("gpt_bigcode", "granite", "helium", "llama", "mistral", "nemotron", "olmo2", "olmo3"),
    *("phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
)
# Architectures whose names and layouts in transformers are known.
KNOWN = frozenset((*_SAME, *_RULES, *_BEGINNINGS))

# Vision-language models: transformers nests the two halves in another order.
_NESTED = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
)
# As `_BEGINNINGS`, for paths of layers where they are not those of the tensors in a file.
_LAYER_BEGINNINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_neox": (
        ("model.h.", "gpt_neox.layers."),
        ("model.embed_out", "lm_head"),
        ("model.", "gpt_neox."),
    ),
    **dict.fromkeys(
        (
            *("gemma3", "gemma4", "lfm2-vl", "llama4", "mistral3", "pixtral"),
            *("qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
        ),
        _NESTED,
    ),
}


def layer_in_transformers(path: str, architecture: str) -> str:
    """transformers' path of a layer, from mlx-lm's."""
    pairs = _LAYER_BEGINNINGS.get(architecture, _BEGINNINGS.get(architecture, ()))
    return _exchanged(path, pairs)


def layers_are_known(architecture: str) -> bool:
    """Whether transformers' paths of the layers of an architecture are known."""
    return architecture in KNOWN or architecture in _LAYER_BEGINNINGS


def depends_on_architecture(path: str) -> bool:
    """Whether transformers has another path for a layer in some architectures only."""
    return path.startswith(("model.h.", "model.wte", "model.wpe", "language_model."))


def is_lost_in_peft(path: str, architecture: str) -> bool:
    """Whether PEFT has no adapter for a linear layer of mlx-lm.

    In transformers 5, routers are no linear layers, and Mamba's blocks read the weight of `dt_proj`
    without calling the layer. In a mixture of experts, PEFT takes the names of the projections for
    those of the experts (`_convert_peft_config_moe` there).
    """
    ends: tuple[str, ...] = _LOST_IN_MAMBA if architecture in ("falcon_mamba", "mamba") else ()
    if architecture in _MIXTURES:
        ends += _ROUTERS
        ends += () if architecture in _TAKEN_FOR_WHAT_THEY_ARE else _PROJECTIONS
    return path.endswith(ends)


def layer_in_mlx_lm(path: str, architecture: str, layers: Container[str]) -> str:
    """mlx-lm's path of a layer, from transformers'; any other path as it is.

    Args:
        path: in transformers, or in mlx-lm already.
        architecture: mlx-lm's name.
        layers: the paths in mlx-lm's model.
    """
    if path in layers:
        return path
    if (among_experts := path.replace(".switch_mlp.", ".experts.")) in layers:
        return among_experts
    tables = (_LAYER_BEGINNINGS, _BEGINNINGS)
    pairs = [pair for table in tables for pair in table.get(architecture, ())]
    found = (mine + path[len(theirs) :] for mine, theirs in pairs if path.startswith(theirs))
    return next((candidate for candidate in found if candidate in layers), path)


def in_transformers(outputs: Sequence[Output], architecture: str) -> list[Output]:
    """The tensors of an unquantized model as transformers names them and lays them out.

    Args:
        outputs: under mlx-lm's names; their blocks are taken when the results are written.
        architecture: mlx-lm's name; one of `KNOWN`.
    """
    by_name = {output.name: output for output in outputs}
    translated: list[Output] = []
    used: set[str] = set()
    for name in by_name:
        if name in used:
            continue
        group, make = _group(name, by_name, _RULES.get(architecture, ()))
        used.update(output.name for output in group)
        translated += _made(group, make) if make else group
    pairs = _BEGINNINGS.get(architecture, ())
    return [output._replace(name=_exchanged(output.name, pairs)) for output in translated]


def _group(
    name: str, outputs: dict[str, Output], rules: Sequence[_Rule]
) -> tuple[list[Output], _Make | None]:
    """The tensors that are translated together with the named one, and how."""
    for rule in rules:
        for end in rule.names:
            if found := re.search(rf"(?:^|(?<=\.))(?:{end})$", name):
                before = name[: found.start()]
                whole = [re.compile(re.escape(before) + f"(?:{end})") for end in rule.names]
                if len(whole) == 1:
                    group = [outputs[name]]
                else:
                    group = [outputs[n] for one in whole for n in outputs if one.fullmatch(n)]
                return group, partial(_named, name, partial(rule.make, before))
    return [outputs[name]], None


def _named(name: str, make: _Make, *arrays: mx.array) -> dict[str, mx.array]:
    return {theirs or name: array for theirs, array in make(*arrays).items()}


def _made(group: Sequence[Output], make: _Make) -> list[Output]:
    placeholders = make(*(mx.zeros(output.shape, output.dtype) for output in group))
    kept: dict[str, mx.array] = {}

    def blocks(name: str, *, first: bool) -> Iterator[mx.array]:
        if first:
            arrays = [list(output.blocks) for output in group]
            kept.update(make(*(b[0] if len(b) == 1 else mx.concatenate(b) for b in arrays)))
        yield kept.pop(name)

    return [
        Output(name, array.dtype, tuple(array.shape), blocks(name, first=not number))
        for number, (name, array) in enumerate(placeholders.items())
    ]


def _exchanged(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for mine, theirs in pairs:
        if name.startswith(mine):
            return theirs + name[len(mine) :]
    return name
