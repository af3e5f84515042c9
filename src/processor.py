"""What the choice of a kernel on a CPU depends on."""

from functools import cache
from pathlib import Path


@cache
def is_amd() -> bool:
    """Whether MKL, by which PyTorch multiplies in fp32, leaves AVX-512 unused and is slow in matrix times vector."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "AuthenticAMD" in cpu.read_text()
