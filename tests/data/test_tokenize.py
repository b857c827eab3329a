from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.data.tokenize import Passage, encode, span_mask, tokenizer_digest
from graft.pretrained.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

import pytest

from support.byte_tokenizer import ByteTokenizer
from support.tiny import TEXTS, write_hugging_face_tokenizer, write_sentencepiece

MANY = [*TEXTS, "", " ", "\n\n x", "a🙂", "🙂🙂", "e\u0301"] * 250  # more than one batch


class Pairs(ByteTokenizer):
    """Joins two bytes from the start on, so that a longer text has other tokens."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raw = text.encode()
        return [int.from_bytes(raw[at : at + 2]) for at in range(0, len(raw), 2)]


@pytest.fixture(scope="module", params=["sentencepiece", "hugging face", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return SentencePieceTokenizer(write_sentencepiece(folder / "tokenizer.model"))
    if request.param == "bytes":
        return ByteTokenizer()
    return load_tokenizer(write_hugging_face_tokenizer(folder))


@pytest.mark.parametrize("marked", [False, True])
def test_many_at_once_are_what_each_is_alone(tokenizer: Any, marked: bool) -> None:
    passages = [
        Passage(text, () if marked else None, starts=number % 3 > 0)
        for number, text in enumerate(MANY)
    ]
    found = encode(passages, tokenizer)
    assert [one.ids for one in found] == [
        tokenizer.encode(one.text, **({} if one.starts else {"add_special_tokens": False}))
        for one in passages
    ]


@pytest.mark.parametrize("text", [text for text in TEXTS if len(text) > 20])
def test_marked_tokens_say_what_the_span_says(tokenizer: Any, text: str) -> None:
    # Every cut at which the text's own tokens divide: there a mark has to be exact.
    ids = tokenizer.encode(text)
    exact = 0
    for cut in range(1, len(text)):
        before = tokenizer.encode(text[:cut])
        if ids[: len(before)] != before:
            continue
        (one,) = encode([Passage(text, ((cut, len(text)),))], tokenizer)
        (other,) = encode([Passage(text, ((0, cut),))], tokenizer)
        assert one.loss_mask is not None and other.loss_mask is not None
        assert one.loss_mask.tolist() == [at >= len(before) for at in range(len(ids))], text[:cut]
        start = len(tokenizer.encode(""))  # what begins a text says nothing
        assert (
            other.loss_mask[start : len(before)].all() and not other.loss_mask[len(before) :].any()
        )
        exact += 1
    assert exact > 5


def test_a_token_across_the_edge_is_marked_whole() -> None:
    #                     "ab"    "cd"    "ef"
    marks = span_mask([(0, 2), (2, 4), (4, 6)], [(3, 4)])
    assert marks.tolist() == [False, True, False]
    assert span_mask([(0, 2), (2, 4), (4, 6)], [(1, 5)]).tolist() == [True, True, True]
    assert span_mask([(0, 2), (2, 4)], [(2, 2)]).tolist() == [False, False]
    assert span_mask([], [(0, 1)]).tolist() == []


def test_all_tokens_of_one_character_are_marked_and_spaces_left_out_count() -> None:
    # Four byte tokens of a character; then " x" whose offsets leave the space out.
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (3, 4)]
    assert span_mask(offsets, [(1, 2)]).tolist() == [False, True, True, True, True, False]
    assert span_mask(offsets, [(2, 3)]).tolist() == [False, False, False, False, False, True]


def test_characters_of_several_tokens_are_marked_whole_by_sentencepiece(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(write_sentencepiece(tmp_path / "tokenizer.model"))
    text = "A: 𝄞"  # never seen in training, so its four bytes are four tokens
    (one,) = encode([Passage(text, ((3, 4),))], tokenizer)
    assert one.loss_mask is not None
    assert one.loss_mask.tolist() == [False] * (len(one.ids) - 4) + [True] * 4


def test_tokens_that_prefixes_do_not_keep_are_told() -> None:
    texts = [Passage("abcd", ((2, 4),)), Passage("abcd", ((1, 4),))]
    even, odd = encode(texts, Pairs())  # type: ignore[arg-type]
    assert even.loss_mask is not None and even.loss_mask.tolist() == [False, True]
    assert odd.loss_mask is None


def test_identity_is_of_the_content_not_the_place(tmp_path: Path) -> None:
    one = write_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "moved").mkdir()
    two = tmp_path / "moved" / "tokenizer.model"
    two.write_bytes(one.read_bytes())
    other = write_sentencepiece(tmp_path / "other.model", vocab_size=390)
    names = [tokenizer_digest(SentencePieceTokenizer(path)) for path in (one, two, other)]
    assert names[0] == names[1] != names[2]
    assert tokenizer_digest(ByteTokenizer()) is None  # type: ignore[arg-type]


def test_identity_of_hugging_face_s_covers_the_chat_template(tmp_path: Path) -> None:
    def named(folder: str, template: str) -> Tokenizer:
        written = write_hugging_face_tokenizer(tmp_path / folder)
        (written / "chat_template.jinja").write_text(template)
        return load_tokenizer(written)

    names = [
        tokenizer_digest(named(*pair))
        for pair in (("a", "{{ 1 }}"), ("b", "{{ 1 }}"), ("c", "{{ 2 }}"))
    ]
    assert names[0] is not None
    assert names[0] == names[1] != names[2]
