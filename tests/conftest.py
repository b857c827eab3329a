"""What every test shares."""

import gc
import os
from collections.abc import Iterator

# Before anything imports MLX: this loads the BLAS.
import graft  # noqa: F401

import mlx.core as mx
import pytest

# Tests, and the commands that they run, stay out of the user's cache.
os.environ["GRAFT_CACHE"] = "off"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture
def exact_memory() -> Iterator[None]:
    """Let MLX count only what is in use: it reuses freed buffers for somewhat smaller arrays."""
    gc.collect()
    limit = mx.set_cache_limit(0)
    mx.clear_cache()
    yield
    mx.set_cache_limit(limit)
