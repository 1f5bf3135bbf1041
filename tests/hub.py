"""A small Hugging Face Hub on the loopback: it keeps what is committed, and serves it again."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789" * 4


class Hub:
    """What a server was given.

    Attributes:
        url: Where it listens.
        repositories: By ``OWNER/NAME``, the files' bytes by name.
        created: The body of each request for a new repository.
        tokens: What each request was authorised with.
        status: What a request for a new repository is answered with.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.revisions: list[str] = []
        self.tokens: set[str | None] = set()
        self.status = 200


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if self.hub.status != 200:
            self._answer({"error": "forbidden"}, self.hub.status)
            return
        if path == "/api/repos/create":
            given = json.loads(body)
            self.hub.created.append(given)
            name = f"{given['organization']}/{given['name']}"
            self.hub.repositories.setdefault(name, {})
            self._answer({"url": f"{self.hub.url}/datasets/{name}"})
            return
        if path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
            return
        _, api, kind, owner, name, what, revision = path.split("/", 6)
        assert (api, kind) == ("api", "datasets")
        files = self.hub.repositories[f"{owner}/{name}"]
        if what == "preupload":
            asked = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": file["path"], **regular} for file in asked]})
        else:
            assert what == "commit"
            self.hub.revisions.append(revision)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.hub.url}/datasets/{owner}/{name}/commit/{COMMIT}"
            self._answer({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].split("/")
        if parts[1] == "api":
            name = "/".join(parts[3:5])
            self._answer({"id": name, "sha": COMMIT, "private": False, "siblings": []})
            return
        _, kind, owner, name, resolve, revision, file = parts
        assert (kind, resolve) == ("datasets", "resolve")
        data = self.hub.repositories.get(f"{owner}/{name}", {}).get(file)
        if data is None:
            self._answer({"error": "absent"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self.hub.revisions.append(revision)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._send(data, 200, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        more = {"Content-Type": "application/json", **(headers or {})}
        self._send(json.dumps(value).encode(), status, more)

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
