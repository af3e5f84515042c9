"""Data and weights from the hub: the real clients download from a stand-in of it on this machine."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import Outcome, run_script
from data_files import parquet, row
from helpers import texts_of
from weights.checkpoint import load, model_of

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

    def do_GET(self) -> None:
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

    do_HEAD = do_POST = do_GET

    def send_api(self, name: str, files: dict[str, bytes], rest: list[str]) -> None:
        entries: Any = [entry(path, data) for path, data in files.items()]
        what = rest[0] if rest else "revision"
        if what == "revision":
            entries = {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
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


DATASET, MODEL = "datasets/vicgalle/alpaca-gpt4", "models/openai-community/gpt2"
ROWS = [row(number, text="unused") for number in range(60)]
ALPACA = {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
          "data/train-00000-of-00001-6ef3991c06080e14.parquet": parquet(*ROWS)}


def from_hub(server: Hub, folder: Path, *command: str) -> Outcome:
    """A script whose clients know no other hub, keep what they download in the folder, and wait for a second."""
    return run_script(*command, cwd=folder, env={
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "NO_PROXY": "*",
        "HF_HOME": str(folder / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})


def test_the_default_dataset_comes_from_the_hub(tmp_path):
    """With no flag. The file lies on another server, whose first answer comes too late."""
    with hub({DATASET: ALPACA}) as server:
        server.faults["/cdn/"] = [2.0]
        code, stdout, stderr = from_hub(server, tmp_path, "prepare_instruct_dataset.py")
    assert code == 0 and f"wrote {tmp_path}/data_instruct/dataset_info.json" in stdout, stderr
    texts = texts_of(tmp_path / "data_instruct")
    assert sorted(response for _, response in texts["train"] + texts["val"]) == sorted(row["output"] for row in ROWS)
    assert sum(method == "GET" and "/cdn/" in path for method, path, _, _ in server.requests) == 2
    assert json.loads((tmp_path / "data_instruct/dataset_info.json").read_bytes())["source"] == "vicgalle/alpaca-gpt4"


def test_gpt2_comes_from_the_hub(tmp_path):
    """Under its short name, which the hub redirects; the connection breaks in the middle of the file of 26 MB, and the
    client asks for the rest of it."""
    reference = GPT2LMHeadModel(GPT2Config(n_positions=16, n_layer=1, n_head=2, n_embd=128))
    weights = {key: value.contiguous() for key, value in reference.transformer.state_dict().items()}
    with hub({MODEL: {"config.json": reference.config.to_json_string().encode(), "README.md": b"gpt2",
                      "model.safetensors": save(weights), "pytorch_model.bin": b"not wanted" * 200}}) as server:
        server.faults["/cdn/"] = ["cut"]
        code, stdout, stderr = from_hub(server, tmp_path, "convert_checkpoint.py", "import", "gpt2")
    assert code == 0 and "1 layers of 2 heads, width 128" in stdout, stderr
    path = tmp_path / "checkpoints/best_model.pt"
    model = model_of(load(path), path)
    assert torch.equal(model.transformer.wte.weight, weights["wte.weight"])
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, weights["h.0.attn.c_attn.weight"].t())
    assert {status for _, _, status, _ in server.requests} >= {307, 302, 200, 206}
    assert any(wanted.startswith("bytes=") for _, _, _, wanted in server.requests)


@pytest.mark.parametrize("command, faults, code, reason", [
    ("prepare_instruct_dataset.py", {"/api/datasets/": [503] * 9}, 2, "Hugging Face hub failed: "),
    ("prepare_instruct_dataset.py", {"/cdn/": [403] * 9}, 2, "Hugging Face hub failed: "),
    ("prepare_instruct_dataset.py --dataset vicgalle/absent", {}, 2, "Hugging Face hub failed: "),
    ("convert_checkpoint.py import gpt2", {"/resolve/": [403] * 9}, 2, "Hugging Face hub failed: "),
    ("convert_checkpoint.py import me/nanogpt", {}, 2, "error: me/nanogpt: no weights for transformers in it, on the"),
    ("convert_checkpoint.py import me/lora", {}, 3, "a PEFT adapter, not a model; merge it first")])
def test_an_error_of_the_hub_is_one_line(tmp_path, command, faults, code, reason):
    with hub({DATASET: ALPACA, MODEL: {"config.json": b"{}"},
              "models/me/nanogpt": {"ckpt.pt": b"", "config.json": b"{}"},
              "models/me/lora": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}}) as server:
        server.faults |= faults
        found = from_hub(server, tmp_path, *command.split())
    assert (found.code, found.stdout.strip(), found.stderr.strip().count("\n")) == (code, "", 0), found.stderr
    assert reason in found.stderr and server.requests
    assert not [*tmp_path.glob("checkpoints/*"), *tmp_path.glob("data_instruct/*/*"), *tmp_path.glob("*/*.json")]
