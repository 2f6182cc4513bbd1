"""Norms of rows on CPU by a kernel of our own, compiled in the process that asks for it (``cpu_kernel=True``).

torch's kernel keeps one sum a row and waits for memory at the end of each; see docs/performance.md for what that costs.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared")


@cache
def load() -> Any:
    """Compile the kernel (0.25 s) and return its function. RuntimeError: there is no C++ compiler, or it fails.

    Nothing is kept on disk, so that no lock and no cache can be left behind, and nothing built for one machine be found
    on another that shares its home.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    with tempfile.TemporaryDirectory(prefix="dist_agc-") as folder:
        library = Path(folder, "row_norms.so")
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            function = ctypes.CDLL(str(library)).row_norms
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise RuntimeError(
                "cpu_kernel=True compiles a kernel and needs a C++ compiler with OpenMP, such as g++ (the environment "
                "variable CXX names another), and a folder for temporary files from which programs may run (TMPDIR "
                f"names another). Install one, or leave cpu_kernel out. `{shlex.join(command)}` said: {said}"
            ) from error
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    return function


def serves(x: Tensor, reduced: tuple[int, ...], out: Tensor) -> bool:
    """Whether `row_norms` can find the norms of ``x`` over the dims ``reduced``: fp32 rows without gaps, on CPU."""
    summed = [d in reduced for d in range(x.ndim) if x.shape[d] > 1]  # dims of size 1 say nothing
    in_rows = bool(reduced) and summed == sorted(summed)
    # Within a row the order of elements does not matter.
    any_order = x.ndim == 4 and {1, 2, 3} <= {*reduced}
    dense = x.is_contiguous() or (any_order and x.is_contiguous(memory_format=torch.channels_last))
    plain = all(t.is_cpu and t.dtype == torch.float32 and not t.is_neg() for t in (x, out)) and out.is_contiguous()
    return in_rows and dense and plain and x.numel() > 0


def row_norms(x: Tensor, reduced: tuple[int, ...], out: Tensor) -> Tensor:
    """L2 norms over ``reduced``, of what `serves`."""
    rows = out.numel()
    load()(x.data_ptr(), rows, x.numel() // rows, out.data_ptr(), torch.get_num_threads())
    return out
