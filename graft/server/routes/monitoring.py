"""Routes for monitoring: the server's health, and metrics for Prometheus.

Reference: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graft.engine.stats import EngineStats
from graft.server.errors import LLAMA_CPP_ERRORS
from graft.server.routes import route
from graft.server.service import Service, service_of

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

CONTENT_TYPE = "text/plain; version=0.0.4"
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """A metric with its samples.

    Attributes:
        name: name without the prefix `graft_`.
        kind: "counter" or "gauge".
        text: what it measures.
        samples: pairs of labels and value.
    """

    name: str
    kind: str
    text: str
    samples: Iterable[tuple[Labels, float]]


@route("GET", "/health", errors=LLAMA_CPP_ERRORS, needs_key=False)
async def health(request: Request) -> Response:
    """Answer 200 as long as the engine takes requests, and 503 once it does not."""
    service_of(request).engine.check_open()
    return JSONResponse({"status": "ok"})


@route("GET", "/metrics")
async def metrics(request: Request) -> Response:
    """The metrics in Prometheus' text format."""
    return Response(exposition(collect(service_of(request))), media_type=CONTENT_TYPE)


def collect(service: Service) -> list[Metric]:
    """The current metrics of the server."""
    stats = service.engine.stats()
    return [*_of_engine(stats), *_of_adapters(stats, service), *_of_http(service)]


def exposition(metrics: Iterable[Metric]) -> str:
    """Metrics in Prometheus' text format."""
    lines = []
    for metric in metrics:
        name = f"graft_{metric.name}"
        lines += [f"# HELP {name} {metric.text}", f"# TYPE {name} {metric.kind}"]
        for labels, value in metric.samples:
            label_text = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            lines.append(f"{name}{{{label_text}}} {value}" if label_text else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _of_engine(stats: EngineStats) -> list[Metric]:
    gauges = {
        "requests_running": ("Requests being computed.", stats.running),
        "requests_queued": ("Requests waiting in the queue.", stats.queued),
        "rows_per_step": ("Mean number of requests per step since the start.", stats.rows_per_step),
        "tokens_per_second": ("Recent rate of generated tokens.", stats.tokens_per_second),
        "prompt_cache_bytes": ("Memory of cached prompts.", stats.prompt_cache_bytes),
        "adapter_bytes": ("Memory of loaded adapters.", stats.bank_bytes),
        "adapter_limit_bytes": ("Most memory that adapters can take.", stats.bank_limit_bytes),
    }
    counters = {
        "steps_total": ("Steps computed.", stats.steps),
        "prompt_cache_hits_total": (
            "Prompts found in the cache.",
            stats.prompt_cache_hits,
        ),
        "prompt_cache_misses_total": ("Prompts not found in the cache.", stats.prompt_cache_misses),
    }
    return [
        Metric(name, kind, text, [({}, value)])
        for kind, group in (("gauge", gauges), ("counter", counters))
        for name, (text, value) in group.items()
    ]


def _of_adapters(stats: EngineStats, service: Service) -> list[Metric]:
    """Metrics by adapter; requests without an adapter have the empty name."""
    counts = stats.adapters.items()
    loaded = service.engine.adapters()
    return [
        Metric(
            "requests_total",
            "counter",
            "Requests finished, cancelled or failed.",
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
            "Requests running or queued with a loaded adapter.",
            [({"adapter": info.name}, info.requests) for info in loaded],
        ),
    ]


def _of_http(service: Service) -> list[Metric]:
    samples = [
        ({"path": path, "status": str(status)}, count)
        for (path, status), count in sorted(service.responses.items())
    ]
    return [Metric("http_responses_total", "counter", "Responses started.", samples)]
