"""Damage to files: none of it leads to another state, or to other data, without anybody being told."""

import hashlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch

from conftest import run_script
from data.shards import MANIFEST
from errors import CheckpointError, UserError
from helpers import open_data, resume, run_inputs, train, write_random
from model import KVCache
from models import same_state
from weights.checkpoint import BEST, LATEST, load, load_run, model_of, newest_valid, save, save_step
from weights.pretrained import open_any

PAGE = 4096


def overwrite(path: Path, data: bytes) -> None:
    """In its place, which takes a tenth of the time."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def damages(files: list[Path]) -> Iterator[tuple[str, Path, bytes]]:
    """410 times the kind of damage, a file, the files in turn, and its bytes, at least one of them changed."""
    chance, originals = random.Random(0), [path.read_bytes() for path in files]
    for kind, count in {"flip": 300, "cut": 60, "zero": 50}.items():
        for number in range(count):
            data = changed = originals[number % len(files)]
            while changed == data:
                page = chance.randrange(0, len(data), PAGE)
                changed = (flipped(data, chance.randrange(8 * len(data))) if kind == "flip" else
                           data[:chance.randrange(len(data))] if kind == "cut" else
                           data[:page] + bytes(len(data[page:page + PAGE])) + data[page + PAGE:])
            yield kind, files[number % len(files)], changed


def is_noticed(read: Callable[[Path], object], path: Path, undamaged: object) -> bool:
    """Whether reading a damaged file is refused. What is read all the same is equal to the bit."""
    try:
        found = read(path)
    except CheckpointError as error:
        assert path.name in str(error) and error.exit_code == 3
        return True
    assert same_state(found, undamaged)
    return False


@torch.no_grad()
def logits_of_chat(path: Path) -> torch.Tensor:
    model = model_of(open_any(path), path)
    return model.logits(model.decode(torch.arange(16), KVCache(model.config)))


def test_410_damages_to_checkpoints_are_noticed_or_change_nothing(tmp_path, run_state):
    """By resume, by chat and as a pre-trained model. `--resume latest` passes over what is damaged and says so."""
    files = latest, step, best = [tmp_path / name for name in (LATEST, "step_000003.pt", BEST)]
    save_step(tmp_path, {**run_state, "step": 3}, keep_last=1)
    save(best, {key: value for key, value in run_state.items() if key != "optimizer"})
    originals = {path: path.read_bytes() for path in files}
    copies = shutil.copytree(tmp_path, tmp_path / "undamaged")  # what was read from them is mapped
    latest.unlink()  # the hard link: a damage shall strike one name
    latest.write_bytes(originals[latest])
    undamaged = {path: {read: read(copies / path.name) for read in (load, open_any, logits_of_chat, load_run)
                        if path != best or read != load_run} for path in files}
    counts = Counter[tuple[str, bool]]()
    for kind, path, data in damages(files):
        overwrite(path, data)
        [noticed] = {is_noticed(read, path, state) for read, state in undamaged[path].items()}
        told: list[str] = []
        found, state = newest_valid(tmp_path, told.append)
        assert found == (step if noticed and path == latest else latest)
        assert told == [f"skipped {path}: damaged or not loadable"] * (noticed and path == latest)
        assert same_state(state, undamaged[found][load_run])
        overwrite(path, originals[path])
        counts[kind, noticed] += 1
    assert counts.total() == 410 and counts["cut", True] == 60 and counts["flip", True] and counts["zero", True]


@pytest.fixture
def small(tmp_path: Path, run_state: dict) -> tuple[bytes, bytes, Callable[[bytes], bool]]:
    """Two checkpoints of few bytes (in two types, a part of a tensor, a tensor of nothing), and whether other bytes in
    the place of the first one are refused: they may not be another state."""
    first, second, damaged = paths = [tmp_path / name for name in ("first.pt", "second.pt", "damaged.pt")]
    for path, number in zip(paths, (3.0, 4.0, 3.0)):
        weight = torch.tensor([number, 5.0])
        model = {"a": weight, "b": weight.bfloat16(), "c": weight[1:], "d": torch.zeros(0)}
        save(path, {**run_state, "model_config": {}, "optimizer": {}, "model": model})
    state = load_run(first)

    def refused(data: bytes) -> bool:
        overwrite(damaged, data)
        return is_noticed(load_run, damaged, state)

    return first.read_bytes(), second.read_bytes(), refused


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_checkpoint_leads_to_another_state(small, every):
    data, _, refused = small
    noticed = sum(refused(flipped(data, bit)) for bit in range(0, 8 * len(data), every))
    assert not refused(data) and noticed > 4 * len(data) / every


def test_a_checkpoint_of_the_last_version_loads(small):
    """With a SHA-256 of the file as the zip's comment. Damages there lead to no other state either."""
    data, _, refused = small
    comment = b"gpt2-instruct sha256=" + hashlib.sha256(data).hexdigest().encode()
    sealed = data[:-2] + len(comment).to_bytes(2, "little") + comment
    assert not refused(sealed)
    for bit in range(8 * (len(data) - 22), 8 * len(sealed)):
        refused(flipped(sealed, bit))


def damaged_headers(data: bytes) -> Iterator[bytes]:
    """Any bytes in a row, in twos, of what the zip says of a tensor, in its directory and before its data, and of what
    it says at its end, become zeros, ones, or those of the next tensor."""
    one, next_one, end = b"archive/data/0", b"archive/data/1", data.rindex(b"PK\6\6")
    for place, other, size in ((data.rindex(one) - 46, data.rindex(next_one) - 46, 46 + len(one)),
                               (data.index(one) - 30, data.index(next_one) - 30, 30 + len(one)),
                               (end, end, len(data) - end)):
        for first, last in combinations(range(0, size + 1, 2), 2):
            for new in (bytes(last - first), b"\xff" * (last - first), data[other + first:other + last]):
                yield data[:place + first] + new + data[place + last:]


def test_a_damaged_header_neither_leads_to_another_state_nor_hides_one(small):
    """zipfile checks the bytes that the directory describes; PyTorch takes as many as its pickle asks for, from where
    the header before them ends. So where a header is damaged alone, then where its tensor is, too."""
    data, _, refused = small
    bit = 8 * data.index(torch.tensor([3.0, 5.0]).numpy().tobytes())
    for changed in damaged_headers(data):
        assert refused(changed) or refused(flipped(changed, bit))


def test_pieces_lost_doubled_or_of_another_checkpoint_lead_to_no_other_state(small):
    """Of two checkpoints in one file zipfile checks the last one, wherever it begins; PyTorch loads what lies where the
    directory says, counted from the beginning of the file: the first one."""
    data, other, refused = small
    assert len(data) == len(other) and data != other
    for size in (16, 64, 256, 1024):
        for at in range(0, len(data), size // 4):
            piece, end = data[at:at + size], at + size
            for new in (b"", piece + piece, bytes(size) + piece, other[at:end]):
                refused(data[:at] + new + data[end:])
    for tail in (bytes(1), bytes(PAGE), data[:PAGE], b"PK\5\6" + bytes(18), data[-22:], data[-98:]):
        refused(data + tail)
    for bit in range(32, 8 * len(data), 101):
        refused(flipped(data, bit) + data)
        refused(flipped(data, bit) + other)
    refused(other + data)


def test_410_damages_to_prepared_data_are_noticed(tmp_path):
    """Named, exit code 2: six arrays, all larger than a page, and the manifest. Every flipped bit of that too, also in
    words that training does not use and in white space, and what is missing."""
    write_random(tmp_path, 1100, 600, 30)
    files, manifest = sorted(path for path in tmp_path.rglob("*") if path.is_file()), tmp_path / MANIFEST
    assert len(files) == 7 and manifest in files
    originals = {path: path.read_bytes() for path in files}
    flips = (("", manifest, flipped(originals[manifest], bit)) for bit in range(8 * len(originals[manifest])))
    for _, path, data in chain(damages(files), flips, (("", path, None) for path in files)):
        path.unlink() if data is None else overwrite(path, data)
        with pytest.raises(UserError, match=path.name) as caught:
            open_data(tmp_path)
        assert caught.value.exit_code == 2
        path.write_bytes(originals[path]) if data is None else overwrite(path, originals[path])
    open_data(tmp_path)


def test_a_run_resumes_past_damage_and_stops_at_damaged_data(tmp_path, capsys):
    inputs, folder = run_inputs(tmp_path), tmp_path / "run"
    assert train(inputs, folder, "--max_steps", 3) == 0
    newest, [shard] = folder / "step_000003.pt", inputs[0].glob("train/*.tokens.npy")
    for path in (newest, shard):  # in the middle are weights, and tokens; latest.pt is a second name of the newest
        overwrite(path, flipped(path.read_bytes(), 4 * path.stat().st_size))
    with pytest.raises(UserError, match=f"{shard}: damaged or changed") as caught:
        resume(folder, "latest")
    assert caught.value.exit_code == 2
    overwrite(shard, flipped(shard.read_bytes(), 4 * shard.stat().st_size))
    assert run_script("train_instruct.py", "--resume", newest).refusal(3).startswith(f"error: {newest}: damaged")
    capsys.readouterr()
    assert resume(folder, "latest") == 0
    told = capsys.readouterr().out
    assert all(f"skipped {path}: damaged or not loadable\n" in told for path in (folder / LATEST, newest))
    assert f"resumed from {folder}/step_000002.pt at step 2" in told and load(folder / LATEST)["step"] == 3
    for path in folder.glob("*.pt"):
        os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="none of its 4 checkpoints is valid"):
        resume(folder, "latest")
