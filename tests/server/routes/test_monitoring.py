"""What Prometheus reads, and the server's health."""

import re
import threading
from collections.abc import Iterator

from graft.server.routes.monitoring import Metric, exposition

import pytest

from support.live_server import PROMPT, Live, serve


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(tmp_path_factory.mktemp("server")) as live:
        yield live


def values(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_the_text_format_is_prometheus() -> None:
    metric = Metric("x_total", "counter", "What it is.", [({}, 1), ({"a": 'b"\\\n'}, 2.5)])
    assert exposition([metric]) == (
        "# HELP graft_x_total What it is.\n"
        "# TYPE graft_x_total counter\n"
        "graft_x_total 1\n"
        'graft_x_total{a="b\\"\\\\\\n"} 2.5\n'
    )


def test_requests_and_tokens_are_counted_by_adapter(live: Live) -> None:
    before = values(live.get("/metrics")[1])
    for model, tokens in (("tiny", 3), ("small", 4), ("small", 5)):
        body = {"prompt": PROMPT, "model": model, "max_tokens": tokens, "temperature": 0}
        assert live.post("/v1/completions", body)[0] == 200
    after = values(live.get("/metrics")[1])

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('graft_requests_total{adapter=""}') == 1
    assert grown('graft_requests_total{adapter="small"}') == 2
    assert grown('graft_tokens_total{adapter=""}') == 3
    assert grown('graft_tokens_total{adapter="small"}') == 9
    assert grown('graft_http_responses_total{path="/v1/completions",status="200"}') == 3
    assert after["graft_requests_running"] == after["graft_requests_queued"] == 0
    assert after["graft_steps_total"] >= 12
    assert after['graft_adapter_requests{adapter="large"}'] == 0


def test_each_metric_has_a_help_and_a_type_before_its_samples(live: Live) -> None:
    status, headers, text = live.call("GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    pattern = r"(?:# HELP (\w+) .+\n# TYPE \1 (?:counter|gauge)\n(?:\1(?:\{.*\})? \S+\n)*)+"
    assert re.fullmatch(pattern, text)


def test_refusals_are_counted_by_status(live: Live) -> None:
    live.post("/v1/completions", b"{")
    live.get("/v1/models/unknown")
    counted = values(live.get("/metrics")[1])
    assert counted['graft_http_responses_total{path="/v1/completions",status="400"}'] >= 1
    assert counted['graft_http_responses_total{path="other",status="404"}'] >= 1


def test_health_is_ok_until_the_engine_s_thread_has_ended(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert live.get("/health") == (200, {"status": "ok"})
    with monkeypatch.context() as patched:
        patched.setattr(live.engine._loop, "_thread", threading.Thread())
        status, content = live.get("/health")
    assert (status, content["error"]["type"]) == (503, "unavailable_error")
