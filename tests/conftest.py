"""What several test files share: running a script as a user does, small models and data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
TIMEOUT = 120  # seconds; only so that a hanging script fails instead of stopping the run

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads of models this small only wait for each other

# On a machine with a GPU, packages that show and log a run may be missing: this writer makes its folder, and no more.
if not find_spec("tqdm"):
    sys.modules["tqdm"] = MagicMock(__spec__=ModuleSpec("tqdm", None))  # which torch._dynamo asks for
if not find_spec("tensorboard"):
    sys.modules["torch.utils.tensorboard"] = MagicMock(
        SummaryWriter=lambda folder, **_: Path(folder).mkdir(parents=True, exist_ok=True) or MagicMock())


def pytest_configure() -> None:
    """The tests are not a rank. Here, not at import: the workers, which are ranks, import this file too."""
    os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(scope="session", autouse=True)
def where_all_is_made(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests' own folders lie in the current one: a resumed run takes folders outside it as flags only."""
    os.chdir(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def no_signal_is_blocked() -> None:
    """A trainer that runs in this process blocks some; other tests, and what they start, want them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture(params=[False, True])
def with_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether linear layers take oneDNN, whatever this CPU takes by itself; and that they did."""
    from processor import onednn_has_avx512
    from training import onednn, precision

    if request.param and not onednn_has_avx512():
        pytest.skip("oneDNN has no products in bf16 on this CPU, which needs AVX-512")
    called, multiply = [], onednn.linear_by_onednn
    monkeypatch.setattr(precision, "is_faster", lambda *_: request.param)
    monkeypatch.setattr(onednn, "linear_by_onednn", lambda *inputs: called.append(1) or multiply(*inputs))
    yield request.param
    assert bool(called) is request.param


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str

    def refusal(self, code: int = 2) -> str:
        """The one line of a program that printed nothing else and left with this exit code."""
        assert (self.code, self.stdout, self.stderr.count("\n")) == (code, "", 1), self
        return self.stderr


def run_command(*command: str | Path, cwd: Path | None = None, stdin: str | bytes = b"",
                env: dict[str, str] | None = None, timeout: float = TIMEOUT) -> Outcome:
    """Run a program to its end, without a terminal. Bytes that are not UTF-8 show as escapes."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, check=False,
                          input=stdin.encode() if isinstance(stdin, str) else stdin, timeout=timeout,
                          env={**os.environ, **(env or {})})
    return Outcome(done.returncode, *(part.decode(errors="backslashreplace") for part in (done.stdout, done.stderr)))


def run_script(name: str, *flags: str | Path, **how: Any) -> Outcome:
    """Run src/<name>; where pytest stands, or in cwd."""
    return run_command(sys.executable, SRC / name, *flags, **how)


def launch(folder: Path, script: str, *arguments: object, cwd: Path | None = None, **variables: str) -> Outcome:
    """A launcher of this folder, with this interpreter's environment as the active one unless variables say other."""
    return run_command(folder / script, *map(str, arguments), cwd=cwd, env={
        "VIRTUAL_ENV": sys.prefix, "CONDA_PREFIX": "", "CONDA_DEFAULT_ENV": "",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **variables})


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_main(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    import cli

    def run(main: Callable[[list[str]], int], *flags: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: main([str(flag) for flag in flags]))
        return Outcome(int(left.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder like the project's, whose name has a space, without an environment, and with nothing to install."""
    folder = tmp_path / "my project"
    folder.mkdir()
    for name in ("start_instruct_training.sh", "chat.sh"):
        shutil.copy(ROOT / name, folder)
    (folder / "src").symlink_to(SRC)
    (folder / "requirements.txt").touch()
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned checkpoint of ours: random, context 64, step 3, val loss 4.25. Shared, so copy it to change it."""
    from models import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.pt")


@pytest.fixture(scope="session")
def run_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state of a run after one step, with a model small enough to be loaded a thousand times."""
    import train_instruct
    from helpers import write_data
    from model import GPTConfig
    from models import small_model, write_pretrained
    from weights.checkpoint import load_run

    folder = tmp_path_factory.mktemp("run")
    data = write_data(folder / "data", {"train": [([1, 2], [0, 1])] * 3, "val": [([1, 2], [0, 1])]})
    pretrained = write_pretrained(folder / "a.pt", small_model(config=GPTConfig(16, 64, 1, 1, 16)))
    flags = {"data_dir": data, "pretrained_model": pretrained, "checkpoint_dir": folder, "tensorboard_dir": folder,
             "max_steps": 1, "device": "cpu"}
    assert train_instruct.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    return load_run(folder / "latest.pt")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from helpers import run_inputs

    return run_inputs(tmp_path_factory.mktemp("inputs"))
