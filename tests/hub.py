"""A stand-in of the Hugging Face hub's HTTP interface on this machine, as far as its clients need it to download."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RENAMED = {"models/gpt2": "openai-community/gpt2"}  # the hub answers with a redirect, as for the real one


class Hub(ThreadingHTTPServer):
    """Repositories such as datasets/OWNER/NAME or models/OWNER/NAME: file name -> bytes. Files larger than 1 kB lie on
    another server, as the hub's do, to which a redirect leads. faults are taken one by one, by the next request whose
    path holds the key: a status to answer with, seconds to wait, or 'cut' to break off in the middle of a file."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.faults: dict[str, list[Any]] = {}
        self.requests: list[tuple[str, str, int, str]] = []  # method, path, status, Range

    def handle_error(self, *_: object) -> None:
        """A client that did not wait for a slow answer is none."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with Hub(repositories) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_HEAD

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        fault = next((faults.pop(0) for key, faults in self.server.faults.items() if key in path and faults), None)
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            return self.send(fault, b"{}")
        where, *parts = path.strip("/").split("/")
        if where == "cdn":
            return self.send_file(self.server.repositories["/".join(parts[:3])]["/".join(parts[3:])], fault == "cut")
        if where != "api":
            parts = [where, *parts] if where == "datasets" else ["models", where, *parts]
        if (new := RENAMED.get("/".join(parts[:2]))) is not None:
            prefix = f"/api/models/{new}/" if where == "api" else f"/{new}/"
            return self.send(307, b"", Location=prefix + "/".join(parts[2:]))
        name, rest = "/".join(parts[:3]), parts[3:]
        files = self.server.repositories.get(name)
        if files is None:
            self.send(401, b'{"error": "Repository not found"}', **{"X-Error-Code": "RepoNotFound"})
        elif where == "api":
            self.send_api(name, files, rest)
        else:
            self.send_resolved(name, files, "/".join(rest[2:]))

    def send_api(self, name: str, files: dict[str, bytes], rest: list[str]) -> None:
        """About a repository, or what is in one of its folders."""
        entries: Any = [entry(path, data) for path, data in files.items()]
        what = rest[0] if rest else "revision"
        if what == "revision":
            entries = {"id": name.split("/", 1)[1], "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                       "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in files]}
        elif what == "tree":
            folder = "".join(f"{part}/" for part in rest[2:])
            below = [path.removeprefix(folder) for path in files if path.startswith(folder)]
            entries = [entry(folder + path, files[folder + path]) for path in below if "/" not in path]
            entries += [{"type": "directory", "path": f"{folder}{name}", "oid": COMMIT, "size": 0}
                        for name in {path.split("/")[0] for path in below if "/" in path}]
        self.send(200, json.dumps(entries).encode(), **{"Content-Type": "application/json"})

    def send_resolved(self, name: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self.send(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = files[path]
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(data)}"'}
        if len(data) <= 1000:
            return self.send_file(data, **about)
        self.send(302, b"", Location=f"http://localhost:{self.server.server_port}/cdn/{name}/{path}", **about, **{
            "X-Linked-Etag": f'"{digest(data)}"', "X-Linked-Size": str(len(data))})

    def send_file(self, data: bytes, cut: bool = False, **headers: str) -> None:
        headers = {"ETag": f'"{digest(data)}"', "Accept-Ranges": "bytes", **headers}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data = data[start:end]
        self.send(206 if wanted else 200, data, cut, **headers)

    def send(self, status: int, data: bytes, cut: bool = False, **headers: str) -> None:
        self.server.requests.append((self.command, self.path, status, self.headers.get("Range", "")))
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:len(data) // 2] if cut else data)
        self.close_connection |= cut


def entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": digest(data)[:40]}
    return {**found, "lfs": {"oid": digest(data), "size": len(data), "pointerSize": 100}} if len(data) > 1000 else found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
