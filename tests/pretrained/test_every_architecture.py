"""What must hold for each architecture of mlx-lm, on tiny models: half a second for each."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from support.architectures import CHECKS, check_architecture, read_configs, read_notes


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """Compiling calls a C++ compiler on a CPU, which takes longer than all checks together."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in read_configs() if n not in read_notes()["untried"]])
def test_an_architecture_does_what_is_noted(name: str) -> None:
    """Loss and gradients, fast paths, files and serving, but for what the notes say."""
    check_architecture(name)


def test_the_notes_are_of_known_architectures_and_checks() -> None:
    notes, names = read_notes(), {check.__name__ for check in CHECKS}
    assert set(notes) == {"untried", "refused", "failing"}
    for part in notes.values():
        assert part.keys() <= read_configs().keys()
    assert all(set(checks) <= names for checks in notes["refused"].values())
    for reasons in notes["failing"].values():
        assert reasons.keys() <= names and all(reasons.values())
