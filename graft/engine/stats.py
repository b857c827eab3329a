"""Statistics of an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestCounts:
    """Requests that used an adapter, or none.

    Attributes:
        requests: requests that have ended.
        tokens: tokens generated for them.
    """

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and has done since its start.

    Attributes:
        running: requests that have a row.
        queued: requests that wait for a row.
        steps: steps of the batch.
        rows_per_step: mean number of rows in a step.
        tokens: generated tokens.
        tokens_per_second: recent rate of generated tokens, while there are requests.
        prompt_cache_hits: prompts found in the cache, at least in part.
        prompt_cache_misses: prompts not found in the cache.
        prompt_cache_bytes: memory of the cached prompts.
        bank_bytes: memory of the loaded adapters.
        bank_limit_bytes: most memory that adapters can take within the limits.
        adapters: counts by adapter, "" for requests without one; unloaded adapters stay listed.
    """

    running: int
    queued: int
    steps: int
    rows_per_step: float
    tokens: int
    tokens_per_second: float
    prompt_cache_hits: int
    prompt_cache_misses: int
    prompt_cache_bytes: int
    bank_bytes: int
    bank_limit_bytes: int
    adapters: dict[str, RequestCounts]
