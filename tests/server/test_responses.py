"""Answers as OpenAI's reference shows them, from made-up tokens."""

from typing import Any

from graft.engine.streams import Alternative, Piece, TokenInfo
from graft.server.requests import GenerationRequest
from graft.server.responses import (
    Answer,
    ChatCompletionFormat,
    CompletionFormat,
    chunk_response,
    response,
    usage_chunk,
)

A = TokenInfo(
    5, " a", b" a", -0.5, [Alternative(5, " a", -0.5, b" a"), Alternative(6, " b", -1.5, b" b")]
)
HALF = TokenInfo(9, "\ufffd", b"\xc3", -0.25, [Alternative(9, "\ufffd", -0.25, b"\xc3")])
FIRST = TokenInfo(1, "", b"")
PROMPT = TokenInfo(3, "Hi", b"Hi", -2.0, [Alternative(4, "Ho", -1.0, b"Ho")])
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
    assert whole["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ü", "refusal": None},
            "logprobs": {"content": [{**token, "top_logprobs": [token]}], "refusal": None},
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


def test_offsets_index_the_text_also_within_characters() -> None:
    """SentencePiece writes a space before the text, and a character as several tokens of a byte."""
    text = "Q: é 😀 x"
    parts = [b"", b" Q", b":", b" ", *(bytes([byte]) for byte in "é".encode()), b" "]
    parts += [*(bytes([byte]) for byte in "😀".encode()), b" x"]
    tokens = [TokenInfo(n, part.decode("utf-8", "replace"), part) for n, part in enumerate(parts)]
    request = GenerationRequest(logprobs=0, echo=True)
    answer = Answer("a", "m", 0, request, text, [])
    answer.add_prompt(tokens, 0)
    after = [TokenInfo(50, " y", b" y"), TokenInfo(51, "z", b"z")]
    choice = CompletionFormat().whole(answer, Piece(" yz", after), "length")
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == [0, 0, 1, 2, 3, 3, 4, 5, 5, 5, 5, 6, 8, 10]
    assert choice["text"][offsets[2]] == ":" and choice["text"][offsets[-1]] == "z"


def test_alternatives_of_one_text_do_not_merge() -> None:
    top = [Alternative(3, "Q", -0.5, b"Q"), Alternative(70, "Q", -1.5, b"Q")]
    top.append(Alternative(240, "\ufffd", -2.5, b"\xf0"))
    token = TokenInfo(70, "Q", b"Q", -1.5, top)
    request = GenerationRequest(logprobs=3)
    answer = Answer("a", "m", 0, request, "", [])
    choice = CompletionFormat().chunk(answer, Piece("Q", [token]))
    assert choice["logprobs"]["top_logprobs"] == [{"token_id:3": -0.5, "Q": -1.5, "\ufffd": -2.5}]
    chat = ChatCompletionFormat().chunk(answer, Piece("Q", [token]))
    found = chat["logprobs"]["content"][0]["top_logprobs"]
    assert [each["bytes"] for each in found] == [[81], [81], [240]]
