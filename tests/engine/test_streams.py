"""Answers come piece by piece, without stop strings, without parts of characters, and end once."""

import threading
import time
from pathlib import Path

from graft.engine.streams import Completion, Continuation, Piece, StopStrings, Stream, TokenInfo
from graft.pretrained.tokenizer import load_tokenizer

import pytest

from support.tiny import TEXTS, write_hugging_face_tokenizer, write_sentencepiece


def token(number: int) -> TokenInfo:
    return TokenInfo(number, "x", b"x")


# Streams


def test_pieces_come_in_order_and_then_none() -> None:
    stream = Stream("1", 3)
    assert stream.state == "queued" and not stream.ended
    for number in range(3):
        stream.put(Piece(str(number), [token(number)]))
    stream.end("finished", finish_reason="length")
    assert [piece.text for piece in stream] == ["0", "1", "2"]
    assert stream.get() is None and stream.get(timeout=0) is None
    assert (stream.state, stream.finish_reason) == ("finished", "length")


def test_the_result_is_all_pieces_together() -> None:
    stream = Stream("1", 3)
    stream.cached_tokens = 2
    stream.put(Piece("a", [token(1)]))
    stream.put(Piece("b", [token(2), token(3)]))
    stream.end("finished", finish_reason="stop")
    assert stream.result() == Completion("ab", [token(1), token(2), token(3)], "stop", 3, 2)


def test_nothing_in_time_is_a_timeout_and_what_comes_later_is_not_lost() -> None:
    stream = Stream("7", 3)
    with pytest.raises(TimeoutError, match=r"request 7: no piece in 0\.01 s"):
        stream.get(timeout=0.01)
    stream.put(Piece("a", []))
    assert stream.get(timeout=0) == Piece("a", [])


def test_a_reader_that_waits_is_woken() -> None:
    stream = Stream("1", 3)
    found: list[Piece | None] = []
    reader = threading.Thread(target=lambda: found.append(stream.get()))
    reader.start()
    time.sleep(0.01)
    stream.put(Piece("a", []))
    reader.join(timeout=5)
    assert found == [Piece("a", [])]


def test_a_failure_is_raised_after_the_pieces() -> None:
    stream = Stream("1", 3)
    stream.put(Piece("a", []))
    stream.end("failed", error=RuntimeError("no memory"))
    assert stream.get() == Piece("a", [])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            stream.get()


def test_a_stream_ends_once_and_then_is_not_cancelled() -> None:
    cancelled: list[str] = []
    stream = Stream("1", 3, lambda: cancelled.append("yes"))
    stream.cancel()
    assert cancelled == ["yes"]
    stream.end("cancelled")
    stream.end("finished", finish_reason="stop")
    stream.cancel()
    assert (stream.state, stream.finish_reason, cancelled) == ("cancelled", "cancelled", ["yes"])
    assert stream.result().finish_reason == "cancelled"


def test_subscribers_hear_of_every_piece_and_of_the_end() -> None:
    stream, heard = Stream("1", 3), []
    stream.subscribe(lambda: heard.append(stream.state))
    assert heard == []
    stream.put(Piece("a", []))
    stream.end("finished", finish_reason="stop")
    assert heard == ["queued", "finished"]
    stream.subscribe(lambda: heard.append("late"))
    assert heard[2:] == ["late"]


def test_a_subscriber_that_fails_harms_nobody() -> None:
    stream, heard = Stream("1", 3), []

    def fail() -> None:
        raise RuntimeError("the loop is closed")

    stream.subscribe(fail)
    stream.subscribe(lambda: heard.append(1))
    stream.put(Piece("a", []))
    assert heard == [1]


# Stop strings


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("hello world", ["wor"], "hello "),
        ("hello", ["x", ""], "hello"),
        ("aab", ["aab"], ""),
        ("aaab", ["aab"], "a"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("xabyz", ["xaby", "ab"], "x"),  # the one that ends first
        ("xab", ["b", "ab"], "x"),  # of those that end together, the longest
        ("end of", ["of course"], "end of"),
        ("日本語です", ["語"], "日本"),
    ],
)
def test_a_stop_string_ends_the_text_however_it_is_cut(
    text: str, stops: list[str], expected: str
) -> None:
    for size in range(1, len(text) + 1):
        strings, given, stopped = StopStrings(stops), "", False
        for start in range(0, len(text), size):
            more, stopped = strings.add(text[start : start + size])
            given += more
            assert not any(stop and stop in given for stop in stops)
            if stopped:
                break
        assert given + ("" if stopped else strings.finish()) == expected
        assert stopped == (expected != text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["<end>", "\n\n"])
    assert strings.add("a <") == ("a ", False)
    assert strings.add("en") == ("", False)
    assert strings.add("try>\n") == ("<entry>", False)
    assert strings.finish() == "\n"


# From tokens to text


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_become_the_text_without_broken_characters(
    kind: str, text: str, tmp_path: Path
) -> None:
    if kind == "sentencepiece":
        write_sentencepiece(tmp_path / "tokenizer.model")
    else:
        write_hugging_face_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("Well: " + text)
    prompt = tokenizer.encode("Well:")
    assert ids[: len(prompt)] == prompt
    continuation, pieces = Continuation(tokenizer, prompt, []), []
    for number in ids[len(prompt) :]:
        piece, stopped = continuation.add(number)
        assert "\ufffd" not in piece and not stopped
        pieces.append(piece)
    assert "".join(pieces) + continuation.finish()[0] == " " + text


def test_a_stop_string_across_tokens_is_found(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("The quick brown fox jumps")
    continuation, text, stopped = Continuation(tokenizer, ids[:1], ["k brow"]), "", False
    for number in ids[1:]:
        piece, stopped = continuation.add(number)
        text += piece
        if stopped:
            break
    assert stopped and text.strip() == "The quic"


def test_an_unfinished_character_at_the_end_is_told_as_such(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("x\N{GREEK CAPITAL LETTER OMEGA}")
    continuation = Continuation(tokenizer, ids[:-2], [])
    assert continuation.add(ids[-2]) == ("", False)
    assert continuation.finish() == ("\ufffd", False)
