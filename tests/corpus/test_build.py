"""graft/corpus/build.py: a dataset is built, from the command's arguments to its files."""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from graft.cli.dataset import main
from graft.corpus import build as docstrings

import pytest

from support.paths import ROOT

SHIPPED = ROOT / "datasets" / "mlx-docs"
SPLITS = ("train", "valid", "test")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the search path, with a package of 40 functions in it."""
    folder = tmp_path / "site"
    (folder / "tools").mkdir(parents=True)
    functions = (f'def f{n}():\n    """Do the {n}th thing."""\n' for n in range(40))
    (folder / "tools" / "__init__.py").write_text("".join(functions))
    monkeypatch.syspath_prepend(folder)
    return folder


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    texts = {split: (folder / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    return {split: list(map(json.loads, text.splitlines())) for split, text in texts.items()}


def all_rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for rows in rows_of(folder).values() for row in rows]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def build(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_a_row_asks_for_an_object_and_answers_with_path_and_docstring(
    site: Path, tmp_path: Path
) -> None:
    code = 'class Pen:\n    """A pen — for £1."""\n    def write(self):\n        """Write."""\n'
    (site / "tools" / "__init__.py").write_text(code + '"""Not of a class."""\n')
    (site / "tools" / "more.py").write_text('"""More tools."""\n')
    assert build("tools", "--out", tmp_path / "out") == 0
    by_path = {row["source"]["path"]: row for row in all_rows_of(tmp_path / "out")}
    assert by_path.keys() == {"tools.Pen", "tools.Pen.write", "tools.more"}
    source = {"package": "tools", "version": "unknown"}
    assert by_path["tools.Pen"] == {
        "text": "Q: What is Pen in tools?\nA: tools.Pen A pen — for £1.",
        "source": {**source, "path": "tools.Pen", "kind": "class"},
    }
    assert by_path["tools.Pen.write"] == {
        "text": "Q: What is Pen.write in tools?\nA: tools.Pen.write Write.",
        "source": {**source, "path": "tools.Pen.write", "kind": "method"},
    }
    assert by_path["tools.more"]["text"] == "Q: What is more in tools?\nA: tools.more More tools."


def test_a_tenth_each_is_valid_and_test(site: Path, tmp_path: Path) -> None:
    assert build("tools", "--out", tmp_path / "out") == 0
    assert {name: len(rows) for name, rows in rows_of(tmp_path / "out").items()} == {
        "train": 32,
        "valid": 4,
        "test": 4,
    }


def test_the_files_depend_on_packages_and_seed_alone(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    for number, workers in enumerate(["1", "3"]):
        command = [sys.executable, "-m", "graft", "dataset", "json", "tools", "collections"]
        command += ["--out", "out", "--workers", workers]
        environment["PYTHONHASHSEED"] = str(number)
        place = tmp_path / str(number)
        place.mkdir()
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=place)
    built = files_in(tmp_path / "0" / "out")
    assert built == files_in(tmp_path / "1" / "out")
    assert build("tools", "--out", tmp_path / "one", "--seed", 1) == 0
    assert build("tools", "--out", tmp_path / "two", "--seed", 2) == 0
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert one["test"] != two["test"]
    assert sorted(map(str, all_rows_of(tmp_path / "one"))) == sorted(
        map(str, all_rows_of(tmp_path / "two"))
    )


def test_the_same_question_and_nearly_the_same_answer_stay_in_one_split(
    site: Path, tmp_path: Path
) -> None:
    words = "counts the leaves of every tree that grows in the old orchard"
    twins = (
        f'def leaf_count():\n    """This {words}."""\n'
        f'class LeafCount:\n    """A class."""\n'
        f'class Twin:\n    """This {words}, as `leaf_count` does."""\n'
    )
    with (site / "tools" / "__init__.py").open("a") as module:
        module.write(twins)
    together = {"tools.leaf_count", "tools.LeafCount", "tools.Twin"}
    for seed in range(8):
        assert build("tools", "--out", tmp_path / "out", "--seed", seed, "--force") == 0
        found = [
            together & {row["source"]["path"] for row in rows}
            for rows in rows_of(tmp_path / "out").values()
        ]
        assert sorted(map(len, found)) == [0, 0, 3]


def test_long_texts_are_shortened_at_an_end_and_counted(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = 'def long():\n    """One sentence. ' + "Another sentence. " * 50 + '"""\n'
    endless = 'def endless():\n    """' + "word " * 200 + '"""\n'
    with (site / "tools" / "__init__.py").open("a") as module:
        module.write(long + endless)
    assert build("tools", "--out", tmp_path / "out", "--max-chars", 300) == 0
    texts = {row["source"]["path"]: row["text"] for row in all_rows_of(tmp_path / "out")}
    assert 280 < len(texts["tools.long"]) <= 300
    assert texts["tools.long"].endswith("Another sentence.")
    printed = capsys.readouterr().out
    assert "shortened to the end of a paragraph or sentence: 1\n" in printed
    assert "  tools.endless: no sentence ends within 300 characters\n" in printed
    assert "tools.endless" not in texts


def test_what_is_left_out_is_listed_with_the_reason(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "tools" / "broken.py").write_text("def (:\n")
    (site / "tools" / "test_tools.py").write_text("")
    assert build("tools", "--out", tmp_path / "out") == 0
    expected = {
        "tools: test modules (1)": "they document tests",
        "tools.broken": "it cannot be parsed: SyntaxError: invalid syntax (line 1)",
    }
    printed = capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    for what, why in expected.items():
        assert f"  {what}: {why}\n" in printed
        assert f"- {what}: {why}\n" in card


def test_a_package_whose_import_crashes_is_read_all_the_same(site: Path, tmp_path: Path) -> None:
    module = site / "tools" / "__init__.py"
    module.write_text("import os\nos.abort()\n" + module.read_text())
    assert build("tools", "--out", tmp_path / "out") == 0
    assert len(all_rows_of(tmp_path / "out")) == 40


def test_off_a_terminal_only_plain_lines_are_printed(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build("tools", "--out", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == (
        f"tools unknown: 40 rows from 1 modules\n{tmp_path / 'out'}: 32 train, 4 valid, 4 test\n"
    )


def test_on_a_terminal_a_bar_counts_modules(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes any stream for a terminal
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert build("tools", "--out", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert "modules of tools" in err and "1/1" in err


def test_the_card_counts_rows_per_package_and_split(site: Path, tmp_path: Path) -> None:
    assert build("tools", "json", "--out", tmp_path / "out", "--seed", 7) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = rows_of(tmp_path / "out")
    for package, version, licence in (
        ("tools", "unknown", "not stated"),
        ("json", platform.python_version(), "PSF-2.0"),
    ):
        counts = (
            sum(row["source"]["package"] == package for row in rows[split]) for split in SPLITS
        )
        assert f"| {package} | {version} | {licence} | {' | '.join(map(str, counts))} |\n" in card
    totals = " | ".join(str(len(rows[split])) for split in SPLITS)
    assert f"| all | | | {totals} |\n" in card
    assert "python -m graft dataset tools json --out out --max-chars" in card
    assert "--seed 7" in card
    assert str(tmp_path) not in card


# Bad input


def test_everything_that_is_wrong_is_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    wrong = ["--test-fraction", 0.5, "--max-chars", 50, "--workers", 0]
    assert build("no_such", "json", "nor_this", "--out", tmp_path / "there", *wrong) == 2
    [line] = capsys.readouterr().err.splitlines()
    for part in (
        "not installed: 'no_such', 'nor_this'; install with pip or correct the spelling",
        "--test-fraction 0.5: give more than 0, less than 0.5",
        "--max-chars 50: give at least 200",
        "--workers 0: give at least 1",
        f"{tmp_path / 'there'} exists; choose another path, or add --force to replace it",
    ):
        assert part in line


@pytest.mark.parametrize("fraction", ["0", "-0.1", "0.5", "1", "nan"])
def test_a_fraction_leaves_rows_in_every_split(fraction: str, tmp_path: Path) -> None:
    assert build("json", "--out", tmp_path / "out", "--test-fraction", fraction) == 2
    assert list(tmp_path.iterdir()) == []


def test_packages_without_docstrings_are_named(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "silent.py").write_text("def f(): pass\n")
    (site / "mute.py").write_text("")
    assert build("silent", "tools", "mute", "--out", tmp_path / "out") == 2
    assert (
        capsys.readouterr().err
        == "error: no docstrings in mute, silent; leave these packages out\n"
    )
    assert not (tmp_path / "out").exists()


def test_too_few_rows_are_refused(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = 'def f():\n    """Do it."""\ndef g():\n    """Do it."""\nclass C:\n    """Be it."""\n'
    (site / "few.py").write_text(code)
    assert build("few", "--out", tmp_path / "out") == 2
    assert "3, with 2 different answers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/out", "file/deep/out"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docstrings, "read_package", None)
    (tmp_path / "file").write_text("kept")
    assert build("json", "--out", tmp_path / place, "--force") == 2
    assert "choose another path" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_force_replaces_a_dataset_and_nothing_else(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert build("json", "--out", out) == 0
    before = files_in(out)
    assert build("tools", "--out", out) == 2
    assert files_in(out) == before
    assert build("tools", "--out", out, "--force") == 0
    assert files_in(out) != before
    (out / "thesis.txt").write_text("the only copy")
    assert build("tools", "--out", out, "--force") == 2
    assert "--force would delete thesis.txt; choose another folder" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "the only copy"


def test_an_interruption_leaves_nothing_behind(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        written.append(sorted(path.name for path in tmp_path.rglob("*.jsonl")))
        if len(written) in (1, 41):
            raise KeyboardInterrupt

    written: list[list[str]] = []
    for place, moment in ((docstrings, "read_package"), (docstrings.DocumentationRow, "as_json")):
        with monkeypatch.context() as patch:
            patch.setattr(place, moment, interrupt)
            assert build("tools", "--out", tmp_path / "new" / "out") == 130
    assert written[0] == []
    assert written[-1] == ["train.jsonl", "valid.jsonl"]  # the last of 40 rows is in test
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr().err == "interrupted\n" * 2


# The dataset that is shipped


def test_the_shipped_dataset_teaches_relu() -> None:
    train = rows_of(SHIPPED)["train"]
    [row] = [row for row in train if row["source"]["path"] == "mlx.nn.relu"]
    assert row["text"] == (
        "Q: What is relu in mlx?\n"
        "A: mlx.nn.relu Applies the Rectified Linear Unit.\n\nSimply ``mx.maximum(x, 0)``."
    )


def test_the_shipped_dataset_leaks_nothing() -> None:
    splits_of: dict[str, set[str]] = {}
    for split, rows in rows_of(SHIPPED).items():
        for row in rows:
            question, answer = row["text"].split("\n", 1)
            docstring = answer.removeprefix(f"A: {row['source']['path']} ")
            for text in (question.replace("_", "").lower(), " ".join(docstring.lower().split())):
                splits_of.setdefault(text, set()).add(split)
    assert [text for text, found in splits_of.items() if len(found) > 1] == []


def test_the_shipped_card_counts_what_there_is() -> None:
    rows = rows_of(SHIPPED)
    [version] = {row["source"]["version"] for row in all_rows_of(SHIPPED)}
    counts = " | ".join(str(len(rows[split])) for split in SPLITS)
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert f"| mlx | {version} | MIT | {counts} |" in card
    shares = [len(rows[split]) / len(all_rows_of(SHIPPED)) for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    paths = Counter(row["source"]["path"] for row in all_rows_of(SHIPPED))
    assert max(paths.values()) == 1


def test_the_shipped_dataset_is_what_the_builder_makes(tmp_path: Path) -> None:
    [version] = {row["source"]["version"] for row in all_rows_of(SHIPPED)}
    if metadata.version("mlx") != version or sys.platform != "linux":
        pytest.skip(f"shipped for mlx {version} on Linux")
    assert build("mlx", "--out", tmp_path / "mlx-docs") == 0
    built, shipped = files_in(tmp_path / "mlx-docs"), files_in(SHIPPED)
    del built["README.md"], shipped["README.md"]  # it names the versions of Python and griffe
    assert built == shipped
