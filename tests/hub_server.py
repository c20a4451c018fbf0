"""A Hub on this machine: folders as repositories, each of one commit."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks: a repository's facts, its list of files, each file."""

    protocol_version = "HTTP/1.1"
    root: Path
    downloads: list[str]
    failing: set[str]
    """The paths that the server has trouble with."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and (self.root / parts[2] / parts[3]).is_dir():
            self.answer_about(self.root / parts[2] / parts[3], parts[4:])
        elif parts[2:3] == ["resolve"]:
            self.answer_file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def answer_about(self, repository: Path, what: list[str]) -> None:
        files = sorted(file for file in repository.rglob("*") if file.is_file())
        names = [file.relative_to(repository).as_posix() for file in files]
        value: Any = {
            "id": f"{repository.parent.name}/{repository.name}",
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in names],
        }
        if what[:1] == ["tree"]:
            value = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                for name, file in zip(names, files, strict=True)
            ]
        self.answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def answer_file(self, repository: str, name: str) -> None:
        file = self.root / repository / name
        commit = {"X-Repo-Commit": COMMIT}
        if name in self.failing:
            self.answer(b"", 503, commit)
        elif not file.is_file():
            self.answer(b"", 404, {**commit, "X-Error-Code": "EntryNotFound"})
        else:
            if self.command == "GET":
                self.downloads.append(name)
            self.answer(file.read_bytes(), 200, {**commit, "ETag": f'"{digest(file)}"'})

    def answer(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def digest(file: Path) -> str:
    return sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, type[Hub]]]:
    """Serve the repositories below `root`: the address, and the handler with its downloads."""
    handler = type("RootHub", (Hub,), {"root": root, "downloads": [], "failing": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
            thread.join()
