"""A tiny configuration for each architecture of mlx-lm."""

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "data" / "architectures.json"


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """The configurations by name, which is `model_type` or a variant of it."""
    configs: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return configs
