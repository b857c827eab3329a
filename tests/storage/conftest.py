import pytest


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read in blocks of one or two rows."""
    monkeypatch.setattr("graft.storage.lazy_tensors.BLOCK_BYTES", 20)
