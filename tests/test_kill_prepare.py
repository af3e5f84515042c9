"""Preparation killed at random moments: the folder holds the old dataset or the new one, and a next run mends it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import prepare_instruct_dataset
from cli import UserError
from conftest import ROOT, SRC, TIMEOUT, run_script, write_jsonl
from durable import LOCK, TEMPORARY_SUFFIX
from helpers import open_data
from manifest import KINDS, MANIFEST, read_manifest, shard_file

SHARD_TOKENS = 150


def rows(count: int, text: str) -> list[dict[str, str]]:
    return [{"instruction": f"{text} {number}", "input": "", "output": f"Answer {number}"} for number in range(count)]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A larger and a smaller dataset: about 45 and 20 shards."""
    return {"large": write_jsonl(tmp_path / "large.jsonl", rows(300, "Question")),
            "small": write_jsonl(tmp_path / "small.jsonl", rows(140, "Problem"))}


def start(source: Path, output: Path) -> subprocess.Popen:
    """A preparation that has said that it begins."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "prepare_worker.py"), str(SHARD_TOKENS), "--dataset", str(source),
         "--output_dir", str(output), "--val_fraction", "0.3", "--num_proc", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(SRC)})
    assert process.stdout and process.stdout.readline() == b"begin\n"
    return process


def prepare(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prepare here, undisturbed. Returns the fingerprint."""
    monkeypatch.setattr(prepare_instruct_dataset, "SHARD_TOKENS", SHARD_TOKENS)
    assert prepare_instruct_dataset.main(["--dataset", str(source), "--output_dir", str(output), "--val_fraction",
                                          "0.3", "--num_proc", "1"]) == 0
    return read_manifest(output)["fingerprint"]


def files_of(output: Path) -> set[Path]:
    return {path for path in output.rglob("*") if path.is_file()}


def named_files(output: Path) -> set[Path]:
    return {output / MANIFEST, output / LOCK} | {
        shard_file(output, split, shard, kind) for split, shards in read_manifest(output)["shards"].items()
        for shard in shards for kind in KINDS}


def phase_of(output: Path, before: str | None, after: str, ended: bool) -> str:
    """Where the kill fell, told from what it left. Asserts that the folder holds one whole dataset."""
    if not (output / MANIFEST).exists():
        assert before is None
        return "writing" if files_of(output) - {output / LOCK} else "before writing"
    found = {data.fingerprint for data in open_data(output).values()}  # opening checks every SHA-256
    assert len(found) == 1 and found <= {before, after}
    stray = files_of(output) - named_files(output)
    if found == {before}:
        return "writing" if stray else "before writing"
    return "removing" if stray else "ended" if ended else "after removing"


def kill_many(tmp_path: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kills: int) -> Counter[str]:
    """Every fourth kill strikes in an empty folder, the others over a whole dataset; small and large take turns."""
    chance, phases = random.Random(0), Counter[str]()
    fingerprints = {name: prepare(path, tmp_path / f"whole_{name}", monkeypatch) for name, path in sources.items()}
    begin = time.monotonic()
    assert start(sources["large"], tmp_path / "timed").wait(TIMEOUT) == 0
    seconds = time.monotonic() - begin  # with the start of Python, so some kills come too late
    output, before = tmp_path / "out", None
    for number in range(kills):
        name = ("large", "small")[number % 2]
        if number % 4 == 0:
            output, before = tmp_path / f"out{number}", None
        process = start(sources[name], output)
        time.sleep(chance.uniform(0, 0.7 * seconds))
        ended = process.poll() is not None
        process.kill()
        process.wait()
        phases[phase_of(output, before, fingerprints[name], ended)] += 1
        before = prepare(sources[name], output, monkeypatch)
        assert before == fingerprints[name]
        assert files_of(output) == named_files(output)  # nothing stale, nothing half-written
    return phases


def test_a_killed_preparation_leaves_a_whole_dataset(tmp_path, sources, monkeypatch):
    assert kill_many(tmp_path, sources, monkeypatch, 5).total() == 5


@pytest.mark.slow
def test_a_hundred_killed_preparations_leave_whole_datasets(tmp_path, sources, monkeypatch):
    phases = kill_many(tmp_path, sources, monkeypatch, 100)
    print(dict(phases))
    assert phases["writing"] >= 30, phases


def crash_after(patch: pytest.MonkeyPatch, moment: int) -> None:
    """From the moment-th rename or removal on, all of them raise, so nothing is cleaned up either, as in a crash."""
    left = [moment]

    def crashing(real):
        def crash(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt  # no handler in between takes it
            return real(*arguments, **options)

        return crash

    for name in ("replace", "unlink"):
        patch.setattr(Path, name, crashing(getattr(Path, name)))


def test_a_crash_before_each_rename_and_removal_leaves_a_whole_dataset(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # this is not about a power cut, and fsync takes long
    fingerprints = {name: prepare(source, tmp_path / name, monkeypatch) for name, source in sources.items()}
    output, found = tmp_path / "out", []
    for moment in range(0, 10_000, 6):
        prepare(sources["large"], output, monkeypatch)
        with monkeypatch.context() as patch:
            crash_after(patch, moment)
            try:
                prepare(sources["small"], output, patch)
                break
            except KeyboardInterrupt:
                pass
        found += {data.fingerprint for data in open_data(output).values()}
        prepare(sources["small"], output, monkeypatch)
        assert files_of(output) == named_files(output)
    assert found == sorted(found, key=[fingerprints["large"], fingerprints["small"]].index)  # the old until the new
    assert min(found.count(fingerprint) for fingerprint in fingerprints.values()) > 5, found


def test_data_in_use_stay_readable_while_they_are_replaced(tmp_path, sources, monkeypatch):
    """A training process has the old shards mapped; the new preparation removes them."""
    prepare(sources["large"], tmp_path / "out", monkeypatch)
    old = open_data(tmp_path / "out")["train"]
    before = [tuple(map(np.copy, old.example(number))) for number in range(len(old))]
    prepare(sources["small"], tmp_path / "out", monkeypatch)
    assert open_data(tmp_path / "out")["train"].fingerprint != old.fingerprint
    for number, arrays in enumerate(before):
        assert all(np.array_equal(a, b) for a, b in zip(arrays, old.example(number)))


def test_a_second_preparation_into_the_folder_is_refused(tmp_path, sources, monkeypatch):
    """The first is stopped in the middle of its writing; the second names it, and changes nothing."""
    import signal

    output = tmp_path / "out"
    first = start(sources["large"], output)
    try:
        end = time.monotonic() + TIMEOUT
        while not list(output.rglob("*.npy")):
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)
        code, stdout, stderr = run_script("prepare_instruct_dataset.py", "--dataset", sources["small"],
                                          "--output_dir", output)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)
        assert stderr.startswith(f"error: {output}: another preparation is writing there (process {first.pid} on ")
        with pytest.raises(UserError, match="another preparation is writing there"):
            prepare(sources["small"], output, monkeypatch)
        first.send_signal(signal.SIGCONT)
        assert first.wait(TIMEOUT) == 0
    finally:
        first.kill()
        first.wait()
    assert files_of(output) == named_files(output) and not [
        path for path in files_of(output) if path.name.endswith(TEMPORARY_SUFFIX)]
    assert (output / LOCK).read_bytes() == b""
    open_data(output)
    prepare(sources["small"], output, monkeypatch)
