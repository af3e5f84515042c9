"""A preparation that breaks off at any moment: its folder holds the old dataset or the new, and a next run mends it."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import helpers
from conftest import ROOT, SRC, run_script, write_jsonl
from data.shards import KINDS, MANIFEST, SPLITS, open_prepared, shard_file
from data_files import row
from helpers import open_data
from weights.durable import LOCK

SHARD_TOKENS = 150
FLAGS = ("--val_fraction", "0.3", "--num_proc", "1")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A larger and a smaller dataset: about 20 and 10 shards."""
    monkeypatch.setattr("data.shards.SHARD_TOKENS", SHARD_TOKENS)
    return {name: write_jsonl(tmp_path / f"{name}.jsonl", (row(f"{name} {number}") for number in range(count)))
            for name, count in (("large", 120), ("small", 60))}


def start(source: Path, output: Path) -> subprocess.Popen:
    """A preparation that has said that it begins."""
    command = [sys.executable, ROOT / "tests" / "prepare_worker.py", SHARD_TOKENS, "--dataset", source, "--output_dir",
               output, *FLAGS]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(SRC)})
    assert process.stdout and process.stdout.readline() == b"begin\n"
    return process


def prepare(source: Path, output: Path) -> str:
    """Prepare here, undisturbed; nothing stale and nothing half-written is left. Returns the fingerprint."""
    fingerprint = helpers.prepare(source, output, *FLAGS)["fingerprint"]
    assert dataset_in(output) == (fingerprint, set())
    return fingerprint


def dataset_in(output: Path) -> tuple[str | None, set[Path]]:
    """The fingerprint of a whole dataset, its SHA-256s checked, or None; and the files that no manifest names."""
    files = {path for path in output.rglob("*") if path.is_file()} - {output / LOCK, output / MANIFEST}
    if not (output / MANIFEST).exists():
        return None, files
    open_data(output)
    manifest = open_prepared(output).manifest
    return manifest["fingerprint"], files - {shard_file(output, split, shard, kind) for split in SPLITS
                                             for shard in manifest["shards"][split] for kind in KINDS}


@pytest.mark.parametrize(("kills", "least"), [(3, 0), pytest.param(100, 30, marks=pytest.mark.slow)])
def test_a_killed_preparation_leaves_a_whole_dataset(tmp_path, sources, kills, least):
    """Every fourth kill strikes in an empty folder, the others over a whole dataset; small and large take turns."""
    chance, while_writing = random.Random(0), 0
    fingerprints = {name: prepare(path, tmp_path / f"whole_{name}") for name, path in sources.items()}
    for number in range(kills):
        output, name = tmp_path / f"out{number // 4}", ("large", "small")[number % 2]
        (before, _), known, moment = dataset_in(output), {*output.rglob("*")}, chance.randrange(70)
        process = start(sources[name], output)
        while process.poll() is None and len({*output.rglob("*")} - known) < moment:  # some end before it
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.wait()
        after, strays = dataset_in(output)
        assert after in (before, fingerprints[name])
        while_writing += after == before and bool(strays)
        assert prepare(sources[name], output) == fingerprints[name]
    assert while_writing >= least


def until(left: Iterator[int], real: Callable) -> Callable:
    """The function while numbers are left; then it raises at every call, so nothing is cleaned up, as after kill -9."""
    def call(*arguments: object, **options: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt  # no handler in between takes it
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("is_there", [True, False])
def test_a_crash_before_each_rename_and_removal_leaves_a_whole_dataset(tmp_path, sources, monkeypatch, is_there):
    """The old one until the new one, or none where there was none."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # this is not about a power cut
    old, new = (prepare(sources[name], tmp_path / name) for name in ("large", "small"))
    found = []
    for moment in range(0, 10_000, 5 if is_there else 20):
        output = tmp_path / ("out" if is_there else f"out{moment}")
        if is_there:
            prepare(sources["large"], output)
        with monkeypatch.context() as patch:
            left = iter(range(moment))
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, until(left, getattr(Path, name)))
            try:
                prepare(sources["small"], output)
                break
            except KeyboardInterrupt:
                pass
        found.append(dataset_in(output)[0])
        prepare(sources["small"], output)
    before = old if is_there else None
    assert found == [before] * found.count(before) + [new] * found.count(new)
    assert found.count(before) > (5 if is_there else 2) and (found.count(new) > 5) == is_there, found


def test_data_in_use_stay_readable_while_they_are_replaced(tmp_path, sources):
    """A training process has the old shards mapped; the new preparation removes them."""
    prepare(sources["large"], tmp_path / "out")
    old = open_data(tmp_path / "out")["train"]
    before = [[part.tolist() for part in old.example(number)] for number in range(len(old))]
    prepare(sources["small"], tmp_path / "out")
    assert len(open_data(tmp_path / "out")["train"]) < len(old)
    assert before == [[part.tolist() for part in old.example(number)] for number in range(len(old))]


def test_a_second_preparation_into_the_folder_is_refused(tmp_path, sources, monkeypatch):
    """It comes in the middle of the first one's writing, names it, and changes nothing."""
    fsync, refusals, source, output = os.fsync, [], sources["small"], tmp_path / "out"

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        refusals.append(run_script("prepare_instruct_dataset.py", "--dataset", source, "--output_dir", output))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    fingerprint = prepare(sources["large"], output)
    [refused] = refusals
    assert refused.refusal().startswith(
        f"error: {output}: another preparation is writing there (process {os.getpid()} on ")
    assert (output / LOCK).read_bytes() == b""
    assert fingerprint != prepare(source, output)
