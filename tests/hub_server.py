"""A stand-in for the hub on this machine, which can break off, lie and refuse."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One model, and how the server behaves."""

    name: str
    files: dict[str, bytes]
    url: str = ""
    revision: str = REVISION
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers with a file break off, one an answer."""
    ranges: bool = True
    """Whether a part of a file can be asked for."""
    refuse: tuple[int, str] | None = None
    """Status and error code with which everything is answered."""
    portal: bytes | None = None
    """What is answered in the hub's place, whatever is asked."""
    moved_to: str | None = None
    """Another server that files are fetched from."""
    listed: dict[str, bytes] | None = None
    """What the list promises, where that is not what there is."""
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """(file, range, authorization) of every request for a file."""
    sent: int = 0
    """Bytes of files that were sent."""

    def info(self) -> dict[str, Any]:
        """What the hub says of the model."""
        return {
            "id": self.name,
            "modelId": self.name,
            "sha": self.revision,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": [self._sibling(*one) for one in (self.listed or self.files).items()],
        }

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return found


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder as a hub keeps them."""
    return {one.name: one.read_bytes() for one in folder.iterdir()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer for ``hub`` on a port of this machine while a ``with`` block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Be silent."""

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.portal is not None:
                return self.answer(200, hub.portal)
            if hub.refuse:
                return self.answer(hub.refuse[0], b"{}", {"X-Error-Code": hub.refuse[1]})
            if path == f"/api/models/{hub.name}":
                return self.answer(200, json.dumps(hub.info()).encode())
            start = f"/{hub.name}/resolve/{hub.revision}/"
            if path.startswith(start) and path.removeprefix(start) in hub.files:
                return self.file(path.removeprefix(start))
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def file(self, name: str) -> None:
            asked = self.headers.get("Range")
            hub.asked.append((name, asked, self.headers.get("Authorization")))
            if hub.moved_to:
                return self.answer(302, b"", {"Location": hub.moved_to + self.path})
            content, status = hub.files[name], 200
            if asked and hub.ranges:
                content, status = content[int(asked.removeprefix("bytes=").rstrip("-")) :], 206
            end = hub.cut_after.pop(0) if hub.cut_after else len(content)
            hub.sent += len(content[:end])
            return self.answer(status, content[:end], length=len(content))

        def answer(
            self,
            status: int,
            content: bytes,
            headers: dict[str, str] | None = None,
            length: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = length is not None and length > len(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
