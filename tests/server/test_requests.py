"""What a body may be, and that all which is wrong with one is told."""

import json
from typing import Any

from graft.server.errors import HttpError
from graft.server.requests import GenerationRequest, parse_body, parse_chat, parse_completion

import pytest

USER = [{"role": "user", "content": "Hello"}]


def refusal(parse: Any, body: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value


# JSON


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=["nothing", "cut", "bytes", "nan", "infinity", "digits", "depth"],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    error = refusal(parse_body, body)
    assert error.code == "invalid_json"
    assert error.message.startswith("the body is not valid JSON: ")


@pytest.mark.parametrize("body", [[], "text", 1, None])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert "it must be a JSON object" in refusal(parse_completion, body).message


# Completions


def test_a_completion_has_openai_s_defaults() -> None:
    expected = GenerationRequest(prompt="Hi", temperature=1.0, top_p=1.0)
    assert parse_completion({"prompt": "Hi"}) == expected


def test_null_is_as_not_given() -> None:
    body = {"prompt": "Hi", "max_tokens": None, "stop": None, "lora": None, "logprobs": None}
    assert parse_completion(body) == parse_completion({"prompt": "Hi"})


@pytest.mark.parametrize(
    "prompt, parsed", [("Hi", "Hi"), (["Hi"], "Hi"), ([1, 5], [1, 5]), ([[1, 5]], [1, 5])]
)
def test_a_prompt_is_text_or_ids_or_a_list_of_one_such(prompt: Any, parsed: Any) -> None:
    assert parse_completion({"prompt": prompt}).prompt == parsed


@pytest.mark.parametrize("prompt", [1, [], ["a", "b"], [1, "a"], [-1], [True], [1.5], "\ud800"])
def test_other_prompts_are_refused(prompt: Any) -> None:
    error = refusal(parse_completion, {"prompt": prompt})
    assert error.param == "prompt"
    assert "one prompt per request" in error.message


def test_all_wrong_fields_are_named_at_once() -> None:
    body = {
        "temperature": "hot",
        "top_p": 1.5,
        "max_tokens": True,
        "seed": 1.0,
        "stop": [""],
        "stream": 1,
        "logprobs": -1,
        "max_token": 5,
    }
    error = refusal(parse_completion, body)
    assert error.message.split("; ") == [
        "unknown field \"max_token\" (did you mean 'max_tokens'?)",
        "prompt is missing: it must be a string or a list of token ids, one prompt per request",
        'temperature is "hot": it must be a number from 0 to 2',
        "top_p is 1.5: it must be a number from 0 to 1",
        "max_tokens is true: it must be an integer from 0 to 2147483648",
        "seed is 1.0: it must be an integer from -9223372036854775808 to 9223372036854775807",
        'stop is [""]: it must be a string, or a list of up to 16, none empty',
        "stream is 1: it must be true or false",
        "logprobs is -1: it must be an integer from 0 to 20",
    ]


@pytest.mark.parametrize(
    "field, neutral, other",
    [
        ("n", 1, 2),
        ("best_of", 1, 3),
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, -1),
        ("repetition_penalty", 1, 1.1),
        ("logit_bias", {}, {"5": 1}),
        ("top_k", -1, 40),
        ("min_p", 0, 0.1),
        ("suffix", None, "end"),
    ],
)
def test_what_is_not_supported_is_refused_unless_it_changes_nothing(
    field: str, neutral: Any, other: Any
) -> None:
    body = {"prompt": "Hi"}
    assert parse_completion({**body, field: neutral}) == parse_completion(body)
    assert refusal(parse_completion, {**body, field: other}).param == field


def test_fields_that_change_no_answer_are_passed_over() -> None:
    body = {"prompt": "Hi", "user": "me", "metadata": {"a": 1}, "cache_prompt": True}
    assert parse_completion(body) == parse_completion({"prompt": "Hi"})


def test_a_long_value_has_no_prefix_in_the_message() -> None:
    message = refusal(parse_completion, {"prompt": "Hi", "seed": "x" * 1000}).message
    assert len(message) < 200


# Adapters


def test_adapters_are_told_by_ids_or_names_with_scales() -> None:
    by_id = parse_completion({"prompt": "Hi", "lora": [{"id": 0, "scale": 2}, {"id": 3}]})
    assert by_id.lora == [(0, 2.0), (3, 1.0)]
    assert parse_completion({"prompt": "Hi", "lora": []}).lora == []
    assert parse_completion({"prompt": "Hi", "adapters": "a/b"}).adapters == "a/b"
    by_name = parse_completion({"prompt": "Hi", "adapters": {"a": -0.5}})
    assert by_name.adapters == {"a": -0.5}


@pytest.mark.parametrize(
    "field, value",
    [
        ("lora", {"id": 0}),
        ("lora", [{"scale": 1}]),
        ("lora", [{"id": "0"}]),
        ("lora", [{"id": 0, "scale": 1000}]),
        ("lora", [{"id": 0, "weight": 1}]),
        ("adapters", ["a"]),
        ("adapters", ""),
        ("adapters", {"a": "1"}),
        ("adapters", {"a": True}),
    ],
)
def test_other_adapters_are_refused(field: str, value: Any) -> None:
    assert refusal(parse_completion, {"prompt": "Hi", field: value}).param == field


def test_a_number_that_is_infinite_is_refused() -> None:
    body = json.loads('{"prompt": "Hi", "temperature": 1e999}')
    assert refusal(parse_completion, body).param == "temperature"


# Chat


def test_a_chat_has_the_same_defaults() -> None:
    assert parse_chat({"messages": USER}) == GenerationRequest(messages=USER)


def test_max_completion_tokens_wins() -> None:
    body = {"messages": USER, "max_tokens": 5, "max_completion_tokens": 7}
    assert parse_chat(body).max_tokens == 7


def test_parts_become_text_and_a_developer_the_system() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts}, *USER]
    assert parse_chat({"messages": messages}).messages[0] == {
        "role": "system",
        "content": "Be brief.",
    }


def test_an_assistant_may_call_tools_without_text() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert parse_chat({"messages": messages}).messages[1]["content"] == ""


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "oracle", "content": "Hi"},
        {"role": ["user"], "content": "Hi"},
        {"content": "Hi"},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "user", "content": "Hi", "name": "\ud800"},
        "Hi",
    ],
)
def test_other_messages_are_refused(message: Any) -> None:
    assert refusal(parse_chat, {"messages": [message]}).param == "messages"


def test_a_chat_needs_a_message() -> None:
    assert refusal(parse_chat, {"messages": []}).param == "messages"
    assert refusal(parse_chat, {}).message.startswith("messages is missing")


def test_logprobs_are_a_choice_and_a_number() -> None:
    assert parse_chat({"messages": USER, "logprobs": False}).logprobs is None
    assert parse_chat({"messages": USER, "logprobs": True}).logprobs == 0
    body = {"messages": USER, "logprobs": True, "top_logprobs": 3}
    assert parse_chat(body).logprobs == 3
    error = refusal(parse_chat, {"messages": USER, "top_logprobs": 3})
    assert error.message == "top_logprobs is given: logprobs must be true"


def test_tools_are_shown_unless_none_is_to_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse_chat({"messages": USER, "tools": tools}).tools == tools
    assert parse_chat({"messages": USER, "tools": tools, "tool_choice": "none"}).tools == []
    body = {"messages": USER, "tools": tools, "tool_choice": "required"}
    assert refusal(parse_chat, body).param == "tool_choice"


def test_stream_options_ask_for_the_usage() -> None:
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    assert parse_chat(body).include_usage
    assert refusal(parse_chat, {**body, "stream_options": {"usage": True}}).param == (
        "stream_options"
    )
