"""How the kernels of this folder are compiled."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from numba import njit

# Numba finds a kernel's machine code on the disk by the kernel's own file, and would use it although what the kernel calls from
# another file has changed. So the name that it is kept under holds a digest of all of them.
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:8]

helper = njit(fastmath=True, error_model="numpy", inline="always")
kernel = njit(fastmath=True, error_model="numpy")


def parallel_kernel(function: Callable) -> Callable:
    """A kernel to call from Python: its `prange` runs on all cores, without the GIL; its machine code is kept on the disk."""
    function.__qualname__ += f"_{_SOURCES}"
    return njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)(function)
