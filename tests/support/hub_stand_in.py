"""A local stand-in of the Hugging Face Hub's HTTP interface, as far as its client talks to it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class Hub:
    """Repositories in memory.

    Attributes:
        repositories: from name to files by path.
        tokens: what was sent as authorization.
        refuse: answer every request to write with 403.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.refuse = False
        self.address = ""

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuse:
            return 403, {"error": "You don't have the rights"}
        if path == "/api/repos/create":
            told = json.loads(body)
            name = "/".join(filter(None, (told.get("organization"), told["name"])))
            self.repositories.setdefault(name, {})
            return 200, {"url": f"{self.address}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[name][line["value"]["path"]] = content
            url = f"{self.address}/{name}/commit/{COMMIT}"
            return 200, {"success": True, "commitOid": COMMIT, "commitUrl": url}
        return 404, {"error": f"no {path}"}

    def get(self, path: str) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.repositories.get("/".join(parts[2:4]))
            if files is None:
                return 404, {"error": "Repository not found"}
            if "tree" in parts:
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in files.items()
                ]
                return 200, listed
            siblings = [{"rfilename": name} for name in files]
            return 200, {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
        if len(parts) >= 5 and parts[2] == "resolve":
            files = self.repositories.get("/".join(parts[:2]), {})
            name = "/".join(parts[4:])
            if name in files:
                return 200, files[name]
        return 404, {"error": f"no {path}"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at `address` while the context lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self.answer(*hub.get(self.path.partition("?")[0]))

        def do_HEAD(self) -> None:
            self.answer(*hub.get(self.path.partition("?")[0]))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.tokens.add(self.headers.get("Authorization"))
            self.answer(*hub.post(self.path.partition("?")[0], body))

        def answer(self, status: int, content: Any) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:040x}"')
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
