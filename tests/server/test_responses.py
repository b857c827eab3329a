"""Answers as OpenAI's reference shows them, from made-up tokens."""

from typing import Any

from graft.engine.streams import Piece, TokenInfo
from graft.server.requests import GenerationRequest
from graft.server.responses import (
    Answer,
    ChatCompletionFormat,
    CompletionFormat,
    chunk_response,
    response,
    usage_chunk,
)

A = TokenInfo(5, " a", b" a", -0.5, [(5, " a", -0.5), (6, " b", -1.5)])
HALF = TokenInfo(9, "\ufffd", b"\xc3", -0.25, [(9, "\ufffd", -0.25)])
FIRST = TokenInfo(1, "", b"")
PROMPT = TokenInfo(3, "Hi", b"Hi", -2.0, [(4, "Ho", -1.0)])
TEXT, CHAT = CompletionFormat(), ChatCompletionFormat()


def answer(**request: Any) -> Answer:
    asked = GenerationRequest(max_tokens=5, **request)
    return Answer("abc", "tiny", 1_700_000_000, asked, "Hi", [1, 3], 1, [FIRST, PROMPT])


def test_a_whole_completion() -> None:
    one = answer(prompt="Hi")
    assert response(TEXT, one, TEXT.whole(one, Piece(" a", [A]), "stop"), 1) == {
        "id": "cmpl-abc",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [{"index": 0, "text": " a", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 1,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_a_completion_s_logprobs_are_four_lists() -> None:
    one = answer(prompt="Hi", logprobs=2)
    assert TEXT.whole(one, Piece(" a", [A]), "length")["logprobs"] == {
        "tokens": [" a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{" a": -0.5, " b": -1.5}],
        "text_offset": [0],
    }


def test_echo_puts_the_prompt_before_the_answer() -> None:
    one = answer(prompt="Hi", logprobs=1, echo=True)
    choice = TEXT.whole(one, Piece(" a", [A]), "length")
    assert choice["text"] == "Hi a"
    assert choice["logprobs"] == {
        "tokens": ["", "Hi", " a"],
        "token_logprobs": [None, -2.0, -0.5],
        "top_logprobs": [None, {"Ho": -1.0}, {" a": -0.5, " b": -1.5}],
        "text_offset": [0, 0, 2],
    }


def test_a_completion_s_chunks_go_on_where_the_last_one_ended() -> None:
    one = answer(prompt="Hi", logprobs=0, echo=True, stream=True)
    (opening,) = TEXT.opening(one)
    assert (opening["text"], opening["logprobs"]["text_offset"]) == ("Hi", [0, 0])
    assert TEXT.chunk(one, Piece(" a", [A]))["logprobs"]["text_offset"] == [2]
    assert TEXT.chunk(one, Piece(" a", [A]))["logprobs"]["text_offset"] == [4]
    assert TEXT.closing("stop")["finish_reason"] == "stop"
    assert TEXT.opening(answer(prompt="Hi", stream=True)) == []


def test_a_whole_chat_completion() -> None:
    one = answer(logprobs=1)
    whole = response(CHAT, one, CHAT.whole(one, Piece("ü", [HALF]), "stop"), 1)
    assert (whole["id"], whole["object"]) == ("chatcmpl-abc", "chat.completion")
    token = {"token": "\ufffd", "logprob": -0.25, "bytes": [0xC3]}
    told = {**token, "bytes": list("\ufffd".encode())}
    assert whole["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ü", "refusal": None},
            "logprobs": {"content": [{**token, "top_logprobs": [told]}], "refusal": None},
            "finish_reason": "stop",
        }
    ]


def test_a_chat_s_chunks_open_with_the_role_and_close_without_text() -> None:
    one = answer(stream=True)
    (opening,) = CHAT.opening(one)
    assert opening == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert CHAT.chunk(one, Piece(" a", [A]))["delta"] == {"content": " a"}
    assert CHAT.closing("length")["delta"] == {}
    assert chunk_response(CHAT, one, opening)["object"] == "chat.completion.chunk"


def test_usage_is_null_until_the_last_chunk_where_it_is_asked_for() -> None:
    asked, plain = answer(include_usage=True), answer()
    assert chunk_response(CHAT, asked, {})["usage"] is None
    assert "usage" not in chunk_response(CHAT, plain, {})
    last = usage_chunk(CHAT, asked, 4)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6


def test_token_ids_are_told_where_asked_for() -> None:
    one = answer(prompt="Hi", return_token_ids=True)
    choice = TEXT.whole(one, Piece(" a", [A]), "stop")
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 3], [5])
    assert TEXT.opening(one)[0]["prompt_token_ids"] == [1, 3]
    assert CHAT.opening(one)[0]["prompt_token_ids"] == [1, 3]
    assert CHAT.chunk(one, Piece("", [HALF]))["token_ids"] == [9]
    assert "token_ids" not in CHAT.chunk(answer(), Piece(" a", [A]))
