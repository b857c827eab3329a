"""Whether the server is well, and what it has done, for Prometheus.

Reference: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graft.engine.stats import EngineStats
from graft.server.service import Service, service_of

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

CONTENT_TYPE = "text/plain; version=0.0.4"
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """A metric with its samples.

    Attributes:
        name: after `graft_`.
        kind: "counter" or "gauge".
        text: what it is.
        samples: labels and values.
    """

    name: str
    kind: str
    text: str
    samples: Iterable[tuple[Labels, float]]


async def health(request: Request) -> Response:
    """GET /health: 200 as long as the engine's thread and this one answer."""
    service_of(request).engine.stats()
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    return Response(exposition(collect(service_of(request))), media_type=CONTENT_TYPE)


def collect(service: Service) -> list[Metric]:
    """What the server has done and is doing."""
    stats = service.engine.stats()
    return [*_of_engine(stats), *_of_adapters(stats, service), *_of_http(service)]


def exposition(metrics: Iterable[Metric]) -> str:
    """Metrics in Prometheus' text format."""
    lines = []
    for metric in metrics:
        name = f"graft_{metric.name}"
        lines += [f"# HELP {name} {metric.text}", f"# TYPE {name} {metric.kind}"]
        for labels, value in metric.samples:
            told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            lines.append(f"{name}{{{told}}} {value}" if told else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _of_engine(stats: EngineStats) -> list[Metric]:
    gauges = {
        "requests_running": ("Requests that have a row.", stats.running),
        "requests_queued": ("Requests that wait for a row.", stats.queued),
        "rows_per_step": ("Rows of a step, on average since the start.", stats.rows_per_step),
        "tokens_per_second": ("Generated over the last seconds.", stats.tokens_per_second),
        "prompt_cache_bytes": ("Keys and values of known prompts.", stats.prompt_cache_bytes),
        "adapter_bytes": ("Adapters in memory.", stats.bank_bytes),
        "adapter_limit_bytes": ("What adapters can take.", stats.bank_limit_bytes),
    }
    counters = {
        "steps_total": ("Steps of the batch.", stats.steps),
        "prompt_cache_hits_total": ("Prompts of which a part was known.", stats.prompt_cache_hits),
        "prompt_cache_misses_total": ("Prompts all new.", stats.prompt_cache_misses),
    }
    return [
        Metric(name, kind, text, [({}, value)])
        for kind, group in (("gauge", gauges), ("counter", counters))
        for name, (text, value) in group.items()
    ]


def _of_adapters(stats: EngineStats, service: Service) -> list[Metric]:
    """By adapter; the base alone has the empty name, as in a request without one."""
    counts = stats.adapters.items()
    loaded = service.engine.adapters()
    return [
        Metric(
            "requests_total",
            "counter",
            "Requests that have ended.",
            [({"adapter": name}, count.requests) for name, count in counts],
        ),
        Metric(
            "tokens_total",
            "counter",
            "Tokens generated.",
            [({"adapter": name}, count.tokens) for name, count in counts],
        ),
        Metric(
            "adapter_requests",
            "gauge",
            "Requests that run or wait with a loaded adapter.",
            [({"adapter": info.name}, info.requests) for info in loaded],
        ),
    ]


def _of_http(service: Service) -> list[Metric]:
    samples = [
        ({"path": path, "status": str(status)}, count)
        for (path, status), count in sorted(service.responses.items())
    ]
    return [Metric("http_responses_total", "counter", "Responses begun.", samples)]
