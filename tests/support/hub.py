"""A Hugging Face hub on loopback for the real client: one that serves a model, and one that takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
"""Revision -> commit. The commits have equal files."""


@contextmanager
def hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of ``folder`` as model ``name``; yield the endpoint and the paths of all requests."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    requests: list[str] = []

    class Hub(_Answers):
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

    with _served(Hub) as endpoint:
        yield endpoint, requests


@dataclass
class Repository:
    """A repository that was made or changed by uploads.

    Attributes:
        files: path -> content.
        messages: messages of the commits. The number of the newest commit is their count.
    """

    visibility: str | None
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    messages: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return f"{len(self.messages):040x}"


@contextmanager
def uploads(token: str) -> Iterator[tuple[str, dict[str, Repository]]]:
    """Serve a hub that takes models; yield the endpoint and the repositories by name.

    It answers what ``create_repo``, ``model_info`` and ``create_commit`` of huggingface_hub ask without Xet
    storage. Safetensors go through the LFS protocol, other files into the commit.
    """
    repositories: dict[str, Repository] = {}
    stored: dict[str, bytes] = {}

    class Hub(_Answers):
        def do_GET(self) -> None:
            name = unquote(urlsplit(self.path).path).removeprefix("/api/models/")
            if (found := repositories.get(name)) is None:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            card = found.files.get("README.md", b"---\n{}\n---").decode()
            self._json(
                {
                    "id": name,
                    "sha": found.commit,
                    "siblings": [{"rfilename": file} for file in found.files],
                    "cardData": yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None,
                }
            )

        def do_PUT(self) -> None:
            data = self._read()
            assert self.path == f"/lfs/{hashlib.sha256(data).hexdigest()}"
            stored[self.path.removeprefix("/lfs/")] = data
            self._json({})

        def do_POST(self) -> None:
            if self.headers["Authorization"] != f"Bearer {token}":
                return self._send(401, b"{}", {})
            lines, path = [json.loads(line) for line in self._read().splitlines()], unquote(self.path)
            match path.strip("/").split("/"):
                case ["api", "repos", "create"]:
                    name = f"{lines[0]['organization']}/{lines[0]['name']}"
                    repositories[name] = Repository(lines[0].get("visibility"))
                    self._json({"url": f"{self._endpoint}/{name}"})
                case ["api", "models", _, _, "preupload", "main"]:
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in lines[0]["files"]
                    ]
                    self._json({"files": files})
                case [_, _, "info", "lfs", "objects", "batch"]:
                    objects = [
                        asked | {"actions": {"upload": {"href": f"{self._endpoint}/lfs/{asked['oid']}"}}}
                        for asked in lines[0]["objects"]
                    ]
                    self._json({"transfer": "basic", "objects": objects})
                case ["api", "models", owner, model, "commit", "main"]:
                    self._commit(f"{owner}/{model}", lines)
                case _:
                    self._json({})  # validate-yaml

        def _commit(self, name: str, lines: list[Any]) -> None:
            repository = repositories[name]
            header, *operations = (line["value"] for line in lines)
            if header.get("parentCommit", repository.commit) != repository.commit:
                return self._send(412, b"{}", {})
            for file in operations:
                content = stored[file["oid"]] if "oid" in file else base64.b64decode(file["content"])
                repository.files[file["path"]] = content
            repository.messages.append(header["summary"])
            address = f"{self._endpoint}/{name}/commit/{repository.commit}"
            self._json({"commitUrl": address, "commitOid": repository.commit})

        def _json(self, found: object) -> None:
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _read(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        @property
        def _endpoint(self) -> str:
            return f"http://{self.headers['Host']}"

    with _served(Hub) as endpoint:
        yield endpoint, repositories


class _Answers(BaseHTTPRequestHandler):
    """Answers with a length and without a log."""

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def _served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback in a thread, and yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(file: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
