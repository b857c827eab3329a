"""The page in a real browser: a comparison from the prompt to the coloured tokens.

Needs Debian's chromium, or what CHROMIUM names, and the playwright package to drive it.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.live_server import ADAPTERS, KEY, PROMPT, Live, serve

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
TOKENS = 12
LARGE = {"large": 1.0}
TIMES, MINUS = "\u00d7", "\u2212"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    """The page, which must neither complain nor ask anybody else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))  # of a policy, too
    page.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.locator(".row").first.wait_for()
    yield page
    assert [told for told in complaints if not told.startswith("Failed to load resource")] == []
    assert [u for u in asked if not re.match(rf"data:|http://127\.0\.0\.1:{live.port}/", u)] == []
    context.close()


def compare(page: Any, prompt: str = PROMPT, tokens: int = TOKENS) -> None:
    page.locator("summary").click()
    page.get_by_label("Max tokens", exact=True).fill(str(tokens))
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Compare").click()


def finish(page: Any) -> None:
    page.get_by_role("status").filter(has_text="Done").wait_for(timeout=60_000)


def answers(page: Any) -> dict[str, str]:
    """What each card says, by its heading."""
    cards = page.locator("article").all()
    return {
        card.locator("h2").text_content(): card.locator(".text").text_content() for card in cards
    }


def test_base_and_adapters_answer_side_by_side(page: Any, live: Live) -> None:
    page.get_by_label("Scale of large, exactly").fill("0.5")
    page.get_by_label("All together").check()
    compare(page)
    finish(page)
    wanted = {
        "Base": {},
        f"small {TIMES} 1": {"small": 1.0},
        f"large {TIMES} 0.5": {"large": 0.5},
        "All together small, large": {"small": 1.0, "large": 0.5},
    }
    assert answers(page) == {
        title: live.engine.generate(PROMPT, adapters=adapters, max_tokens=TOKENS).text
        for title, adapters in wanted.items()
    }
    assert page.locator("article[aria-busy=false]").count() == 4
    for figures in page.locator(".figures").all_text_contents():
        assert re.fullmatch(rf"{TOKENS} tokens( · \d+\.\d tokens/s)?", figures)


def test_tokens_are_coloured_by_how_much_likelier_the_adapter_made_them(
    page: Any, live: Live
) -> None:
    compare(page)
    finish(page)
    ids = live.engine.encode(PROMPT)
    card = page.locator("article").filter(has=page.get_by_role("heading", name="large"))
    pieces = list(live.engine.submit(PROMPT, adapters=LARGE, max_tokens=TOKENS, logprobs=0))
    own = [token for piece in pieces for token in piece.tokens]
    whole = [*ids, *(token.id for token in own)]
    scored = live.engine.generate(whole, max_tokens=0, echo=True, logprobs=0)
    gains = [
        (token.logprob or 0) - (base.logprob or 0)
        for token, base in zip(own, scored.prompt[len(ids) :], strict=True)
    ]
    # A character can take several tokens, which come with one text.
    left, grouped = iter(gains), [0.0]
    for piece in pieces:
        grouped[-1] += sum(next(left) for _ in piece.tokens)
        grouped += [0.0] if piece.text else []
    spans = card.locator("b").evaluate_all(
        "all => all.map(b => [b.className, b.style.getPropertyValue('--strength')])"
    )
    for (name, strength), gain in zip(spans, grouped[:-1], strict=True):
        assert name == ("more" if gain > 0 else "less")
        assert float(strength) == pytest.approx(min(abs(gain) / 4, 1), abs=0.01)
    mean = sum(gains) / len(gains)
    told = card.locator(".readout").text_content()
    assert (
        told == f"{MINUS if mean < 0 else '+'}{abs(mean):.2f} nats per token relative to the base"
    )
    assert page.locator("article").first.locator("b.more, b.less").count() == 0
    page.get_by_label(re.compile("Colour tokens")).uncheck()
    background = "all => all.map(b => getComputedStyle(b).backgroundColor)"
    assert set(card.locator("b").evaluate_all(background)) == {"rgba(0, 0, 0, 0)"}


def test_everything_can_be_done_from_the_keyboard(page: Any, live: Live) -> None:
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the base is not wanted
    page.keyboard.press("Control+Shift+Home")
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    finish(page)
    assert list(answers(page)) == [f"small {TIMES} 1", f"large {TIMES} 1"]
    page.get_by_role("group", name=re.compile("Answer of small")).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    told = page.locator("article").first.locator(".readout").text_content()
    pattern = r'"(.+)": adapter (\S+%|below 0\.01%), base (\S+%|below 0\.01%): .*like.*'
    match = re.fullmatch(pattern, told)
    assert match, told
    token = live.engine.generate(PROMPT, adapters={"small": 1.0}, max_tokens=2, logprobs=0)
    if match[1] == token.tokens[1].text:
        percent = 100 * math.exp(token.tokens[1].logprob or 0)
        assert float(match[2].rstrip("%")) == pytest.approx(percent, rel=0.02)
    page.keyboard.press("End")
    assert page.locator("b.current").count() == 1


def test_a_chat_is_asked_as_a_chat(page: Any, live: Live) -> None:
    page.get_by_text("Chat", exact=True).click()
    compare(page, "Hello")
    finish(page)
    alone = live.engine.generate("User: Hello\nAssistant:", max_tokens=TOKENS)
    assert answers(page)["Base"] == alone.text


def test_stop_frees_the_rows_and_keeps_what_there_is(page: Any, live: Live) -> None:
    compare(page, tokens=450)
    page.locator("article b").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").filter(has_text="Stopped").wait_for()
    live.wait_until(live.idle)
    assert page.get_by_role("button", name="Compare").is_enabled()
    assert any(answers(page).values())


def test_an_error_is_told_on_the_card(page: Any) -> None:
    compare(page, "a b " * 600)
    page.get_by_role("status").filter(has_text=re.compile("^Failed$")).wait_for(timeout=60_000)
    alerts = page.get_by_role("alert").all_text_contents()
    assert len(alerts) == 1 + len(ADAPTERS)
    assert all("512" in alert for alert in alerts)


def test_a_reload_keeps_the_prompt(page: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill("What is é?")
    page.reload()
    assert page.get_by_label("Prompt", exact=True).input_value() == "What is é?"


def test_each_control_has_a_name(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, button, select")]
            .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Any, live: Live, scheme: str, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.locator(".row").first.wait_for()
    compare(page)
    finish(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    paper = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness > 128) == (scheme == "light")
    context.close()


def test_a_key_is_asked_for_where_one_is_needed(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, api_key=KEY) as locked:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{locked.port}/")
        for key in ("wrong", KEY):
            page.get_by_label("This server needs an API key").fill(key)
            page.get_by_role("button", name="Use key").click()
            if key != KEY:
                page.get_by_role("status").filter(has_text="Incorrect API key").wait_for()
        page.locator(".row").first.wait_for()
        assert page.get_by_label("This server needs an API key").is_hidden()
        compare(page)
        finish(page)
        assert len(answers(page)) == 3
        page.close()
