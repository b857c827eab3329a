import json
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.data import examples, readers
from graft.data.examples import (
    Example,
    Split,
    describe_split,
    load_splits,
    tokenize_documents,
    tokenize_rows,
)
from graft.data.rows import Row
from graft.engine.engine import Engine
from graft.errors import InputError
from graft.pretrained.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

import numpy as np
import pytest

from support.byte_tokenizer import ByteTokenizer
from support.tiny import (
    LLAMA,
    TEXTS,
    make_model,
    write_hugging_face_tokenizer,
    write_rows,
    write_sentencepiece,
)


class WithoutEnd(ByteTokenizer):
    eos_token_id = -1


class WithNoneForEnd(ByteTokenizer):
    eos_token_id = None


class EndsItself(ByteTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*super().encode(text, add_special_tokens=add_special_tokens), 2]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return SentencePieceTokenizer(write_sentencepiece(path))


def write_starting_tokenizer(folder: Path) -> Path:
    """A Hugging Face tokenizer that starts texts with `<s>`, id 1, and ends them with `</s>`, 2."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import processors

    write_hugging_face_tokenizer(folder, special_tokens=["<unk>", "<s>", "</s>"])
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rows(*texts: str) -> list[Row]:
    return [Row({"text": text}, f"rows:{number}") for number, text in enumerate(texts, 1)]


def test_a_row_ends_with_eos_and_all_but_its_first_token_is_trained() -> None:
    split = tokenize_rows(rows("ab"), ByteTokenizer(), max_length=10)
    (example,) = split.examples
    assert example.tokens.tolist() == [1, 100, 101, 2]
    assert example.loss_mask.tolist() == [False, True, True, True]
    assert (example.tokens.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)
    assert len(example) == 4


def test_rows_that_are_cut_are_counted_and_have_no_eos() -> None:
    texts = ["a" * length for length in (7, 8, 9, 20)]  # with BOS and EOS 9, 10, 11 and 22
    split = tokenize_rows(rows(*texts), ByteTokenizer(), max_length=10)
    assert split.truncated == 2
    assert [len(example) for example in split.examples] == [9, 10, 10, 10]
    assert [example.tokens[-1] == 2 for example in split.examples] == [True, True, False, False]
    assert all(example.loss_mask[1:].all() for example in split.examples)


def test_a_row_that_loses_only_its_eos_counts_as_cut() -> None:
    split = tokenize_rows(rows("a" * 9), ByteTokenizer(), max_length=10)
    assert (split.truncated, split.examples[0].tokens[-1]) == (1, 100)


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_a_row_that_has_its_start_and_end_gets_no_second_ones(
    sentencepiece: SentencePieceTokenizer, tmp_path: Path, kind: str, mask_prompt: bool
) -> None:
    tokenizer: Any = sentencepiece
    if kind == "hugging face":
        tokenizer = load_tokenizer(write_starting_tokenizer(tmp_path))

    def tokens(prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        row = Row({"prompt": prompt, "completion": completion}, "x:1")
        split = tokenize_rows([row], tokenizer, max_length=99, mask_prompt=mask_prompt)
        return split.examples[0].tokens.tolist(), split.examples[0].loss_mask.tolist()

    plain = tokens("What is 🙂?", " A café.")
    assert tokens("<s>What is 🙂?", " A café.</s>") == plain
    assert plain[0].count(1) == 1 and plain[0].count(2) == 1
    with Engine(make_model(LLAMA), tokenizer) as engine:
        assert engine.encode("<s>What is 🙂?") == engine.encode("What is 🙂?")
        assert engine.encode("What is 🙂?")[:2] != [1, 1]


def test_a_row_that_ends_with_another_end_token_has_its_end() -> None:
    tokenizer: Any = ByteTokenizer()
    tokenizer.eos_token_ids = {2, 3 + ord("!")}
    (example,) = tokenize_rows(rows("a!"), tokenizer, max_length=10).examples
    assert example.tokens.tolist() == [1, 3 + ord("a"), 3 + ord("!")]


def test_eos_comes_once_where_the_tokenizer_adds_it() -> None:
    (example,) = tokenize_rows(rows("a"), EndsItself(), max_length=10).examples
    assert example.tokens.tolist() == [1, 100, 2]


@pytest.mark.parametrize("tokenizer", [WithoutEnd(), WithNoneForEnd()])
def test_a_tokenizer_without_eos_adds_none(tokenizer: ByteTokenizer) -> None:
    (example,) = tokenize_rows(rows("a"), tokenizer, max_length=10).examples
    assert example.tokens.tolist() == [1, 100]


def test_real_texts_come_back(sentencepiece: SentencePieceTokenizer) -> None:
    split = tokenize_rows(rows(*TEXTS), sentencepiece, max_length=500)
    assert len(split) == len(TEXTS) and split.truncated == 0
    for example, text in zip(split.examples, TEXTS, strict=True):
        assert example.tokens[0] == sentencepiece.bos_token_id
        assert example.tokens[-1] == sentencepiece.eos_token_id
        assert sentencepiece.decode(example.tokens.tolist()) == text


# Completions and chats


def learnt(tokenizer: Tokenizer, example: Example) -> str:
    return tokenizer.decode(example.tokens[example.loss_mask].tolist())


def test_masked_prompts_leave_the_completion_and_its_end(
    sentencepiece: SentencePieceTokenizer,
) -> None:
    fields = {"prompt": "Q: 🙂?\nA:", "completion": " The lazy dog."}
    row = Row(fields, "x:1")
    (masked,) = tokenize_rows([row], sentencepiece, max_length=99, mask_prompt=True).examples
    (whole,) = tokenize_rows([row], sentencepiece, max_length=99).examples
    assert masked.tokens.tolist() == whole.tokens.tolist()
    assert sentencepiece.decode(whole.tokens.tolist()) == fields["prompt"] + fields["completion"]
    before = len(sentencepiece.encode(fields["prompt"]))
    assert masked.loss_mask.tolist() == [at >= before for at in range(len(masked))]
    assert masked.tokens[-1] == sentencepiece.eos_token_id
    assert whole.loss_mask.tolist() == [at > 0 for at in range(len(whole))]


def test_without_eos_a_masked_row_learns_the_completion_alone() -> None:
    row = Row({"prompt": "ab", "completion": "cd"}, "x:1")
    for tokenizer, end in ((ByteTokenizer(), []), (EndsItself(), [2])):
        (example,) = tokenize_rows(
            [row], tokenizer, max_length=99, add_eos=False, mask_prompt=not end
        ).examples
        assert example.tokens.tolist() == [1, 100, 101, 102, 103, *end]
    (example,) = tokenize_rows(
        [row], ByteTokenizer(), max_length=99, add_eos=False, mask_prompt=True
    ).examples
    assert example.loss_mask.tolist() == [False, False, False, True, True]


def test_rows_with_nothing_left_to_learn_are_skipped_and_counted() -> None:
    # mlx-lm's loss is NaN where the prompt fills the row: 0 / 0.
    lengths = {5: False, 8: False, 9: True, 12: True}  # of the prompt, and whether it fills a row
    data = [Row({"prompt": "p" * length, "completion": "c"}, f"x:{length}") for length in lengths]
    split = tokenize_rows(data, ByteTokenizer(), max_length=10, mask_prompt=True)
    assert (len(split), split.skipped, split.truncated) == (2, 2, 3)
    assert all(example.loss_mask.any() for example in split.examples)
    assert split.shape_counts == {"prompt-completion pair": 4}
    user = Row({"messages": [{"role": "user", "content": "anyone?"}]}, "x:1")
    split = tokenize_rows([*data[:1], user], ByteTokenizer(), max_length=99, mask_prompt=True)
    assert (len(split), split.skipped) == (1, 1)


def test_plain_chats_learn_the_assistant_and_each_end() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    row = Row({"messages": messages}, "x:1")
    (example,) = tokenize_rows([row], ByteTokenizer(), max_length=99, mask_prompt=True).examples
    first, second = "User: a\nAssistant: b", "User: c\nAssistant: d"
    byte_ids = [[3 + byte for byte in text.encode()] for text in (first, second)]
    assert example.tokens.tolist() == [1, *byte_ids[0], 2, *byte_ids[1], 2]
    marks = [0] * (1 + len(first) - 2) + [1, 1, 1] + [0] * (len(second) - 2) + [1, 1, 1]
    assert example.loss_mask.tolist() == [bool(mark) for mark in marks]


def test_text_has_no_prompt_to_mask(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows:2: --mask-prompt, but a text row has no prompt"):
        tokenize_rows(
            [Row({"prompt": "a", "completion": "b"}, "rows:1"), Row({"text": "c"}, "rows:2")],
            ByteTokenizer(),
            max_length=9,
            mask_prompt=True,
        )
    (tmp_path / "book.txt").write_text("a")
    with pytest.raises(InputError, match=r"--mask-prompt: .*book\.txt is plain text"):
        load(tmp_path / "book.txt", mask_prompt=True)


# Documents


@pytest.mark.parametrize("overlap", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("texts", [["a" * 30], ["ab", "c" * 17, "", "d" * 41, "e"], ["x"]])
def test_windows_learn_each_token_once_in_the_context_before_it(
    texts: list[str], overlap: int
) -> None:
    split = tokenize_documents(rows(*texts), ByteTokenizer(), max_length=10, overlap=overlap)
    stream = [token for text in texts for token in [*ByteTokenizer().encode(text), 2]]
    starts = {0, *(at + 1 for at, token in enumerate(stream[:-1]) if token == 2)}
    context = max(overlap, 1)
    times = np.zeros(len(stream), dtype=int)
    for number, window in enumerate(split.examples):
        at = number * (10 - context)
        assert window.tokens.tolist() == stream[at : at + 10]
        assert not window.loss_mask[: context if number else 1].any()
        times[at : at + len(window)] += window.loss_mask
    assert times.tolist() == [int(at not in starts) for at in range(len(stream))]
    assert all(len(window) == 10 for window in split.examples[:-1])
    assert split.trained_tokens == times.sum()
    assert split.shape_counts == {"document": len(texts)}


def test_a_piece_of_a_document_does_not_end() -> None:
    split = tokenize_documents(
        [Row({"text": "ab"}, "x", ends=False)], ByteTokenizer(), max_length=10
    )
    assert split.examples[0].tokens.tolist() == [1, 100, 101]


@pytest.mark.parametrize("overlap", [-1, 10, 11])
def test_an_overlap_fits_into_a_window(tmp_path: Path, overlap: int) -> None:
    (tmp_path / "book.txt").write_text("a")
    with pytest.raises(InputError, match=f"--overlap {overlap}: give at least 0 and less than"):
        load(tmp_path / "book.txt", max_length=10, overlap=overlap)


# A whole start


def load(data: Path, tokenizer: Tokenizer | None = None, **settings: Any) -> dict[str, Split]:
    settings = {"max_length": 50, **settings}
    return load_splits(str(data), tokenizer or ByteTokenizer(), ["train", "valid"], **settings)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def same(one: Split, two: Split) -> bool:
    return one.fingerprint == two.fingerprint and all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.loss_mask, b.loss_mask)
        for a, b in zip(one.examples, two.examples, strict=True)
    )


def test_a_second_start_tokenizes_nothing(
    tmp_path: Path,
    cache: Path,
    sentencepiece: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_rows(tmp_path / "data", train=TEXTS * 3, valid=["short", "x " * 80])
    first = load(data, sentencepiece)
    monkeypatch.setattr(SentencePieceTokenizer, "encode_many", None)
    unread = readers.FileReader("JSONL", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setitem(readers.FILE_READERS, ".jsonl", unread)
    moved = data.rename(tmp_path / "moved")
    second = load(moved, sentencepiece)
    assert [split.cached for split in (*first.values(), *second.values())] == [False] * 2 + [
        True
    ] * 2
    for name in ("train", "valid"):
        assert same(first[name], second[name])
        assert (first[name].truncated, first[name].shape_counts) == (
            second[name].truncated,
            second[name].shape_counts,
        )
        assert str(moved) in second[name].origin
    assert second["valid"].truncated == 1


def test_whatever_changes_the_tokens_is_tokenized_again(
    tmp_path: Path, cache: Path, sentencepiece: SentencePieceTokenizer
) -> None:
    data = write_rows(tmp_path / "data", train=[*TEXTS, *TEXTS], valid=TEXTS)
    load(data, sentencepiece)
    assert len(list(cache.iterdir())) == 2
    other = SentencePieceTokenizer(write_sentencepiece(tmp_path / "other.model", vocab_size=390))
    assert not load(data, other)["train"].cached
    assert not load(data, sentencepiece, max_length=49)["train"].cached
    assert not load(data, sentencepiece, add_eos=False)["train"].cached
    write_rows(data, train=[*TEXTS, "one more"])
    again = load(data, sentencepiece)
    assert [again[name].cached for name in ("train", "valid")] == [False, True]


def test_a_damaged_entry_is_made_again(
    tmp_path: Path,
    cache: Path,
    sentencepiece: SentencePieceTokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows(tmp_path / "data", train=TEXTS, valid=TEXTS)
    first = load(data, sentencepiece)
    for path in cache.iterdir():
        raw = path.read_bytes()
        path.write_bytes(raw[:300] + bytes(100) + raw[400:])
    again = load(data, sentencepiece)
    assert capsys.readouterr().err.count("is damaged") == 1  # train and valid share their tokens
    assert not again["train"].cached and same(first["train"], again["train"])
    assert load(data, sentencepiece)["train"].cached


def test_entries_of_another_format_are_left_alone(
    tmp_path: Path,
    cache: Path,
    sentencepiece: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows(tmp_path / "data", train=TEXTS, valid=TEXTS)
    monkeypatch.setattr(examples, "_CACHE_FORMAT", 1)
    first = load(data, sentencepiece)
    monkeypatch.undo()
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    again = load(data, sentencepiece)
    assert not again["train"].cached and same(first["train"], again["train"])
    assert capsys.readouterr() == ("", "")
    assert load(data, sentencepiece)["train"].cached


def test_a_tokenizer_that_cannot_be_named_is_not_cached(tmp_path: Path, cache: Path) -> None:
    data = write_rows(tmp_path / "data", train=["a"], valid=["b"])
    assert not load(data)["train"].cached
    assert not load(data)["train"].cached
    assert not cache.exists()


def test_the_fingerprint_is_of_ids_marks_and_their_division() -> None:
    def of(*texts: str, **settings: Any) -> str:
        return tokenize_rows(
            rows(*texts), ByteTokenizer(), max_length=9, add_eos=False, **settings
        ).fingerprint

    assert of("ab", "c") == of("ab", "c")
    assert len({of("ab", "c"), of("c", "ab"), of("a", "bc"), of("ab"), of("abc")}) == 5
    row = [Row({"prompt": "a", "completion": "b"}, "x")]
    masks = [
        tokenize_rows(row, ByteTokenizer(), max_length=9, mask_prompt=mask)
        for mask in (True, False)
    ]
    assert masks[0].fingerprint != masks[1].fingerprint


def test_the_shapes_may_be_mixed_and_are_told(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [
        chat,
        chat,
        {"prompt": "a", "completion": "b" * 90},
        {"prompt": "p" * 90, "completion": ""},
    ]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    write_rows(tmp_path, valid=["unused"])
    (split,) = load_splits(
        str(tmp_path), ByteTokenizer(), ["train"], max_length=50, mask_prompt=True
    ).values()
    assert describe_split(split, 50) == (
        "3 rows, 94 tokens, 54 trained, 2 truncated to 50 tokens, 1 skipped with nothing to train "
        "on: "
        f"2 chats and 2 prompt-completion pairs from {data}"
    )


def test_nothing_to_train_on_at_all_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "pppppppppp", "completion": "c"}\n' * 3)
    with pytest.raises(InputError, match=r"no row has anything to train on \(3 skipped"):
        load_splits(
            str(path), ByteTokenizer(), ["test"], max_length=9, mask_prompt=True, valid_fraction=1
        )


def test_what_a_chat_template_refuses_is_named_by_row(
    tmp_path: Path,
) -> None:
    folder = write_hugging_face_tokenizer(tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_text(
        "{{ raise_exception('no ' + messages[0].content) }}"
    )
    messages = [[{"role": "user", "content": text}] for text in ("a", "b")]
    data = [Row({"messages": one}, f"x.jsonl:{at}") for at, one in enumerate(messages, 1)]
    with pytest.raises(InputError) as error:
        tokenize_rows(data, load_tokenizer(folder), max_length=9)
    assert str(error.value) == (
        "x.jsonl:1: the model's chat template refuses this conversation: no a; "
        "x.jsonl:2: the model's chat template refuses this conversation: no b"
    )
