import json
import random
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.errors import InputError
from graft.pretrained.tokenizer import (
    SentencePieceTokenizer,
    StreamingDecoder,
    Tokenizer,
    load_tokenizer,
)

import pytest

from support.tiny import TEXTS, write_hugging_face_tokenizer, write_sentencepiece

ROUND_TRIPS = [
    *TEXTS,
    " a",
    "  two spaces, then  two more  ",
    "a ",
    " ",
    "   ",
    "\n",
    "\n\n  indented\n\ttab\n",
    "a\r\nb",
    "\x00\x01",
    "never trained: ẞ Ж 漢 𝄞 👩‍👩‍👧 é",
    "▁ is the mark itself",
    "<s></s><unk>",
    "\u2028",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model")


@pytest.fixture(scope="module")
def ours(model_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model_file)


@pytest.fixture(scope="module")
def reference(model_file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(model_file))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_hugging_face_tokenizer(tmp_path_factory.mktemp("byte-level")))


def random_ids(size: int, *, count: int = 300, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [
        [generator.randrange(size) for _ in range(generator.randrange(1, 40))] for _ in range(count)
    ]


def stream(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = StreamingDecoder(tokenizer, context or ())
    return [*(decoder.add(token) for token in ids), decoder.finish()]


@pytest.mark.parametrize("text", [text for text in ROUND_TRIPS if "▁" not in text])
def test_a_text_comes_back_exactly(ours: SentencePieceTokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_ids_are_those_of_sentencepiece_after_bos(
    ours: SentencePieceTokenizer, reference: Any, text: str
) -> None:
    assert ours.encode(text) == [reference.bos_id(), *reference.encode(text)]
    assert ours.encode(text, add_special_tokens=False) == reference.encode(text)


def test_any_ids_decode_as_sentencepiece_decodes_them(
    ours: SentencePieceTokenizer, reference: Any
) -> None:
    for ids in random_ids(reference.vocab_size()):
        assert ours.decode(ids) == reference.decode(ids)


def test_bos_and_eos_are_the_models_own(ours: SentencePieceTokenizer, reference: Any) -> None:
    assert (ours.bos_token_id, ours.eos_token_id) == (reference.bos_id(), reference.eos_id())
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, {2})
    assert ours.vocab_size == reference.vocab_size()


def test_bos_and_eos_have_no_text(ours: SentencePieceTokenizer) -> None:
    ids = ours.encode("a b")
    assert ours.decode([*ids, ours.eos_token_id]) == "a b"
    assert ours.decode([ours.bos_token_id, ours.eos_token_id]) == ""


def test_the_text_of_a_control_token_is_no_control_token(ours: SentencePieceTokenizer) -> None:
    assert not {1, 2} & set(ours.encode("<s></s>", add_special_tokens=False))


def test_unknown_characters_fall_back_to_their_bytes(
    ours: SentencePieceTokenizer, reference: Any
) -> None:
    pieces = [reference.id_to_piece(token) for token in ours.encode("Ж", add_special_tokens=False)]
    assert pieces[-2:] == ["<0xD0>", "<0x96>"]


def test_half_a_character_is_the_replacement_character(
    ours: SentencePieceTokenizer, reference: Any
) -> None:
    assert ours.decode([reference.piece_to_id("<0xD0>")]) == "\ufffd"


def test_ids_above_the_vocabulary_have_no_text(ours: SentencePieceTokenizer) -> None:
    ids = ours.encode("a b")
    padded = [token for known in ids for token in (known, ours.vocab_size, ours.vocab_size + 99)]
    assert ours.decode(padded) == "a b"


@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_truncated_sentencepiece_model_is_refused(tmp_path: Path, model_file: Path) -> None:
    whole = model_file.read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_folder_with_a_sentencepiece_model_alone_uses_it(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file.parent)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize(("told", "expected"), [(7, {2, 7}), ([2, 8, 9], {2, 8, 9}), ([], {2})])
def test_further_ids_that_end_texts_are_added(
    model_file: Path, told: int | list[int], expected: set[int]
) -> None:
    assert load_tokenizer(model_file.parent, told).eos_token_ids == expected


def test_further_ids_are_added_to_a_hugging_face_tokenizer_too(tmp_path: Path) -> None:
    folder = write_hugging_face_tokenizer(tmp_path)
    assert load_tokenizer(folder).eos_token_ids == {0}
    assert load_tokenizer(folder, 7).eos_token_ids == {0, 7}
    assert load_tokenizer(folder, [7, 8]).eos_token_ids == {0, 7, 8}


def test_a_hugging_face_tokenizer_goes_before_a_sentencepiece_model(tmp_path: Path) -> None:
    write_hugging_face_tokenizer(tmp_path)
    write_sentencepiece(tmp_path / "tokenizer.model")
    assert not isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_a_text_comes_back_from_a_hugging_face_tokenizer(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer \(tokenizer\.json or tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer.json", text) for text in ("", "{", "[]", "{}", '{"model": {"type": "X"}}')),
        *(("tokenizer_config.json", text) for text in ("", "{", "[]", "5")),
    ],
)
def test_a_broken_hugging_face_tokenizer_is_one_line(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = write_hugging_face_tokenizer(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(folder)
    assert f"cannot read the tokenizer of {folder}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_streamed_pieces_make_up_the_text(ours: SentencePieceTokenizer) -> None:
    for ids in random_ids(ours.vocab_size):
        assert "".join(stream(ours, ids)) == ours.decode(ids)


def test_streamed_pieces_of_a_hugging_face_tokenizer_make_up_the_text(
    byte_level: Tokenizer,
) -> None:
    for ids in random_ids(400):
        assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_a_streamed_text_never_shows_part_of_a_character(
    ours: SentencePieceTokenizer, byte_level: Tokenizer, text: str
) -> None:
    for tokenizer in (ours, byte_level):
        pieces = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_whole_with_the_last(
    ours: SentencePieceTokenizer,
) -> None:
    *start, last = ours.encode("漢")
    decoder = StreamingDecoder(ours)
    assert [decoder.add(token) for token in start] == [""] * len(start)
    assert decoder.add(last) == "漢"
    assert decoder.finish() == ""


def test_each_token_of_plain_text_comes_at_once(ours: SentencePieceTokenizer) -> None:
    pieces = stream(ours, ours.encode("The quick brown fox", add_special_tokens=False))
    assert all(pieces[:-1]) and pieces[-1] == ""


def test_what_is_never_completed_comes_at_the_end(
    ours: SentencePieceTokenizer, reference: Any
) -> None:
    ids = [*ours.encode("a"), reference.piece_to_id("<0xD0>")]
    pieces = stream(ours, ids)
    assert pieces[-1] == "\ufffd" and "".join(pieces) == "a\ufffd"


@pytest.mark.parametrize("prompt", ["Q: What?\nA:", "a", "日本", "ends in a space "])
@pytest.mark.parametrize("answer", [" The quick", "brown", "\n\n", "Ж漢🙂", " "])
def test_an_answer_follows_its_prompt_as_if_decoded_together(
    ours: SentencePieceTokenizer, byte_level: Tokenizer, prompt: str, answer: str
) -> None:
    for tokenizer in (ours, byte_level):
        context = tokenizer.encode(prompt)
        if isinstance(tokenizer, SentencePieceTokenizer):
            ids = tokenizer.encode(answer, add_special_tokens=False)
        else:
            ids = tokenizer.encode(answer)
        together = tokenizer.decode([*context, *ids])
        assert prompt + "".join(stream(tokenizer, ids, context)) == together


def test_random_answers_follow_long_prompts_as_if_decoded_together(
    ours: SentencePieceTokenizer,
) -> None:
    context = ours.encode(" ".join(TEXTS))
    for ids in random_ids(ours.vocab_size, seed=1):
        together = ours.decode([*context, *ids])
        assert " ".join(TEXTS) + "".join(stream(ours, ids, context)) == together


def test_streaming_decodes_no_more_than_a_few_tokens_at_a_time(
    ours: SentencePieceTokenizer,
) -> None:
    sizes = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            sizes.append(len(ids))
            return ours.decode(ids)

    counting: Any = Counting()
    stream(counting, ours.encode("The quick brown fox jumps. " * 50))
    assert max(sizes) <= 8


def test_a_hugging_face_tokenizer_with_byte_fallback_streams_whole_characters(
    tmp_path: Path,
) -> None:
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    rust = Rust(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    rust.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("a a", " a  a ", "漢 🙂a\n漢字", "aЖaЖ"):
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert not any("\ufffd" in piece for piece in pieces)
