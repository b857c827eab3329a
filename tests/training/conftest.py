"""Fixtures: tiny models, data, and a folder to run in."""

from support.lora_runs import here, model, shared, split  # noqa: F401
