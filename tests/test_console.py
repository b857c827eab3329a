"""Sizes, suggestions, tables and bars as a person reads them."""

import io

from graft.console import bytes_text, did_you_mean, one_line, parse_bytes, progress_bar, table
from graft.errors import InputError

import pytest
from rich.console import Console


@pytest.mark.parametrize(
    "text, expected",
    [
        ("12GB", 12 * 10**9),
        ("900MB", 900 * 10**6),
        ("1.5GiB", 3 * 2**29),
        (" 2 tb ", 2 * 10**12),
        (".5KiB", 512),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "12", "GB", "-1GB", "0MB", "1,5GB", "12 parsecs", "nan GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a size: give one such as 12GB"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [999_400_000, 12_340_000_000, 5_000_000])
def test_sizes_are_told_as_they_are_read(size: int) -> None:
    assert parse_bytes(bytes_text(size)) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (109_400_000, "109 MB"),
        (999_600_000, "1.00 GB"),
        (25_200_000_000, "25.2 GB"),
        (1_234_000_000_000, "1234 GB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert bytes_text(size) == text


def test_the_nearest_name_is_suggested() -> None:
    assert (
        did_you_mean("lerning_rate", ["learning_rate", "rank"]) == "did you mean 'learning_rate'?"
    )
    assert did_you_mean("xyz", ["learning_rate", "rank"]) == ""


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    text = table(("name", "rank"), [("q_proj", "8"), ("v", "16")], right=["rank"])
    assert text == "name    rank\nq_proj     8\nv         16"


def test_a_bar_is_drawn_on_a_terminal_only() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal)
        with progress_bar("reading", 2, console=console) as update:
            update(completed=2)
        assert ("2/2" in file.getvalue()) is terminal
