"""A tape as a loop for the CPU, compiled by the machine's C++ compiler: a fraction of a second for each tape."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo.merge.cpp import source_of
from evo.merge.kernels import CannotCompile, Given
from evo.merge.tape import Node

_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC"),
    *("-fschedule-insns", "-fsched-pressure"),  # long loops would else run out of registers
)


class CppLoop:
    """See kernels.Loop. Runs in as many threads as torch.

    Raises:
        CannotCompile: without a compiler, or with one that fails.
    """

    def __init__(self, nodes: Sequence[Node], dtypes: Sequence[torch.dtype]) -> None:
        self.is_right: bool | None = None
        compiler = find_compiler()
        if compiler is None:
            raise CannotCompile("no C++ compiler (c++, g++, clang++ or $CXX)")
        with tempfile.TemporaryDirectory(prefix="mergefront-") as folder:
            source, library = Path(folder) / "merge.cpp", Path(folder) / "merge.so"
            source.write_text(source_of(nodes, dtypes))
            command = [compiler, *_FLAGS, str(source), "-o", str(library)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
                self._function = ctypes.CDLL(str(library)).merge
            except (subprocess.CalledProcessError, OSError) as error:
                raise CannotCompile(f"the C++ compiler failed: {getattr(error, 'stderr', '') or error}") from error
        self._function.restype = None
        self._function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3

    def pack(self, given: Given) -> tuple[Any, ...]:
        """See kernels.Loop."""
        return (
            _pointers(given.tensors, given.first),
            (ctypes.c_float * len(given.scalars))(*given.scalars),
            _pointers(given.tables),
            (ctypes.c_int32 * len(given.words))(*given.words),
        )

    def run(self, packed: tuple[Any, ...], out: Tensor, begin: int, n_columns: int) -> None:
        """See kernels.Loop."""
        n, n_threads = out.numel(), torch.get_num_threads()
        inputs, *rest = packed

        def piece(start: int) -> None:
            stop, place = min(start + step, n), out.data_ptr() + start * out.element_size()
            self._function(inputs, place, *rest, begin + start, begin + stop, n_columns)

        step = max(1, -(-n // n_threads))
        if step >= n:
            piece(0)
        else:
            list(_pool(n_threads).map(piece, range(0, n, step)))


def find_compiler() -> str | None:
    """The machine's C++ compiler, if it has one."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)


def _pointers(tensors: Sequence[Tensor], first: int = 0) -> Any:
    """Where element 0 is, or would be, if the tensors start with a later one."""
    places = (tensor.data_ptr() - _n_bytes(tensor, first) for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*places)


def _n_bytes(tensor: Tensor, n: int) -> int:
    """Of so many elements; of uint8, each half is one."""
    return n // 2 if tensor.dtype == torch.uint8 else n * tensor.element_size()
