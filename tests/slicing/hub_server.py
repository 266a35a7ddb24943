"""A Hugging Face hub on localhost: the paths that huggingface_hub needs to fetch single files, and a log of them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Request:
    method: str
    repo: str
    file: str
    sent: int


@dataclass
class Hub:
    """Repositories by id, each a folder; `gated` ones are refused.

    Attributes:
        requests: everything that was answered with content, in order.
    """

    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def downloaded(self, *, over: int = 0) -> set[str]:
        """The files of which more than `over` bytes were sent."""
        sent: dict[str, int] = {}
        for request in self.requests:
            if request.method == "GET":
                sent[request.file] = sent.get(request.file, 0) + request.sent
        return {name for name, total in sent.items() if total > over}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port of localhost for as long as the context is open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            self._answer(None)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def _answer(self, body: bytes | None) -> None:
            match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
            if match is None or match[1] not in hub.repos:
                return self._refuse(404, "RepoNotFound")
            repo, revision, file = match.groups()
            if repo in hub.gated:
                return self._refuse(403, "GatedRepo")
            if revision not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            path = hub.repos[repo] / file
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            content = path.read_bytes()
            status, part = 200, content
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                status, part = 206, content[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            sent = part if body is None else body
            self.wfile.write(sent)
            hub.requests.append(Request(self.command, repo, file, len(sent)))
            return None

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            # what the real hub sends with its 404s of files, and huggingface_hub looks for
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
