"""graft/corpus/packages.py: finding what is installed, without importing it."""

import platform
from importlib import metadata
from pathlib import Path

from graft.corpus import packages
from graft.corpus.packages import find_packages

import pytest


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the search path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_packages_are_found_by_import_name_and_by_distribution() -> None:
    found, missing = find_packages(["yaml", "PyYAML", "mlx-lm", "json", "math"])
    assert [package.root for package in found] == ["yaml", "mlx_lm", "json", "math"]
    assert missing == []


def test_all_missing_names_are_reported() -> None:
    wrong = ["no_such_package", "a/b", "", ".json", "json.nothing", "__main__"]
    found, missing = find_packages(["json", *wrong])
    assert [package.root for package in found] == ["json"]
    assert missing == wrong


def test_a_part_of_a_package_can_be_asked_for_and_is_not_read_twice() -> None:
    found, _ = find_packages(["mlx.nn.losses", "mlx.nn", "mlx.nnn", "json"])
    assert [package.root for package in found] == ["mlx.nn", "json"]
    assert found[0].name == "mlx"


def test_versions_and_licences_are_those_of_the_distributions(site: Path) -> None:
    write(site, {"lonely.py": '"""A module."""\n'})
    found, _ = find_packages(["mlx", "json", "lonely"])
    assert [(one.version, one.licence) for one in found] == [
        (metadata.version("mlx"), "MIT"),
        (platform.python_version(), "PSF-2.0"),
        ("unknown", "not stated"),
    ]


def test_the_licence_is_taken_from_classifiers_where_the_field_is_a_whole_text(site: Path) -> None:
    header = "Metadata-Version: 2.1\nName: Some-Thing\nVersion: 7\nLicense: Copyright\n  holders\n"
    classifier = "Classifier: License :: OSI Approved :: MIT License\n"
    info = "some_thing-7.dist-info"
    write(site, {"thing/__init__.py": '"""A thing."""\n', f"{info}/METADATA": header + classifier})
    write(site, {f"{info}/RECORD": f"thing/__init__.py,,\n{info}/METADATA,,\n"})
    packages._owners.cache_clear()
    [package], _ = find_packages(["Some-Thing"])
    packages._owners.cache_clear()
    assert (package.root, package.version, package.licence) == ("thing", "7", "MIT License")


def test_parts_of_a_shared_namespace_have_their_own_provenance(site: Path) -> None:
    for number, name in enumerate(("alpha", "beta"), 1):
        info = f"shared_{name}-{number}.dist-info"
        text = (
            f"Metadata-Version: 2.1\nName: shared-{name}\nVersion: {number}\nLicense: L{number}\n"
        )
        files = [f"shared/cloud/{name}/__init__.py", f"shared/cloud/{name}/more.py"]
        write(site, dict.fromkeys(files, '"""Documented."""\n'))
        record = "".join(f"{file},,\n" for file in [*files, f"{info}/METADATA"])
        write(site, {f"{info}/METADATA": text, f"{info}/RECORD": record})
    packages._owners.cache_clear()
    found, missing = find_packages(["shared"])
    alone, _ = find_packages(["shared.cloud.beta"])
    packages._owners.cache_clear()
    assert missing == []
    assert [(one.root, one.version, one.licence) for one in found] == [
        ("shared.cloud.alpha", "1", "L1"),
        ("shared.cloud.beta", "2", "L2"),
    ]
    assert alone == found[1:]
