from typing import Any

import graft  # noqa: F401
from graft.data import rows
from graft.data.chat_template import ChatFormat
from graft.data.examples import describe_split, tokenize_rows
from graft.data.readers import content_columns
from graft.data.rows import (
    Row,
    RowShape,
    content,
    content_fraction,
    content_keys,
    find_shape,
    raise_problems,
    row_problem,
)
from graft.data.tokenize import Passage
from graft.errors import InputError

import pytest

from support.byte_tokenizer import ByteTokenizer
from support.paths import ROOT

USER = {"role": "user", "content": "hi"}
CHAT = {"messages": [USER, {"role": "assistant", "content": "yo"}]}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion pair"),
        (CHAT, "chat"),
        ({**CHAT, "text": "rendered", "prompt": "hi"}, "chat"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "prompt-completion pair"),
        ({"text": "a", "messages": None}, "text"),
        ({"prompt": "a"}, None),
        ({"prompt": "a", "completion": None}, None),
        ({}, None),
    ],
)
def test_a_shape_is_known_by_its_keys(fields: dict[str, Any], name: str | None) -> None:
    shape = find_shape(fields)
    assert (shape and shape.name) == name
    assert (row_problem(fields) is None) == (name is not None)


def test_only_what_is_trained_on_is_content() -> None:
    assert content({"text": "a", "source": 1}) == {"text": "a"}
    assert content({**CHAT, "tools": [], "text": "b"}) == {**CHAT, "tools": []}
    assert content({"other": 1}) == {}


def test_contents_spread_evenly_and_order_of_keys_does_not_count() -> None:
    numbers = [content_fraction({"text": str(number)}) for number in range(2000)]
    for tenth in range(10):
        share = sum(tenth / 10 <= number < (tenth + 1) / 10 for number in numbers) / 2000
        assert 0.08 < share < 0.12
    one, two = {"prompt": "a", "completion": "b"}, {"completion": "b", "prompt": "a"}
    assert content_fraction(one) == content_fraction(two)


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


CALL = {"function": {"name": "add", "arguments": {}}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"question": "a"}, "this one has 'question'"),
        ({"prompt": "a", "completion": None}, "this one has 'prompt', 'completion' (null)"),
        ({"prompt": 1, "completion": "b"}, "'prompt' must be a string, not 1"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' must be a string, not ['b']"),
        (chat(), "'messages' must be a list that is not empty, not []"),
        ({"messages": "hi"}, "'messages' must be a list that is not empty, not 'hi'"),
        (chat("hi"), "message 1 must be a JSON object, not 'hi'"),
        (
            chat(USER, {"role": "bot", "content": "yo"}),
            "message 2 has the unknown role 'bot'; known are system, user, assistant, tool",
        ),
        (chat({"content": "yo"}), "message 1 has the unknown role None"),
        (chat({"role": ["user"], "content": "yo"}), "the unknown role ['user']"),
        (chat({"role": "user"}), "'content' of message 1 must be a string, not None"),
        (chat({"role": "user", "content": [1]}), "'content' of message 1 must be a string"),
        (chat({"role": "user", "content": "\ud83d"}), "half of a surrogate pair"),
        (chat({**USER, "name": "\ud83d"}), "message 1 contains half of a surrogate pair"),
        (chat(USER, tools=[{"name": "\ud83d"}]), "'tools' contains half of a surrogate pair"),
        (chat({"role": "assistant", "tool_calls": [1]}), "'tool_calls' of message 1"),
        (chat({"role": "assistant", "tool_calls": [{}]}), "'tool_calls' of message 1"),
        (chat(USER, tools="[1]"), "'tools' must be a list of JSON objects, not '[1]'"),
        (chat(USER, tools="{"), "'tools' must be a list of JSON objects"),
        (chat({**USER, "weight": 0.5}), "'weight' of message 1 must be 0 or 1, not 0.5"),
        (chat({**USER, "train": "no"}), "'train' of message 1 must be 0 or 1, not 'no'"),
        (chat(USER, weight=0), "'weight' is not supported: rows have no weights"),
        (chat(USER, system="Be brief."), "'system' is not supported: make it the first"),
        ({"prompt": "a", "completion": "b", "loss_mask": [0]}, "'loss_mask' is not supported"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], words: str) -> None:
    assert words in (row_problem(fields) or "")


@pytest.mark.parametrize(
    "fields",
    [
        chat(USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}),
        chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}),
        chat({"role": "system", "content": ""}, USER, tools=[CALL]),
        chat(USER, tools='[{"name": "add"}]'),
        {"prompt": "", "completion": ""},
        chat({**USER, "weight": None}, weight=1, system=""),
    ],
)
def test_what_fits_is_taken(fields: dict[str, Any]) -> None:
    assert row_problem(fields) is None


def test_five_problems_are_told_and_the_rest_counted() -> None:
    raise_problems([], noun="rows")
    with pytest.raises(InputError, match=r"^x:0: bad; .*x:4: bad \(and 2 more rows\)$"):
        raise_problems([(f"x:{number}", "bad") for number in range(7)], noun="rows")


def test_a_shape_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def passages(row: Row, chat_format: ChatFormat, mask_prompt: bool) -> list[Passage]:
        question = f"Q: {row.fields['question']}\nA: "
        text = question + row.fields["answer"]
        return [Passage(text, ((len(question), len(text)),))]

    fields = {"question": "a?", "answer": "b", "score": 1}
    assert "; this one has 'question', 'answer', 'score'" in (row_problem(fields) or "")
    shape = RowShape(
        "question", ("question", "answer"), lambda fields: None, passages, optional_keys=("hint",)
    )
    monkeypatch.setattr(rows, "ROW_SHAPES", [*rows.ROW_SHAPES, shape])
    assert row_problem(fields) is None
    assert content(fields) == {"question": "a?", "answer": "b"}
    assert content_columns(["score", "answer", "question", "hint"], "t") == [
        "answer",
        "question",
        "hint",
    ]
    assert "'question' with 'answer', or 'text', or 'prompt' with" in (row_problem({}) or "")
    split = tokenize_rows([Row(fields, "x:1")], ByteTokenizer(), max_length=99, mask_prompt=True)
    (example,) = split.examples
    assert example.tokens[example.loss_mask].tolist() == [3 + ord("b"), 2]
    assert describe_split(split, 99) == "1 row, 12 tokens, 2 trained: 1 question from "


def test_the_documentation_names_every_key() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [key for key in content_keys() if f"`{key}`" not in text] == []
