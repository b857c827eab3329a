"""A tiny base model with seven adapters on disk, and an engine for it."""

from collections.abc import Iterator
from pathlib import Path

from graft.engine.engine import Engine
from graft.pretrained.load import load_model
from graft.pretrained.tokenizer import Tokenizer, load_tokenizer

import mlx.nn as nn
import pytest

from support.served import PLANS, Adapter, make_adapter, write
from support.tiny import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base, 2)


@pytest.fixture
def model(base: Path) -> nn.Module:
    return load_model(base)[0]


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Adapter]:
    model = load_model(base)[0]
    return {
        name: make_adapter(model, seed=seed, **plan)
        for seed, (name, plan) in enumerate(PLANS.items())
    }


@pytest.fixture(scope="module")
def files(
    adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write(folder / name, adapter) for name, adapter in adapters.items()}


@pytest.fixture
def engine(model: nn.Module, tokenizer: Tokenizer) -> Iterator[Engine]:
    with Engine(model, tokenizer) as engine:
        yield engine
