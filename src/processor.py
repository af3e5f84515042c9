"""Products on CPUs: which are fast where PyTorch's own choice is not the fastest, and what oneDNN may keep of them."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Before the first product. Of each number of rows oneDNN and PyTorch's part of it keep what they prepared, a megabyte a
# matrix, 1,024 in all: gigabytes, as every micro-batch has another number. One needs 31.
for cache_of in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache_of, "64")


@cache
def is_amd() -> bool:
    """Whether MKL, by which PyTorch multiplies in fp32, leaves AVX-512 unused and is slow in matrix times vector, and
    there is oneDNN."""
    with suppress(OSError), Path("/proc/cpuinfo").open() as cpus:
        return "AuthenticAMD" in cpus.read(200) and torch.backends.mkldnn.is_available()
    return False


def onednn_has_avx512() -> bool:
    """And with it products in bf16. ONEDNN_MAX_CPU_ISA may forbid it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What F.linear computes, in fp32 or bf16, also with a matrix in oneDNN's own order."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
