"""The house keeps its shape: which part of src/ may know which, no circle, no file too long to read."""

import ast
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SRC

# From the ground up. A part imports from parts below it only; a script is imported by nobody.
FLOORS = ["errors", "processor", "cli", "model", "instruct_format", "weights", "data", "dataloader_instruct",
          "answering", "training"]
SCRIPTS = ["prepare_instruct_dataset", "train_instruct", "chat", "convert_checkpoint", "evaluate_instruct"]
PRINTERS = {*SCRIPTS, "data.report", "training.options", "training.launch", "training.progress", "answering.settings",
            "answering.terminal"}  # who may import cli: scripts, tables of flags, printers
READING_PATH = ["instruct_format", "dataloader_instruct", "model", "training.options", "training.setup",
                "training.run", "training.loop", "training.step", "answering.generate", "answering.answer", "chat"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(SRC.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of src/ that a module imports anywhere in it, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    rooms = {imported.split(".")[0] for imported in FILES if "." in imported}
    return {imported for imported in found if imported in FILES and imported not in rooms}


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_down(name):
    part = name.split(".")[0]
    assert part in FLOORS or name in SCRIPTS, f"{name} has no place in the house"
    height = FLOORS.index(part) if part in FLOORS else len(FLOORS)
    for imported in imports_of(name):
        other = imported.split(".")[0]
        assert other in FLOORS, f"{name} imports the script {imported}"
        assert FLOORS.index(other) < height or other == part, f"{name} imports {imported}, which lies above it"
    assert "cli" not in imports_of(name) or name in PRINTERS


def test_there_is_no_circle():
    above: dict[str, set[str]] = {name: imports_of(name) - {name} for name in FILES}
    while leaves := {name for name, imported in above.items() if not imported & above.keys()}:
        above = {name: imported for name, imported in above.items() if name not in leaves}
    assert not above


def test_it_stays_small_enough_to_read():
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert max(lines.values()) <= 300
    assert sum(lines[name] for name in READING_PATH) <= 1400
    assert sum("cli" in imports_of(name) for name in FILES) < len(FILES) / 2


def test_every_module_stands_under_its_own_name():
    """A regular package wins over folders of the same name elsewhere, such as a user's own data/."""
    for room in {path.parent for path in FILES.values()} - {SRC}:
        assert (room / "__init__.py").exists()
    assert not FILES.keys() & sys.stdlib_module_names


def test_the_checklist_names_every_test_and_no_other():
    listed = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "INSTRUCT_FINE_TUNING_TODO.md").read_text()))
    written = {node.name for path in (ROOT / "tests").glob("test_*.py") for node in ast.parse(path.read_text()).body
               if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert listed == written
