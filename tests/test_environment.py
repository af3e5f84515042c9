"""Which Python the launchers use, what they install where, and machines that they cannot run on."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import conftest
from conftest import SRC, Outcome, run_command
from errors import UserError, python
from training.precision import device_named

NEEDED = "torch, tiktoken"
PYTHONS = {  # what each does with its arguments; all of them write these down first
    "complete": f'exec {sys.executable} "$@"',
    "conda": f'[ "$2" = pip ] || exec {sys.executable} -S "$@"',  # it has pip, and nothing else; installing "works"
    "uv": f'exec {sys.executable} -S "$@"',
    "3.9": f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 1); exec(sys.stdin.read())"',
    "broken": "exit 1",
    "no pip to install": f'[ "$3$4" != install--quiet ] || exit 1; [ "$2" = pip ] || exec {sys.executable} -S "$@"',
}


@pytest.fixture
def project(project: Path) -> Path:
    (project / "requirements.txt").write_text("# needed\ntorch==9.9\ntiktoken==9.9; python_version < '4'\n")
    return project


def make_python(folder: Path, kind: str, name: str = "python") -> Path:
    path = folder / "bin" / name
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "$*" >> "{folder}.calls"\n{PYTHONS[kind]}\n')
    path.chmod(0o755)
    return folder


def launch(project: Path, command: str, python3: str = "uv", **variables: str) -> Outcome:
    if not (project.parent / "path").exists():
        make_python(project.parent / "path", python3, "python3")
    return conftest.launch(project, *command.split(), **{
        "VIRTUAL_ENV": "", "PATH": f"{project.parent}/path/bin:/usr/bin:/bin", **variables})


COMMANDS = ["start_instruct_training.sh", "start_instruct_training.sh demo", "chat.sh"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind, variable, said", [
    ("conda", "CONDA_PREFIX", NEEDED + "; to fill it: {0}/bin/python -m pip install -r requirements.txt; or"),
    ("uv", "VIRTUAL_ENV", NEEDED + "; to fill it: uv pip install --python {0}/bin/python -r requirements.txt; or"),
    ("3.9", "VIRTUAL_ENV", "Python 3.10 (it is 3.9); install a newer one; or deactivate it"),
])
def test_an_active_environment_that_lacks_something_is_named_and_not_changed(project, command, kind, variable, said):
    environment = make_python(project.parent / "environment", kind)
    found = launch(project, command, **{variable: str(environment)})
    assert f"error: the active environment {environment} lacks {said.format(environment)}" in found.refusal()
    assert "install" not in Path(f"{environment}.calls").read_text() and not (project / ".venv").exists()


@pytest.mark.parametrize("kind, variable, said", [
    ("conda", "CONDA_PREFIX", f"lacks {NEEDED}; using .venv/bin/python"),
    (None, "VIRTUAL_ENV", "lacks a Python that starts; using .venv/bin/python"),
    ("complete", "VIRTUAL_ENV", None),
    (None, "CONDA_PREFIX", "lacks a Python that starts; using python3"),
])
def test_an_active_environment_is_used_if_it_has_what_is_needed_else_another(project, kind, variable, said):
    """None: it is stale, there is nothing any more."""
    environment = make_python(project.parent / "environment", kind) if kind else project.parent / "gone"
    if "python3" not in (said or ""):
        make_python(project / ".venv", "complete")
    code, stdout, stderr = launch(project, "chat.sh --help", python3="complete", **{variable: str(environment)})
    assert code == 0 and stdout.startswith("usage: ./chat.sh")
    assert stderr == (f"note: the active environment {environment} {said}\n" if said else "")


def test_what_is_installed_goes_into_dot_venv_alone(project):
    environment = make_python(project.parent / "environment", "conda")
    for name, said in (("mine", f"error: the active environment {environment} lacks"), ("base", "error: python3 is ")):
        found = launch(project, "start_instruct_training.sh demo", "3.9", CONDA_PREFIX=str(environment),
                       CONDA_DEFAULT_ENV=name)  # base is active by itself
        assert found.refusal().startswith(said)
    make_python(project / ".venv", "no pip to install")
    code, _, stderr = launch(project, "start_instruct_training.sh demo", CONDA_PREFIX=str(environment))
    assert code == 2 and stderr.endswith("error: pip could not install requirements.txt\n")
    assert "-m pip install --quiet" in (project / ".venv.calls").read_text()
    assert "install" not in Path(f"{environment}.calls").read_text()


@pytest.mark.parametrize("command, python3, venv, variables, said", [
    (COMMANDS[0], "uv", None, {"VIRTUAL_ENV": "/x"}, "(the active environment /x lacks a Python that starts, python3"),
    (COMMANDS[0], "broken", None, {}, "no environment with the requirements (python3 lacks a Python that starts)"),
    (COMMANDS[1], "broken", None, {}, "error: python3 is missing or older than 3.10"),
    (COMMANDS[1], "3.9", None, {}, "error: python3 is missing or older than 3.10; install a newer Python"),
    (COMMANDS[1], "uv", "3.9", {}, "error: .venv/bin/python is missing or older than 3.10"),
    (COMMANDS[1], "uv", "uv", {}, "error: .venv has no pip; to fill it: uv pip install --python .venv/bin/python -r"),
    (COMMANDS[2], "uv", "uv", {}, f"error: no environment with the requirements (.venv/bin/python lacks {NEEDED})"),
    (COMMANDS[1] + " --max_step 3", "complete", None, {}, "error: unrecognized arguments: --max_step 3"),
])
def test_where_there_is_no_environment_one_line_says_what_to_do(project, command, python3, venv, variables, said):
    """A wrong flag of the demo is said before anything is installed."""
    if venv:
        make_python(project / ".venv", venv)
    if python3 == "complete":  # but for torch
        (project / "requirements.txt").write_text("nowhere==1\n")
    assert said in launch(project, command, python3, **variables).refusal()
    assert (project / ".venv").exists() == bool(venv)


@pytest.mark.parametrize("name, least, found", [("torch", "2.11", "2.3.1"), ("tiktoken", "0.8", "0.7.0")])
def test_an_old_package_is_named(project, name, least, found):
    about = project.parent / "site" / f"{name}-{found}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Name: {name}\nVersion: {found}\n")
    environment = make_python(project.parent / "environment", "complete")
    code, _, stderr = launch(project, "chat.sh", VIRTUAL_ENV=str(environment), PYTHONPATH=str(about.parent))
    assert code == 2 and f"{environment} lacks {name} {least} (it is {found})" in stderr


@pytest.mark.parametrize("system, code, said", [("MINGW64_NT-10.0", 2, "error: this needs Linux; on Windows use WSL2"),
                                                ("Darwin", 0, "note: nobody has tried this on macOS")])
def test_another_system_is_told_what_works(project, system, code, said):
    make_python(project / ".venv", "complete")
    uname = make_python(project.parent / "path", "uv", "uname") / "bin" / "uname"
    uname.write_text(f"#!/bin/sh\necho {system}\n")
    outcome = launch(project, "chat.sh --help")
    assert outcome.code == code and outcome.stderr.startswith(said) and outcome.stderr.count("\n") == 1


def test_a_python_that_cannot_serve_is_one_line(tmp_path, monkeypatch):
    for change in ("platform = 'win32'", "version_info = (3, 9, 1)"):
        code = f"import sys; sys.path[:0] = [{str(SRC)!r}]; sys.{change}; import cli"
        said = run_command(sys.executable, "-c", code).refusal()
        assert said.startswith("error: this needs Python 3.10 and Linux; on Windows use WSL2")
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python3"))
    for folder, name in ((tmp_path, ".venv/bin/python3"), (SRC, "python3")):  # in what is to be run next
        monkeypatch.chdir(folder)
        assert python() == name
    monkeypatch.undo()
    for raised, code, words in (("KeyboardInterrupt", 130, ""), ("ModuleNotFoundError('x', name='x')", 2, "error: "),
                                ("ModuleNotFoundError('y', name='data.y')", 1, "Traceback ")):  # while it imports
        code_text = f"import sys; sys.path[:0] = [{str(SRC)!r}]; import cli; print('said'); raise {raised}"
        found = run_command(sys.executable, "-c", code_text)
        assert (found.code, found.stdout) == (code, "said\n") and found.stderr.startswith(words)
    for script in ("prepare_instruct_dataset.py", "train_instruct.py"):  # without packages
        said = run_command(sys.executable, "-S", SRC / script, cwd=tmp_path).refusal()
        assert re.match(r"error: \S+ has no package \w+; use the Python of an environment with the requirements", said)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("cuda, warning, visible, said", [
    (None, "", None, "this is the build for CPUs"), ("13.0", "", None, "or is too old for CUDA 13.0; update it"),
    ("13.0", "CUDA initialization: The driver is too old (found version 11040). Please", "0",
     r"too old for CUDA 13.0 \(found version 11040\); update it"),
    ("13.0", "CUDA initialization: Unexpected error. Error 802: system not yet initialized (Triggered at", None,
     r"13.0 \(Error 802: system not yet initialized\); "), ("13.0", "", "3", "CUDA_VISIBLE_DEVICES is 3, which may")])
def test_a_gpu_that_torch_cannot_use_is_an_error_that_says_why(tmp_path, monkeypatch, name, cuda, warning, visible,
                                                               said):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warning and warnings.warn(warning, stacklevel=1)))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"--device {name}: there is an NVIDIA GPU, .*{said}.*; --device cpu goes on"):
        device_named(name)
    assert device_named("cpu") == "cpu"
    for hidden in ("", "NoDevFiles"):  # by the user, by Slurm
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device_named("auto") == "cpu"


def test_what_a_gpu_computes_with_is_not_the_environments(monkeypatch):
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    assert device_named("auto") == "cuda" and chosen == ["highest", False]
