"""What an engine tells of its work.

Knows nothing of how it is counted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What was done with an adapter, or with the base where a request named none.

    Attributes:
        requests: that have ended.
        tokens: that were generated.
    """

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing and has done since it was started.

    Attributes:
        running: requests that have a row.
        queued: requests that wait for one.
        steps: of the batch.
        rows_per_step: on average.
        tokens: generated.
        tokens_per_second: generated, over the last seconds in which there was something to do.
        prompt_cache_hits: prompts of which a part was known.
        prompt_cache_misses: prompts of which nothing was.
        prompt_cache_bytes: what the known ones take.
        bank_bytes: what the adapters take now.
        bank_limit_bytes: what they can take within the limits.
        adapters: by name, "" for the base alone; those that were unloaded too.
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
    adapters: dict[str, Counts]
