"""Masks of random conversations under many styles of templates, against those of transformers."""

import json
import random
from collections.abc import Callable
from typing import Any

import graft  # noqa: F401
from graft.data.chat_template import ChatFormat
from graft.data.conversations import ChatError
from graft.data.examples import tokenize_rows
from graft.data.rows import Row, row_problem
from graft.data.tokenize import encode
from graft.pretrained.tokenizer import Tokenizer, load_tokenizer

import pytest

from support.chat_templates import SPECIAL_TOKENS, TEMPLATES, unmarked
from support.tiny import write_hugging_face_tokenizer

CONTENTS = [
    *("a", "Yes.", "2 + 2 = 4", "A café naïve 🙂", "日本語 and 🙂", "def f():\n    return 1\n"),
    *("", " ", "\n", " leading", "trailing ", "trailing\n", "\n\nboth\n", "\ta\t", "A", "B", "AB"),
    *("<|im_end|>", "x<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "[INST] x [/INST] y"),
    *("<|end|>", "<|user|>\nq", "</s>", "{{ 1 }}", "{% generation %}", "<end_of_turn>\n", "user"),
    *("<b>bold</b>", "### user:\n", "\u2028line", "e\u0301", "None", "assistant", "<|eot_id|>x"),
]
THOUGHTS = ["", "Hm.", "\nI think 🙂\n", "a"]
Chat = Callable[[str], Any]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """A tokenizer with all special tokens, whose template is set."""
    folder = write_hugging_face_tokenizer(tmp_path_factory.mktemp("chat"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "bos_token": "<s>"}
    settings |= {"additional_special_tokens": [*SPECIAL_TOKENS, "<|end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer: Any = load_tokenizer(folder)

    def set_template(template: str) -> Tokenizer:
        tokenizer._tokenizer.chat_template = template
        return tokenizer

    return set_template


def conversation(rng: random.Random, *, name: str) -> list[dict[str, Any]]:
    """Up to six turns, mostly alternating; with calls and reasoning where the template has them."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(CONTENTS)})
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.95:
            messages.append({"role": "user", "content": rng.choice(CONTENTS)})
        if rng.random() < 0.9:
            messages.append({"role": "assistant", "content": rng.choice(CONTENTS)})
        answer = messages[-1] if messages and messages[-1]["role"] == "assistant" else {}
        has_content = bool((answer.get("content") or "").strip())
        if has_content and name.startswith("qwen") and rng.random() < 0.4:
            thought = rng.choice(THOUGHTS)
            if rng.random() < 0.5:
                answer["reasoning_content"] = thought
            else:
                answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content']}"
        elif has_content and name == "gpt-oss" and rng.random() < 0.4:
            answer["thinking"] = rng.choice(THOUGHTS)
        if answer and rng.random() < 0.25 and "tool_call" in TEMPLATES[name]:
            call = {"name": rng.choice(["add", "f"]), "arguments": {"a": rng.choice(CONTENTS)}}
            answer["tool_calls"] = [{"type": "function", "function": call}]
            answer.pop("thinking", None)
            if rng.random() < 0.5:
                answer["content"] = None
            if rng.random() < 0.8:
                messages.append({"role": "tool", "content": rng.choice(CONTENTS)})
    return messages


def reference(tokenizer: Any, name: str, messages: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Token ids and mask of transformers, from the template with marks."""
    result = tokenizer._tokenizer.apply_chat_template(
        messages,
        chat_template=TEMPLATES[name],
        return_dict=True,
        return_assistant_tokens_mask=True,
        enable_thinking=True,
    )
    return result["input_ids"], [bool(mark) for mark in result["assistant_masks"]]


def check(chat: Chat, name: str, messages: list[dict[str, Any]], *, marked: bool) -> bool:
    """Compare with transformers; whether the template takes the conversation."""
    tokenizer = chat(TEMPLATES[name] if marked else unmarked(TEMPLATES[name]))
    try:
        (passage,) = ChatFormat(tokenizer).passages(messages, None, mask_prompt=True)
    except ChatError as error:
        assert "refuses this conversation" in str(error), (messages, error)
        with pytest.raises(Exception, match=r"must alternate|empty conversation"):
            reference(tokenizer, name, messages)
        return False
    (encoded,) = encode([passage], tokenizer)
    ids, mask = reference(tokenizer, name, messages)
    assert encoded.ids == ids
    assert encoded.loss_mask is not None
    assert encoded.loss_mask.tolist() == mask, (messages, passage)
    return True


def check_seeds(chat: Chat, name: str, seeds: range) -> None:
    taken = [
        check(chat, name, conversation(random.Random(f"{name} {seed}"), name=name), marked=False)
        for seed in seeds
    ]
    assert sum(taken) > len(seeds) // 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_equal_those_of_transformers(chat: Chat, name: str) -> None:
    check_seeds(chat, name, range(15))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_many_masks_equal_those_of_transformers(chat: Chat, name: str) -> None:
    check_seeds(chat, name, range(15, 300))


@pytest.mark.parametrize("name", ["chatml, closed", "qwen 3, opened", "gpt-oss"])
def test_the_marks_of_a_template_are_used(chat: Chat, name: str) -> None:
    for seed in range(5):
        messages = conversation(random.Random(seed), name=name)
        if messages:
            check(chat, name, messages, marked=True)
    # Also where nothing else tells what the assistant's part is.
    tokenizer = chat(
        "{% for m in messages %}{% generation %}{{ m.content[::-1] }}{% endgeneration %}"
        "{% endfor %}"
    )
    assert learnt(tokenizer, [*ASKED, said("abc")], mask_prompt=True)[0] == ["q", "cba"]


# What is left out, and what is not to be learnt


ASKED = [{"role": "user", "content": "q"}]


def said(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def learnt(
    tokenizer: Any, messages: list[dict[str, Any]], *, mask_prompt: bool
) -> tuple[list[str] | None, list[str]]:
    """What is learnt, and the notes."""
    chat_format = ChatFormat(tokenizer)
    (passage,) = chat_format.passages(messages, None, mask_prompt=mask_prompt)
    spans = passage.spans
    texts = None if spans is None else [passage.text[first:last] for first, last in spans]
    return texts, chat_format.notes()


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
NO_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("content", [None, ""])
def test_a_turn_that_lost_its_calls_is_not_learnt(chat: Chat, content: str | None) -> None:
    messages = [*ASKED, said(content, tool_calls=[CALL, CALL]), {"role": "tool", "content": "2"}]
    messages += [said("Two.")]
    texts, notes = learnt(chat(NO_CALLS), messages, mask_prompt=True)
    assert texts == ["Two.<|im_end|>"]
    assert notes[0] == "the chat template leaves out 2 tool calls"
    assert notes[1].startswith("not trained: 1 assistant turn")
    texts, notes = learnt(chat(NO_CALLS), messages, mask_prompt=False)
    assert texts is not None
    assert texts[0] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1].startswith("\n<|im_start|>tool")
    assert notes[0] == "the chat template leaves out 2 tool calls"


def test_what_a_template_leaves_out_is_counted(chat: Chat) -> None:
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    messages = [{"role": "system", "content": "q"}, *ASKED, said("q", thinking="Hm.")]
    _, notes = learnt(chat(silent), messages, mask_prompt=False)
    assert notes == ["the chat template leaves out 1 system message, 1 block of reasoning"]
    tokenizer = chat(unmarked(TEMPLATES["qwen 3"]))
    messages = [*ASKED, said("<think>\nHm.\n</think>\n\na"), *ASKED]
    messages += [said("", reasoning_content="r"), *ASKED, said("b")]
    texts, notes = learnt(tokenizer, messages, mask_prompt=True)
    assert texts == ["a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]
    assert notes[0] == "the chat template leaves out 2 blocks of reasoning"
    assert notes[1].startswith("not trained: 1 assistant turn")
    assert learnt(chat(NO_CALLS), [*ASKED, said("a")], mask_prompt=False) == (None, [])


def test_turns_without_a_stop_token_are_counted(chat: Chat) -> None:
    messages = [*ASKED, said("a"), *ASKED, said("b")]
    texts, notes = learnt(chat(unmarked(TEMPLATES["plain"])), messages, mask_prompt=True)
    assert texts == ["a", "b"]
    assert notes == [
        "2 of 2 trained assistant turns do not end with a token that stops generation "
        "(<|endoftext|>)"
    ]
    # Written once, at the end, which is then how an answer ends.
    last = "{% for m in messages %}{{ m.role + ': ' + m.content }} {% endfor %}{{ eos_token }}"
    texts, notes = learnt(chat(last), messages, mask_prompt=True)
    assert texts == ["a", "b <|endoftext|>"]
    assert notes[0].startswith("1 of 2 trained assistant turns do not end")


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("name", ["chatml", "mistral", None])
def test_a_turn_of_weight_0_is_never_learnt(chat: Chat, key: str, name: str | None) -> None:
    tokenizer = chat(unmarked(TEMPLATES[name])) if name else chat("")
    messages = [*ASKED, said("left out", **{key: 0}), *ASKED, said("taken", **{key: True})]
    row = Row({"messages": messages}, "x:1")
    assert row_problem(row.fields) is None
    for mask_prompt in (True, False):
        (example,) = tokenize_rows(
            [row], tokenizer, max_length=999, mask_prompt=mask_prompt
        ).examples
        text = tokenizer.decode(example.tokens[example.loss_mask].tolist())
        assert "left out" not in text and "taken" in text
        assert ("q" in text) == (not mask_prompt)
        whole = tokenizer.decode(example.tokens.tolist())
        stop = "<|im_end|>" if name == "chatml" else "<|endoftext|>"
        asked = 2 if name == "chatml" and not mask_prompt else 0
        assert text.count(stop) == whole.count(stop) - 1 - (2 - asked if name == "chatml" else 0)


def test_weights_that_cannot_be_honoured_are_refused(chat: Chat) -> None:
    chat_format = ChatFormat(chat(NO_CALLS))
    for weight, mask_prompt, words in [
        (0, False, "'weight' of message 1: messages of others are trained too"),
        (1, True, "'weight' of message 1: only the assistant's messages are trained"),
    ]:
        messages = [{**ASKED[0], "weight": weight}, said("a")]
        with pytest.raises(ChatError, match=words):
            chat_format.passages(messages, None, mask_prompt=mask_prompt)
        assert chat_format.passages(messages, None, mask_prompt=not mask_prompt)
