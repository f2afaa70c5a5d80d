"""A Hugging Face hub on loopback that serves one model, for the real client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
"""Revision -> commit. The commits have equal files."""


@contextmanager
def hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of ``folder`` as model ``name``; yield the endpoint and the paths of all requests."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(path)
            match path.strip("/").split("/"):
                case ["api", "models", *parts, "revision", revision] if "/".join(parts) == name:
                    return self._json(body, COMMITS.get(revision) and {"id": name, "sha": COMMITS[revision]})
                case ["api", "models", *parts, "tree", commit] if "/".join(parts) == name:
                    return self._json(body, [_entry(file, data) for file, data in files.items()])
                case [owner, model, "resolve", commit, *parts] if f"{owner}/{model}" == name:
                    file = "/".join(parts)
                    headers = {"ETag": f'"{_digest(files[file])}"', "X-Repo-Commit": commit}
                    return self._send(200, files[file], headers, body)
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

        def _json(self, body: bool, found: object) -> None:
            if found is None:
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)

        def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(file: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
