"""The page that compares answers in a browser."""

import base64
import functools
import hashlib
from pathlib import Path

from graft.server.routes import route

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).parent.parent / "page"


@route("GET", "/", needs_key=False)
async def show_page(request: Request) -> Response:
    """GET /: the page."""
    return read_page()


@functools.cache
def read_page() -> HTMLResponse:
    """The page with its style and script inline, and a policy that allows no others."""
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    hashes = {}
    for suffix, tag in (("css", "style"), ("js", "script")):
        text = (PAGE / f"page.{suffix}").read_text(encoding="utf-8")
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>{text}</{tag}>")
        digest = hashlib.sha256(text.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return HTMLResponse(
        html,
        headers={
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        },
    )
