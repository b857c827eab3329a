import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.data.chat_template import ChatFormat
from graft.data.conversations import ChatError
from graft.data.tokenize import Passage, encode
from graft.pretrained.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

import pytest

from support.tiny import write_hugging_face_tokenizer, write_sentencepiece

# ChatML with the markers by which transformers finds what the assistant says.
MARKED = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{%- generation %}{{- m.content }}"
    "{%- for call in m.tool_calls %}{{- call.function.arguments | tojson }}{% endfor %}"
    "{{- '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- m.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: reasoning stays in the last turn only, which has an empty one where it has none.
FORGETFUL = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- if loop.last %}{{- '<think>' + (parts[0] if parts | length > 1 else '')"
    " + '</think>' }}{% endif %}"
    "{{- parts[-1] }}"
    "{%- else %}{{- m.content }}{% endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1's: the prompt opens a reasoning that no finished turn has.
OPENING = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|im_start|>' + m.content.split('</think>')[-1]"
    " + '<|im_end|>' }}"
    "{%- else %}{{- 'User ' + m.content }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|><think>\n' }}{% endif %}"
)
# As Llama 2's: no generation prompt, and turns that must alternate.
INSTRUCT = (
    "{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{% endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + '<|end|>' }}{% endif %}"
    "{%- endfor %}"
)
# Writes what depends on the content before it.
COUNTED = (
    "{%- for m in messages %}{{- m.role + ' ' + m.content | length | string + ': ' + m.content"
    " + '<|im_end|>' }}{% endfor %}"
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 🙂?"},
    {"role": "assistant", "content": "A café naïve 🙂"},
    {"role": "user", "content": "The quick brown fox?"},
    {"role": "assistant", "content": "\nIt jumps over the lazy dog. 日本語"},
]
Chat = Callable[[str | None], Tokenizer]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """Makes a tokenizer with a chat template."""
    folder = write_hugging_face_tokenizer(tmp_path_factory.mktemp("chat"))
    tokens = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]

    def make(template: str | None) -> Tokenizer:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        settings |= {"additional_special_tokens": tokens}
        settings |= {"chat_template": template} if template else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(folder)

    return make


def turns(tokenizer: Tokenizer, messages: list[Any], tools: Any = None) -> list[str]:
    """The text of each span that is learnt."""
    passages = ChatFormat(tokenizer).passages(messages, tools, mask_prompt=True)
    return [one.text[first:last] for one in passages for first, last in one.spans]


@pytest.mark.reference
@pytest.mark.parametrize("last", [3, 5])
def test_ids_and_marks_equal_those_of_transformers(chat: Chat, last: int) -> None:
    tokenizer: Any = chat(MARKED)
    (passage,) = ChatFormat(tokenizer).passages(TALK[:last], None, mask_prompt=True)
    (encoded,) = encode([passage], tokenizer)
    reference = tokenizer._tokenizer.apply_chat_template(
        TALK[:last], return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids == reference["input_ids"]
    assert encoded.loss_mask is not None
    assert encoded.loss_mask.tolist() == [bool(mark) for mark in reference["assistant_masks"]]
    assert 0 < encoded.loss_mask.sum() < len(encoded.ids)


def test_a_turn_goes_from_the_prompt_through_the_token_that_ends_it(chat: Chat) -> None:
    assert turns(chat(MARKED), TALK) == [
        "A café naïve 🙂<|im_end|>",
        "\nIt jumps over the lazy dog. 日本語<|im_end|>",
    ]


def test_tools_and_calls_are_rendered_and_calls_are_the_assistant_s(chat: Chat) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    tokenizer = chat(MARKED)
    tools = [{"type": "function", "function": {"name": "add"}}]
    (passage,) = ChatFormat(tokenizer).passages(messages, tools, mask_prompt=False)
    assert json.dumps(tools) in passage.text
    # Arguments that come as a string of JSON are handed on as what they say.
    assert turns(tokenizer, messages, tools) == ['{"a": 1}<|im_end|>', "Two.<|im_end|>"]


def test_a_template_that_forgets_the_reasoning_of_earlier_turns(chat: Chat) -> None:
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>First</think>1<|im_end|> is how turns end"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    assert turns(chat(FORGETFUL), messages) == [
        "1<|im_end|> is how turns end<|im_end|>",
        "<think></think>2<|im_end|>",
    ]


def test_a_prompt_that_opens_a_reasoning_the_turn_has_not(chat: Chat) -> None:
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>First</think><b>1</b>"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    assert turns(chat(OPENING), messages) == ["<b>1</b><|im_end|>", "2<|im_end|>"]


def test_a_template_without_a_generation_prompt(chat: Chat) -> None:
    assert turns(chat(INSTRUCT), TALK[1:]) == [
        " A café naïve 🙂<|end|>",
        " \nIt jumps over the lazy dog. 日本語<|end|>",
    ]


def test_an_assistant_that_speaks_first(chat: Chat) -> None:
    messages = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    assert turns(chat(MARKED), messages) == ["Hello<|im_end|>"]


def test_turns_that_cannot_be_told_apart_are_refused(chat: Chat) -> None:
    with pytest.raises(ChatError, match="where message 3 starts cannot be told"):
        turns(chat(COUNTED), TALK)
    # Unmasked, the same conversation is fine.
    assert (
        ChatFormat(chat(COUNTED))
        .passages(TALK, None, mask_prompt=False)[0]
        .text.startswith("system")
    )


def test_what_the_template_refuses_is_told_in_its_words(chat: Chat) -> None:
    with pytest.raises(ChatError, match="refuses this conversation: roles must alternate"):
        turns(chat(INSTRUCT), TALK)


def test_today_is_always_the_same_day(chat: Chat) -> None:
    tokenizer = chat(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (passage,) = ChatFormat(tokenizer).passages(TALK[1:2], None, mask_prompt=False)
    assert passage.text == "26 Jul 2024What is 🙂?"


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_without_a_template_a_conversation_is_plain_lines(
    chat: Chat, tmp_path: Path, kind: str
) -> None:
    tokenizer: Tokenizer = (
        SentencePieceTokenizer(write_sentencepiece(tmp_path / "tokenizer.model"))
        if kind == "sentencepiece"
        else chat(None)
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "leave"}, "id": "1"}]},
        {"role": "tool", "content": "gone"},
    ]
    found = ChatFormat(tokenizer).passages(messages, [{"name": "leave"}], mask_prompt=True)
    first = 'Tools: [{"name": "leave"}]\nSystem: Be brief.\nUser: Hello\nAssistant: Hello!'
    second = 'User: Bye\nAssistant: {"name": "leave"}'
    assert found == [
        Passage(first, ((len(first) - len(" Hello!"), len(first)),)),
        Passage(second, ((len(second) - len(' {"name": "leave"}'), len(second)),), starts=False),
        Passage("Tool: gone", (), starts=False, ends=False),
    ]


# Conversations to continue


def test_a_prompt_without_a_template_ends_where_the_assistant_begins(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(write_sentencepiece(tmp_path / "tokenizer.model"))
    chat = ChatFormat(tokenizer)
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    again = [*asked, {"role": "user", "content": "Bye"}]
    first = tokenizer.encode("User: Hi\nAssistant: Hello")
    bare = {"add_special_tokens": False}
    assert chat.prompt_ids(asked[:1], None) == tokenizer.encode("User: Hi\nAssistant:")
    assert chat.prompt_ids(again, None) == [
        *first,
        tokenizer.eos_token_id,
        *tokenizer.encode("User: Bye\nAssistant:", **bare),
    ]
    assert chat.prompt_ids(asked, None) == [
        *first,
        tokenizer.eos_token_id,
        *tokenizer.encode("Assistant:", **bare),
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ 10 ** 10 ** 10 }}", "power"),
        ("{{ 'a'.ljust(9999999999) }}", "a number above 1,000,000"),
        ("{% for", "unexpected"),
        ("{{ raise_exception(messages | length * 'no\n') }}", "no"),
        ("{{ '\ud83d' }}", "as text"),
    ],
)
def test_a_template_that_fails_is_refused_in_one_line(
    chat: Chat, template: str, reason: str
) -> None:
    with pytest.raises(ChatError, match=reason) as refusal:
        ChatFormat(chat(template)).prompt_ids(TALK, None)
    assert "\n" not in str(refusal.value)


def test_a_template_cannot_run_forever_or_fill_the_memory(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.data.chat_template.RENDER_SECONDS", 0.2)
    monkeypatch.setattr("graft.data.chat_template.RENDER_BYTES", 1 << 27)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    calls = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    doubled = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
    for template, reason in {
        loops: "more than 0.2 seconds",
        calls + "{{ f(90) }}": "more than 0.2 seconds",
        doubled + "{% endfor %}": "128 MiB|0.2 seconds|memory",
    }.items():
        with pytest.raises(ChatError, match=reason):
            ChatFormat(chat(template)).prompt_ids(TALK, None)
    assert ChatFormat(chat(MARKED)).prompt_ids(TALK, None)
