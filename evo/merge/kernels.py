"""Merges in one pass over memory, where the machine has a C++ compiler: with the bits of the merge on tensors.

A merge on tensors goes through memory once for each operation. Here its operations are recorded and compiled to one
loop, once per process: a fraction of a second for each set of operations. Without a compiler there is no kernel, and
the merge runs on tensors.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo.merge import Method
from evo.merge.cpp import STORED, source_of
from evo.merge.noise import Key
from evo.merge.tape import Node, Tape, Untraceable

log = logging.getLogger("mergefront.merge")

_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC"),
    *("-fschedule-insns", "-fsched-pressure"),  # long loops would else run out of registers
)


@dataclass(eq=False)
class Loop:
    """A compiled function."""

    function: Any
    is_right: bool | None = None
    """Whether it has been seen to give the bits of the merge on tensors; None before anybody has looked."""


@dataclass(eq=False, slots=True)
class Fused:
    """A merge of one part, ready to run."""

    loop: Loop
    arguments: tuple[Any, ...]
    keep: tuple[Tensor, ...]
    """What the arguments point to."""
    n_columns: int
    first: int = 0
    """Number of the tensors' first element in the part."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: the base's."""
        return self.keep[0].dtype

    @property
    def n_elements(self) -> int:
        """Of the result."""
        return self.keep[0].numel()

    def result(self) -> Tensor:
        """The merged part, flat."""
        out = torch.empty(self.n_elements, dtype=self.dtype)
        self.run(out)
        return out

    def into(self, slot: Tensor) -> None:
        """Write the merged part into a tensor of as many elements, of any float dtype, on any device."""
        if slot.dtype == self.dtype and slot.device.type == "cpu" and slot.is_contiguous():
            self.run(slot)
        else:
            slot.copy_(self.result().view(slot.shape))

    def run(self, out: Tensor, begin: int = 0) -> None:
        """Compute elements begin, begin + 1, ... of the part.

        Args:
            out: a contiguous tensor of the base's dtype, filled with as many elements as it has.
            begin: number of the first among those of the tensors.
        """
        begin += self.first
        n, n_threads = out.numel(), torch.get_num_threads()
        step = max(1, -(-n // n_threads))
        pieces = [(at, min(at + step, n)) for at in range(0, n, step)]
        if len(pieces) == 1:
            self._piece(out, begin, 0, n)
        else:
            list(_pool(n_threads).map(lambda piece: self._piece(out, begin, *piece), pieces))

    def _piece(self, out: Tensor, begin: int, start: int, stop: int) -> None:
        inputs, *rest = self.arguments
        place = out.data_ptr() + start * out.element_size()
        self.loop.function(inputs, place, *rest, begin + start, begin + stop, self.n_columns)


_loops: dict[tuple[tuple[Node, ...], tuple[torch.dtype, ...]], Loop | None] = {}


def fuse(
    method: Method,
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    arguments: Mapping[str, Any],
    keys: Sequence[Key],
    *,
    may_compile: bool = True,
    first: int = 0,
) -> Fused | None:
    """Compile a merge of whole matrices, or find its loop among those compiled.

    Args:
        method: what to merge with.
        tensors: the base, then the D donors: matrices (R, C) in their stored dtypes.
        coefficients: D numbers.
        arguments: of the method's merge, without noise.
        keys: D streams of noise, for a random method.
        may_compile: if not, only loops that are there already are used.
        first: number of the tensors' first element in the part, where they are some whole rows of it.

    Returns:
        None where the merge has to run on tensors: no compiler, another device, dtype or layout, or an operation
        that cannot be compiled.
    """
    if not all(t.dtype in STORED and t.is_contiguous() and t.is_cpu for t in tensors):
        return None
    tape = Tape(len(tensors))
    noise = {"noise": [tape.symbol("noise", d) for d in range(len(tensors) - 1)]} if method.random else {}
    try:
        result = method.merge(tape.inputs[1:], tape.inputs[0], coefficients, **arguments, **noise)
    except Untraceable as error:
        _say_once(f"{error}: this merge is not compiled, and slower")
        return None
    key = (tape.key(result), (*(t.dtype for t in tensors), tensors[0].dtype))
    if key not in _loops and may_compile:
        _loops[key] = _compile(*key)
    loop = _loops.get(key)
    if loop is None:
        return None
    words = [word for key in keys for word in key]
    kept = tuple(tensor.contiguous() for tensor in tape.tensors)
    packed = (
        _pointers(tensors, first),
        (ctypes.c_float * len(tape.scalars))(*tape.scalars),
        _pointers(kept),
        (ctypes.c_int32 * len(words))(*words),
    )
    return Fused(loop, packed, (*tensors, *kept), tensors[0].shape[1], first)


def _compile(nodes: tuple[Node, ...], dtypes: tuple[torch.dtype, ...]) -> Loop | None:
    """The loop of a tape's key, or None."""
    compiler = find_compiler()
    if compiler is None:
        _say_once("no C++ compiler (c++, g++, clang++ or $CXX): merges run on tensors, slower and with the same bits")
        return None
    with tempfile.TemporaryDirectory(prefix="mergefront-") as folder:
        source, library = Path(folder) / "merge.cpp", Path(folder) / "merge.so"
        source.write_text(source_of(nodes, dtypes))
        command = [compiler, *_FLAGS, str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            function = ctypes.CDLL(str(library)).merge
        except (subprocess.CalledProcessError, OSError) as error:
            _say_once(f"a merge could not be compiled and runs on tensors: {getattr(error, 'stderr', '') or error}")
            return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3
    return Loop(function)


def find_compiler() -> str | None:
    """The machine's C++ compiler, if it has one."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)


def _pointers(tensors: Sequence[Tensor], first: int = 0) -> Any:
    """Where element 0 is, or would be, if the tensors start with a later one."""
    places = (tensor.data_ptr() - first * tensor.element_size() for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*places)
