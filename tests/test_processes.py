"""What the processes of a run say to each other, and how it is said when one of them fails."""

from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError

from errors import CheckpointError, LostError, UserError
from training import processes
from training.processes import Processes, digest


class Among(Processes):
    """One of two processes; what the other said is in the list others."""

    others: list[Any] = []

    def gather(self, mine: object) -> list[Any]:
        return [mine, *self.others]


def one_of_two(others: list[Any]) -> Processes:
    among = Among(0, 2, torch.device("cpu"))
    among.others[:] = others
    return among


@pytest.mark.parametrize("host, theirs, said", [
    ("hostD", {"--a": 1, "data": "x"}, ""),
    ("hostD", {"--a": 2, "data": "x"}, "--a is 1 on hostC, 2 on hostD"),
    ("hostD", {"--a": None, "data": "y"}, "--a is 1 on hostC, None on hostD; data is x on hostC, y on hostD"),
    ("hostD", {"data": "x"}, "--a is 1 on hostC, None on hostD"),
    ("hostC", {"--a": 2, "data": "x"}, "--a is 1 on hostC, 2 on hostC"),
])
def test_what_differs_is_named_with_the_places(monkeypatch, host, theirs, said):
    monkeypatch.setattr(processes, "HOST", "hostC")
    try:
        one_of_two([[host, theirs]]).compare({"--a": 1, "data": "x"})
        assert not said
    except UserError as error:
        assert str(error) == f"the processes were started differently: {said}"


@pytest.mark.parametrize("left_over", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_an_environment_that_no_launcher_has_made_is_one_line(monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^the environment has RANK . and WORLD_SIZE ., .*; unset them, or start with "):
        processes.join("cpu")


@pytest.mark.parametrize("mine, other, said", [
    (None, ["hostD", 2, "no data"], "stopped by hostD: no data"), (None, ["hostC", 2, "no data"], "no data"),
    (CheckpointError("damaged"), ["hostD", None, ""], "hostC: damaged"),
    (CheckpointError("damaged"), ["hostC", None, ""], "damaged"), (None, ["hostD", None, ""], ""),
])
def test_an_error_of_one_process_is_one_of_all(monkeypatch, mine, other, said):
    monkeypatch.setattr(processes, "HOST", "hostC")
    try:
        with one_of_two([other]).together():
            if mine:
                raise mine
        assert not said
    except UserError as error:
        assert (str(error), error.exit_code) == (said, 3 if mine else 2)


@pytest.mark.parametrize("error, becomes, said", [
    (torch.OutOfMemoryError("CUDA out of memory.\nMore."), UserError, "out of memory on cpu: do this"),
    (MemoryError(), UserError, "out of memory on cpu: do this"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes"), UserError,
     "out of memory"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore."), UserError,
     "has no kernels for cpu; install a build for an older CUDA"),
    (RuntimeError("[/gloo/transport/tcp/pair.cc:5] Connection closed by peer"), LostError, "rank 0 has lost another"),
    (DistBackendError("NCCL error. More\nncclRemoteError: x\nLast error:\nsocket closed\n"), LostError,
     r"rank 0 has lost another process of the run \(socket closed\)$"),
    (DistBackendError("NCCL error, unhandled system error. More"), LostError, "system error\\)$"),
    (DistBackendError("NCCL error\nLast error:\nError while creating shared memory segment /dev/shm/a"),
     UserError, "--shm-size 1g"),
    (DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), UserError,
     "out of memory on cpu: do this"),
    (torch.AcceleratorError("CUDA error: out of memory\nMore."), UserError, "out of memory on cpu: do this"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), UserError,
     "out of memory on cpu: do this"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), UserError,
     "out of memory on cpu: do this"),
    (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nMore."), UserError,
     "busy or unavailable: another program may hold it"),
    (torch.AcceleratorError("CUDA error: invalid device ordinal\nMore."), UserError, "cpu: invalid device ordinal: "),
    (RuntimeError("shapes do not fit"), RuntimeError, "shapes do not fit"), (OSError("a disk"), OSError, "a disk"),
])
def test_memory_and_lost_processes_are_explained_and_nothing_else(error, becomes, said):
    with pytest.raises(becomes, match=said) as caught, one_of_two([]).failures_explained("do this"):
        raise error
    assert type(caught.value) is becomes


def test_a_digest_sees_every_bit_name_and_step():
    state = {"a": torch.zeros(3), "b": [torch.tensor(1.0), 2]}
    others = [{"a": torch.tensor([0.0, 0.0, -0.0]), "b": state["b"]}, {"c": state["a"], "b": state["b"]},
              {"a": state["a"], "b": [torch.tensor(1.0), 3]}, {"a": state["a"]}]
    assert len({digest(each) for each in (state, *others)}) == 5
    assert digest(state) == digest({"a": torch.zeros(3), "b": [torch.tensor(1.0), 2]})
