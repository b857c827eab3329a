"""Requests of many adapters in one batch get the answers that they get alone.

Expected answers are mlx-lm's `generate_step` on the base with the adapter attached in the plain
way. Nothing is timed.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from graft.adapters.adapter import Adapter
from graft.adapters.attach import attach, lora_layers
from graft.adapters.formats.mlx_lm import write_mlx_lm
from graft.adapters.targets import plan
from graft.engine.engine import Engine
from graft.engine.errors import (
    AdapterDoesNotFit,
)
from graft.engine.stats import RequestCounts
from graft.errors import InputError
from graft.pretrained.base_config import BaseConfig
from graft.pretrained.load import load_model
from graft.pretrained.tokenizer import Tokenizer, load_tokenizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from support.architectures import read_configs
from support.engines import NAMES, alone, ids_of, prompt_of
from support.fast_cases import ARCHITECTURES, SMALL
from support.served import attached, logits_with, make_adapter, write
from support.tiny import LLAMA, QWEN2, make_model, write_hugging_face_tokenizer, write_model

MIXTRAL = read_configs()["mixtral"]

# Rows


@pytest.mark.parametrize("bits", [None, 4])
def test_experts_of_a_row_s_own_have_the_tokens_of_its_solo_run(
    bits: int | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Prompts of more and of fewer tokens than mlx-lm sorts by expert; one file is mlx-lm's."""
    model = make_model(MIXTRAL)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    plans = [("all-linear", 2), ("gate_proj,up_proj,down_proj", 11), ("q_proj,down_proj", 16)]
    adapters = [
        make_adapter(model, seed=n, targets=targets, rank=rank)
        for n, (targets, rank) in enumerate(plans)
    ]
    folders = [write(tmp_path / str(n), adapter) for n, adapter in enumerate(adapters)]
    write_mlx_lm(adapters[1], folders[1] / "mlx-lm", base=BaseConfig("base", MIXTRAL))
    folders[1] /= "mlx-lm"
    rows = [
        (number, prompt_of(number, 3 + 45 * (number % 2)), 4 + 3 * (number % 3))
        for number in range(8)
    ]
    chosen = [None, *adapters]
    expected = [alone(model, prompt, chosen[n % 4], count) for n, prompt, count in rows]
    with Engine(model, tokenizer, max_rows=8) as engine:
        for number, folder in enumerate(folders, 1):
            engine.load_adapter(f"{number}", folder)
        streams = [
            engine.submit(prompt, adapters={f"{n % 4}": 1.0} if n % 4 else {}, max_tokens=count)
            for n, prompt, count in rows
        ]
        assert [ids_of(stream) for stream in streams] == expected
    assert len({tuple(tokens[:3]) for tokens in expected}) > 4


@pytest.mark.parametrize(
    "name, said",
    [
        ("olmoe", None),
        ("minimax_m3_vl", None),
        ("dbrx", r"mlx-lm's dbrx: .*--max-rows 1"),
        ("gemma3n", None),
    ],
)
def test_an_adapter_is_served_right_or_refused_when_it_is_loaded(
    name: str, said: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make_model(read_configs()[name])
    adapter = make_adapter(model, targets="all-linear", rank=2)
    folder, prompt = write(tmp_path / "a", adapter), prompt_of(1, 40)
    base = alone(model, prompt, None, 4)
    adapted = None if said else alone(model, prompt, adapter, 4)
    with Engine(model, tokenizer) as engine:
        running = engine.submit(prompt, max_tokens=4)
        if said:
            with pytest.raises(AdapterDoesNotFit, match=said):
                engine.load_adapter("a", folder)
            assert engine.adapters() == []
        else:
            engine.load_adapter("a", folder)
            answer = engine.submit(prompt, adapters={"a": 1.0}, max_tokens=4)
            beside = engine.submit(prompt, max_tokens=4)
            assert ids_of(answer) == adapted and ids_of(beside) == base
        assert ids_of(running) == base == ids_of(engine.submit(prompt, max_tokens=4))


def test_a_model_that_cannot_generate_is_refused_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="mlx-lm's gear cannot generate: AttributeError"):
        Engine(make_model(read_configs()["gear"]), tokenizer)


def test_rows_that_join_and_leave_have_the_tokens_of_their_solo_runs(
    model: nn.Module, tokenizer: Tokenizer, adapters: dict[str, Adapter], files: dict[str, Path]
) -> None:
    """The base and seven adapters, of ranks 1 to 64, prompts and answers of many lengths."""
    requests = [
        (
            None if number % 8 == 0 else NAMES[number % 8 - 1],
            prompt_of(number, 1 + 7 * (number % 5)),
        )
        for number in range(24)
    ]
    counts = [3 + (5 * number) % 23 for number in range(24)]
    expected = [
        alone(model, prompt, adapters.get(name or ""), count)
        for (name, prompt), count in zip(requests, counts, strict=True)
    ]
    with Engine(model, tokenizer, max_rows=8) as engine:
        for name in NAMES:
            engine.load_adapter(name, files[name])
        streams = []
        for (name, prompt), count in zip(requests, counts, strict=True):
            scales = {} if name is None else {name: 1.0}
            streams.append(engine.submit(prompt, adapters=scales, max_tokens=count))
            time.sleep(0.002)
        assert [ids_of(stream) for stream in streams] == expected
        stats = engine.stats()
        assert stats.rows_per_step > 2 and stats.tokens == sum(map(len, expected))
        # By adapter, the base under no name.
        assert stats.adapters[""] == RequestCounts(3, sum(len(expected[n]) for n in (0, 8, 16)))
        assert {name: stats.adapters[name].requests for name in NAMES} == dict.fromkeys(NAMES, 3)


@pytest.mark.parametrize("config, bits", [(LLAMA, 4), (QWEN2, None)], ids=["quantized", "tied"])
def test_other_bases_too(config: dict[str, Any], bits: int | None, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(write_model(tmp_path / "model", config, bits=bits))
    targets = "all-linear" if bits else "embed_tokens,q_proj"
    adapter = make_adapter(model, targets=targets)
    path = write(tmp_path / "a", adapter)
    prompts = [prompt_of(number, 9) for number in range(4)]
    expected = [alone(model, p, adapter if n % 2 else None, 12) for n, p in enumerate(prompts)]
    with Engine(model, tokenizer) as engine:
        engine.load_adapter("a", path)
        streams = [
            engine.submit(p, adapters={"a": n % 2}, max_tokens=12) for n, p in enumerate(prompts)
        ]
        assert [ids_of(stream) for stream in streams] == expected


SLIDING = {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}


CHUNKED = {
    "text_config": {
        **SMALL,
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 128,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_bias": False,
        "use_qk_norm": True,
        "rope_scaling": None,
    }
}
ONE_BY_ONE = ["gemma2", "llama4"]


@pytest.mark.parametrize("name", ["gemma3_text", "mixtral", *ONE_BY_ONE])
def test_architectures_with_windows_experts_and_without_batches(
    name: str,
    base: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """mlx-lm's gemma2 fails with grouped queries in a batch, and it cannot batch llama4's caches.

    So their requests go one by one.
    """
    own = {"gemma3_text": SLIDING, "llama4": CHUNKED}.get(name) or ARCHITECTURES[name]
    model = make_model({**SMALL, "model_type": name, **own})
    adapter = make_adapter(model, targets="q_proj,o_proj", rank=4)
    path = write(tmp_path / "a", adapter)
    prompts = [prompt_of(number, 3 + 13 * number) for number in range(4)]
    expected = [alone(model, p, adapter if n % 2 else None, 9) for n, p in enumerate(prompts)]
    with Engine(model, tokenizer) as engine:
        engine.load_adapter("a", path)
        streams = [
            engine.submit(p, adapters={"a": n % 2}, max_tokens=9) for n, p in enumerate(prompts)
        ]
        assert [ids_of(stream) for stream in streams] == expected
        assert (engine.stats().rows_per_step == 1) == (name in ONE_BY_ONE)
    said = f"note: mlx-lm's {name} cannot compute rows of different lengths together"
    assert (said in capsys.readouterr().err) == (name in ONE_BY_ONE)


def test_several_adapters_and_scales_in_a_row(
    model: nn.Module, tokenizer: Tokenizer, adapters: dict[str, Adapter], files: dict[str, Path]
) -> None:
    prompt = prompt_of(0, 8)
    four, two = adapters["four"], adapters["two"]
    scales = [{"four": -0.5}, {"four": 2}, {"four": 0.0, "two": 0}, {"two": 1, "four": -2.0}]
    # These two are of different layers, so that they can be attached as one.
    negative = {n: -2 * a if n.endswith("lora_b") else a for n, a in four.tensors.items()}
    both = Adapter({**two.tensors, **negative}, {**two.layers, **four.layers})
    expected = [
        alone(model, prompt, four, 10, -0.5),
        alone(model, prompt, four, 10, 2.0),
        alone(model, prompt, None, 10),
        alone(model, prompt, both, 10),
    ]
    assert len(set(map(tuple, expected))) == 4
    with Engine(model, tokenizer) as engine:
        for name in ("two", "four"):
            engine.load_adapter(name, files[name])
        streams = [engine.submit(prompt, adapters=own, max_tokens=10) for own in scales]
        assert [ids_of(stream) for stream in streams] == expected


def test_log_probabilities_are_the_solo_run_s_to_1e_5(
    model: nn.Module, tokenizer: Tokenizer, adapters: dict[str, Adapter], files: dict[str, Path]
) -> None:
    prompt = prompt_of(1, 12)
    names: list[str | None] = [None, *NAMES]
    runs = [alone(model, prompt, adapters.get(name or ""), 6) for name in names]
    expected = []
    for name, tokens in zip(names, runs, strict=True):
        logits = logits_with(model, mx.array([prompt + tokens]), adapters.get(name or ""))
        logprobs = nn.log_softmax(logits[0, len(prompt) - 1 : -1], axis=-1)
        expected.append(np.array(logprobs))
    with Engine(model, tokenizer) as engine:
        for name in NAMES:
            engine.load_adapter(name, files[name])
        streams = [
            engine.submit(prompt, adapters={n: 1.0} if n else {}, max_tokens=6, logprobs=3)
            for n in names
        ]
        for stream, tokens, logprobs in zip(streams, runs, expected, strict=True):
            infos = stream.result().tokens
            assert [info.id for info in infos] == tokens
            for info, row in zip(infos, logprobs, strict=True):
                assert info.logprob == pytest.approx(row[info.id], abs=1e-5)
                likeliest = sorted(range(512), key=lambda place: -row[place])[:3]
                assert [each.id for each in info.top] == likeliest
                assert [each.logprob for each in info.top] == pytest.approx(
                    row[likeliest], abs=1e-5
                )


# Sampling


def test_a_sampled_token_is_among_its_alternatives(engine: Engine) -> None:
    answer = engine.generate("x", max_tokens=20, temperature=5.0, seed=1, logprobs=2)
    assert any(len(info.top) == 3 for info in answer.tokens)
    for info in answer.tokens:
        assert (info.id, info.logprob) in [(each.id, each.logprob) for each in info.top]
        assert len(info.top) == 2 + (info.id not in [each.id for each in info.top[:2]])


@pytest.mark.parametrize("settings", [{"max_rows": "4"}, {"max_adapters": 1.5}, {"max_rank": True}])
def test_limits_of_other_types_are_refused(
    settings: Any, model: nn.Module, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError, match=f"{next(iter(settings))} .*: must be a whole number"):
        Engine(model, tokenizer, **settings)


@pytest.mark.parametrize("name, path", [(5, "a"), (None, "a"), ("a", None), ("a", 3)])
def test_an_adapter_s_name_and_path_of_other_types_are_refused(
    name: Any, path: Any, engine: Engine
) -> None:
    with pytest.raises(InputError, match="must be a string"):
        engine.load_adapter(name, path)


@pytest.mark.parametrize("prompt", [5, None, b"x", {"a": 1}])
def test_a_prompt_of_another_type_is_refused(prompt: Any, engine: Engine) -> None:
    with pytest.raises(InputError, match="the prompt must be text or a list of token ids, not"):
        engine.submit(prompt)


@pytest.mark.parametrize(
    "settings", [{"adapters": ["a"]}, {"adapters": None}, {"stop": 5}, {"stop": None}]
)
def test_settings_of_other_types_are_refused(settings: Any, engine: Engine) -> None:
    with pytest.raises(InputError, match=r"adapters must be scales|must be a list of strings"):
        engine.submit("x", **settings)


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch(
    engine: Engine, files: dict[str, Path]
) -> None:
    engine.load_adapter("eight", files["eight"])
    prompt = prompt_of(2, 6)
    settings: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9}
    solo = ids_of(engine.submit(prompt, seed=7, **settings))
    others = [
        engine.submit(prompt_of(n, 3 + n), seed=n, adapters={"eight": n % 2}, **settings)
        for n in range(6)
    ]
    again = engine.submit(prompt, seed=7, **settings)
    assert ids_of(again) == solo
    assert ids_of(engine.submit(prompt, seed=8, **settings)) != solo
    unseeded = {tuple(ids_of(engine.submit(prompt, **settings))) for _ in range(3)}
    assert len(unseeded) > 1
    for stream in others:
        stream.result()


def test_a_stop_string_ends_an_answer_across_tokens(engine: Engine) -> None:
    whole = engine.generate("The quick", max_tokens=24)
    text = whole.text
    assert whole.finish_reason == "length" and len(text) > 12
    stop = next(text[n : n + 3] for n in range(5, len(text) - 3) if text.find(text[n : n + 3]) == n)
    cut = engine.generate("The quick", max_tokens=24, stop=["never", stop])
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
    assert len(cut.tokens) < len(whole.tokens)


def test_a_token_that_ends_texts_is_not_told(model: nn.Module, tokenizer: Tokenizer) -> None:
    prompt = prompt_of(3, 5)
    tokens = alone(model, prompt, None, 12)
    ending = next(token for n, token in enumerate(tokens) if n > 2 and token not in tokens[:n])
    tokenizer = Ending(tokenizer, ending)
    with Engine(model, tokenizer) as engine:
        found = engine.generate(prompt, max_tokens=12)
        assert [token.id for token in found.tokens] == tokens[: tokens.index(ending)]
        assert found.finish_reason == "stop"


class Ending:
    """A tokenizer with another token that ends texts."""

    def __init__(self, own: Tokenizer, token: int) -> None:
        self.encode, self.decode = own.encode, own.decode
        self.eos_token_id, self.eos_token_ids = token, {token}


def test_a_byte_level_tokenizer_streams_whole_characters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    write_hugging_face_tokenizer(folder)
    model, tokenizer, _ = load_model(folder)
    with Engine(model, tokenizer) as engine:
        stream = engine.submit("日本", max_tokens=30, temperature=2.0, seed=0)
        pieces = list(stream)
    tokens = [token.id for piece in pieces for token in piece.tokens]
    context = tokenizer.encode("日本")
    whole = tokenizer.decode([*context, *tokens])
    assert "".join(piece.text for piece in pieces) == whole[len(tokenizer.decode(context)) :]
    joined = b"".join(token.bytes for piece in pieces for token in piece.tokens)
    assert joined.decode("utf-8", "replace") == "".join(piece.text for piece in pieces)


class Script(nn.Module):
    """A model that says one token after another: `follow[last token]`."""

    def __init__(self, follow: dict[int, int], vocabulary: int = 400) -> None:
        super().__init__()
        self.layers: list[nn.Module] = []
        table = np.zeros((vocabulary, vocabulary), dtype=np.float32)
        for token, following in follow.items():
            table[token, following] = 10
        self.table = mx.array(table)

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        return self.table[inputs]


def said(tokenizer: Tokenizer, prompt: str, answer: Sequence[int], **settings: Any) -> list[str]:
    """The pieces of text of a model that answers a prompt so."""
    ids = [*tokenizer.encode(prompt)[-1:], *answer]
    script = Script(dict(pairwise(ids)))
    with Engine(script, tokenizer, max_rows=1) as engine:
        return [piece.text for piece in engine.submit(prompt, **settings)]


def words(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that does not begin there."""
    return tokenizer.encode(text)[1:]


def test_a_prompt_is_not_repeated_and_the_leading_space_of_an_answer_kept(
    tokenizer: Tokenizer,
) -> None:
    assert "".join(said(tokenizer, "A:", [*words(tokenizer, "The"), 2])) == " The"


def test_an_empty_prompt_starts_from_the_start_token(tokenizer: Tokenizer) -> None:
    ids = words(tokenizer, "The quick")
    assert "".join(said(tokenizer, "", [*ids, 2])) == "The quick"


def test_any_of_several_tokens_ends_a_text(base: Path) -> None:
    tokenizer = load_tokenizer(base, [7])
    ids = words(tokenizer, "The quick")
    assert "".join(said(tokenizer, "", [*ids, 7])) == "The quick"


def test_a_character_of_several_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    ids = [token for token in words(tokenizer, "x🦊") if token not in words(tokenizer, "x")]
    pieces = said(tokenizer, "x", [*ids, 2])
    assert len(ids) > 1 and [piece for piece in pieces if piece] == ["🦊"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_more_tokens_come_than_asked_for(tokenizer: Tokenizer, count: int) -> None:
    fox = words(tokenizer, "fox")[-1]
    pieces = said(tokenizer, "", [fox, fox], max_tokens=count)
    assert len(pieces) == count and "".join(pieces) == tokenizer.decode([fox] * count)


def test_an_eos_that_the_tokenizer_puts_after_the_prompt_is_taken_off(
    tokenizer: Tokenizer,
) -> None:
    own = Ending(tokenizer, 2)
    own.encode = lambda text: [*tokenizer.encode(text), 2]
    fox = words(tokenizer, "fox")[-1]
    script = Script({tokenizer.encode("A:")[-1]: fox, 2: 1})
    with Engine(script, own, max_rows=1) as engine:
        assert engine.generate("A:", max_tokens=1).text == " fox"


# A model with an adapter

ATTACHED: dict[str, dict[str, Any]] = {
    "LoRA": {"targets": "all-linear"},
    "DoRA": {"targets": "all-linear", "method": "dora"},
    "PiSSA": {"targets": "q_proj", "method": "pissa"},
    "VeRA": {"targets": "q_proj,v_proj", "method": "vera"},
    "(IA)3": {"targets": "k_proj,v_proj,down_proj", "method": "ia3"},
    "norms": {"targets": "all-norms", "method": "norm"},
    "whole weights": {"targets": "o_proj", "method": "full"},
    "merge-first": {"targets": "q_proj", "method": "merge-first"},
    "embedding": {"targets": "embed_tokens"},
    "experts": {"targets": "gate_proj,up_proj,down_proj"},
}


def adapt(model: nn.Module, settings: dict[str, Any]) -> None:
    """Attach an adapter that changes the model's answers."""
    attach(model, plan(model, **settings))
    for number, (_, layer) in enumerate(lora_layers(model)):
        key = mx.random.key(number)
        moved = tree_map(
            lambda array, key=key: array + 0.3 * mx.random.normal(array.shape, key=key),
            layer.trainable_parameters(),
        )
        layer.update(moved)  # and not evaluated: the engine has to
    model.eval()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ATTACHED)
def test_a_model_with_any_adapter_is_served_as_it_is(
    kind: str, bits: int | None, tokenizer: Tokenizer
) -> None:
    """Against whole forward passes without a cache."""
    config = {**SMALL, **ARCHITECTURES["mixtral"], "model_type": "mixtral"}
    model = make_model(config if kind == "experts" else LLAMA)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    model.eval()
    prompts = [prompt_of(1, 20), prompt_of(2, 5)]
    base = [alone(model, prompt, None, 8) for prompt in prompts]
    adapt(model, ATTACHED[kind])
    mine = Ending(tokenizer, 2)
    mine.eos_token_ids = set()
    for rows in (1, 4):
        with Engine(model, mine, max_rows=rows) as engine:
            streams = [engine.submit(prompt, max_tokens=8) for prompt in prompts]
            found = [ids_of(stream) for stream in streams]
            assert engine.bank_bytes == 0
        expected = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(8):
                ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
            expected.append(ids[len(prompt) :])
        assert found == expected != base


def test_no_adapter_is_loaded_beside_the_one_that_a_model_has(
    model: nn.Module, tokenizer: Tokenizer, adapters: dict[str, Adapter], files: dict[str, Path]
) -> None:
    with attached(model, adapters["thirty"]), Engine(model, tokenizer) as engine:
        with pytest.raises(AdapterDoesNotFit, match=r"one cannot be loaded: .*an adapter attached"):
            engine.load_adapter("one", files["one"])
        assert engine.adapters() == []
        expected = alone(model, [5, 6, 7], None, 6)
        assert ids_of(engine.submit([5, 6, 7], max_tokens=6)) == expected


# Scoring


def test_echo_scores_the_prompt_as_the_model_does(
    model: nn.Module, tokenizer: Tokenizer, adapters: dict[str, Adapter], files: dict[str, Path]
) -> None:
    prompt = prompt_of(4, 45)
    with_adapter = nn.log_softmax(logits_with(model, mx.array([prompt]), adapters["eight"])[0])
    with Engine(model, tokenizer, prefill_tokens=7) as engine:
        engine.load_adapter("eight", files["eight"])
        found = engine.generate(
            prompt, adapters={"eight": 1.0}, max_tokens=0, echo=True, logprobs=2
        )
        assert (found.text, found.tokens, found.finish_reason) == ("", [], "length")
        assert [token.id for token in found.prompt] == prompt
        assert found.prompt[0].logprob is None and found.prompt[0].top == []
        for place, token in enumerate(found.prompt[1:]):
            row = np.array(with_adapter[place])
            assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
            assert token.top[0][0] == int(row.argmax()) and len(token.top) in (2, 3)


def test_an_answer_after_echo_is_the_same_as_without(engine: Engine) -> None:
    for length in (1, 2, 20):
        prompt = prompt_of(5, length)
        echoed = engine.generate(prompt, max_tokens=8, echo=True)
        plain = engine.generate(prompt, max_tokens=8)
        assert [token.id for token in echoed.tokens] == [token.id for token in plain.tokens]
        assert len(echoed.prompt) == length and plain.prompt == []


# The prompt cache


def test_a_prompt_that_begins_alike_is_not_computed_again(
    model: nn.Module, tokenizer: Tokenizer, files: dict[str, Path], adapters: dict[str, Adapter]
) -> None:
    shared = prompt_of(6, 60)
    prompts = [[*shared, *prompt_of(7, 9)], [*shared, *prompt_of(8, 4)]]
    expected = [alone(model, prompt, adapters["two"], 10) for prompt in prompts]
    with Engine(model, tokenizer) as engine:
        engine.load_adapter("two", files["two"])
        engine.load_adapter("twin", files["two"])
        engine.load_adapter("four", files["four"])

        def cached(prompt: list[int], **scales: float) -> int:
            return engine.generate(prompt, adapters=scales, max_tokens=3).cached_tokens

        first = engine.generate(prompts[0], adapters={"two": 1.0}, max_tokens=10)
        second = engine.generate(prompts[1], adapters={"two": 1.0}, max_tokens=10)
        assert (first.cached_tokens, second.cached_tokens) == (0, 60)
        assert [[token.id for token in found.tokens] for found in (first, second)] == expected
        # What was said goes on from the answer; one token at least is computed.
        said = [*prompts[0], *expected[0]]
        assert cached([*said, 9, 9], two=1.0) == len(said)
        assert cached(prompts[0], two=1.0) == len(prompts[0]) - 1
        # The content counts, not the name; another scale or adapter is other content.
        assert cached(prompts[0], twin=1.0) == len(prompts[0]) - 1
        assert (
            cached(prompts[0], two=0.5) == cached(prompts[0], four=1.0) == cached(prompts[0]) == 0
        )
        engine.unload_adapter("two")
        assert cached(prompts[0], twin=1.0) == 0
        stats = engine.stats()
        assert stats.prompt_cache_hits == 4 and stats.prompt_cache_bytes > 0


def test_the_prompt_cache_has_a_bound(model: nn.Module, tokenizer: Tokenizer) -> None:
    one = 40 * 3 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, dims, bytes
    with Engine(model, tokenizer, prompt_cache_bytes=2 * one) as engine:
        for number in range(6):
            engine.generate(prompt_of(number, 39), max_tokens=1)
            assert engine.stats().prompt_cache_bytes <= 2 * one
        assert engine.stats().prompt_cache_bytes > 0
