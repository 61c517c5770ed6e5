"""A fake hub on the loopback, with the few paths of huggingface.co that huggingface_hub uses to fetch a model."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


@dataclass
class FakeHub:
    """The contents of a hub. `models`: id -> file name -> content. `broken`: files that can't be fetched now."""

    models: Mapping[str, Mapping[str, bytes]]
    broken: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)  # false sizes of files that the hub reports
    fetched: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._metadata("/".join(parts[2:4]), parts[4:])
        return self._file("/".join(parts[:2]), "/".join(parts[4:]))

    def _metadata(self, model: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if model not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if model in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if rest[1:] and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.models[model]
        said: Any
        if rest[:1] == ["tree"]:
            said = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])} for name in files
            ]
        else:
            siblings = [{"rfilename": name, "size": self.sizes.get(name, len(files[name]))} for name in files]
            said = {"id": model, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(said).encode()

    def _file(self, model: str, name: str) -> tuple[int, dict[str, str], bytes]:
        content = self.models.get(model, {}).get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT}, content


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(body=True)

        def do_HEAD(self) -> None:
            self._reply(body=False)

        def _reply(self, *, body: bool) -> None:
            path = urlsplit(self.path).path
            status, headers, content = hub.answer(path)
            name = path.rsplit("/", 1)[-1]
            if body and "/resolve/" in path:
                hub.fetched.append(name)
                if name in hub.broken:
                    status, headers, content = 403, {}, b""
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
