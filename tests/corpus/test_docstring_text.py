"""graft/corpus/docstring_text.py: signatures go, and long texts end where a thought does."""

from graft.corpus.docstring_text import clean, shorten

import pytest

# As mlx.core (nanobind), NumPy (C and Cython), CPython and pybind11 write them.
SIGNED = {
    "abs(self, *, stream: Stream | None = None) -> mlx.core.array\n\nSee :func:`abs`.": (
        "See :func:`abs`."
    ),
    "def add(a: array, b: array) -> array:\nAdds two arrays.": "Adds two arrays.",
    "grad(f: Callable[P, R]) -> Callable[[P], tuple[array, array]]\n\nThe gradient.": (
        "The gradient."
    ),
    "split(a: array) -> (array, array)\n\nSplits.": "Splits.",
    "array(object, dtype=None,\n      like=None)\n\nCreate an array.": "Create an array.",
    "dtype(dtype, **kwargs)\n--\n\ndtype(dtype, copy=False)\n\nCreate a type.": "Create a type.",
    "a.sort(axis=-1)\n\nSort in place.": "Sort in place.",
    "deque([iterable[, maxlen]]) --> deque object\n\nA list-like sequence.": (
        "A list-like sequence."
    ),
    "log(x, [base=math.e])\nReturn the logarithm.": "Return the logarithm.",
    "f(*args, **kwargs)\nOverloaded function.\n\n1. f(x: int) -> int\n\nCounts.\n\n"
    "2. f(x: str) -> str\n\nCounts.\n\nTwice.": "Counts.\n\nTwice.",
    "close(self) -> None": "",
}

WHOLE = [
    "dict() -> new empty dictionary\ndict(mapping) -> new dictionary",
    "S.index(value) -> integer -- return first index of value.",
    "range(stop) -> range object\n    that counts",
    "reverse(x) reverses x.",
    "D.reverse() -- reverse *IN PLACE*",
    "sum(x",
    "Sums (all) numbers.",
]


@pytest.mark.parametrize("doc", SIGNED)
def test_signatures_at_the_head_go(doc: str) -> None:
    assert clean(doc) == SIGNED[doc]


@pytest.mark.parametrize("doc", WHOLE)
def test_what_only_looks_like_a_signature_stays(doc: str) -> None:
    assert clean(doc) == doc


def test_blanks_and_odd_line_breaks_are_straightened() -> None:
    assert clean("\n One. \t\r\n\n\n\n  Two.\u2028Three.\n") == "One.\n\n  Two.\nThree."


def test_a_text_within_the_limit_is_kept() -> None:
    assert shorten("No end at all", 13) == "No end at all"


def test_a_long_text_ends_at_its_last_paragraph_end() -> None:
    text = "First words. More.\n\nSecond part\n\nThird part. And so on."
    assert shorten(text, 40) == "First words. More.\n\nSecond part"


@pytest.mark.parametrize("limit", [len("One two three."), 20, 30])
def test_without_a_paragraph_end_it_ends_at_a_sentence_end(limit: int) -> None:
    assert shorten("One two three. And a second sentence goes on", limit) == "One two three."


def test_a_paragraph_end_in_the_first_half_gives_way_to_a_later_sentence_end() -> None:
    text = "Short.\n\nA long second paragraph. It goes on and on without an end"
    assert shorten(text, 50) == "Short.\n\nA long second paragraph."


def test_a_paragraph_may_end_at_the_limit() -> None:
    assert shorten("Ten chars\n\nmore", 9) == "Ten chars"


@pytest.mark.parametrize(
    "start",
    [
        "Give units, e.g. ",
        "As J. Doe says, ",
        "See cf. ",
        "Take 1. ",
        "It sums.But not",
        "The mean of x.shape ",
        "Use approx. three ",
    ],
)
def test_a_full_stop_within_a_sentence_is_no_end(start: str) -> None:
    text = "First sentence here. " + start + "X" * 40
    assert shorten(text, len("First sentence here. " + start) + 5) == "First sentence here."


@pytest.mark.parametrize("announcement", ["For example:", "Notes\n-----", "**Features**"])
def test_a_text_does_not_end_with_an_announcement(announcement: str) -> None:
    text = f"One.\n\nTwo words.\n\n{announcement}\n\n" + "x" * 50
    assert shorten(text, len(text) - 50) == "One.\n\nTwo words."


def test_a_text_without_an_end_leaves_nothing() -> None:
    assert shorten("word " * 100, 50) == ""
