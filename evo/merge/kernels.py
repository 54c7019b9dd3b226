"""Merges in one pass over memory, where they can be compiled: with the bits of the merge on tensors.

A merge on tensors goes through memory once for each operation. Here its operations are recorded and compiled, once per
process for each set of operations: to a loop of C++ on the CPU, to a Triton kernel on a GPU. Where there is no compiler
the merge runs on tensors.
"""

from __future__ import annotations

import functools
import logging
import os
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from evo.merge import Method
from evo.merge.noise import Key
from evo.merge.tape import Node, Tape, Untraceable

log = logging.getLogger("mergefront.merge")

LOOPS = {"cpu": "evo.merge.cpp_loop:CppLoop", "cuda": "evo.merge.triton_kernel:TritonKernel"}
"""Kind of device -> what a tape is compiled to there, as "module:attribute"."""
STORED = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that a loop reads and writes."""
OFF = "MERGEFRONT_NO_COMPILE"
"""Environment variable that, set to anything, has all merges run on tensors."""


class CannotCompile(RuntimeError):
    """There is no compiler, or it failed. The merge can still be run on tensors."""


class Given(NamedTuple):
    """What a compiled tape works on."""

    tensors: Sequence[Tensor]
    """The base, then the donors; contiguous."""
    scalars: Sequence[float]
    tables: Sequence[Tensor]
    """The tape's tensors: numbers of rows, and tables; contiguous."""
    words: Sequence[int]
    """Of the streams of noise, two a donor."""
    first: int
    """Number of the tensors' first element in the part."""


class Loop(Protocol):
    """A compiled tape. Made from the tape's key: nodes, and dtypes of the inputs and of the result."""

    is_right: bool | None
    """Whether it has been seen to give the bits of the merge on tensors; None before anybody has looked."""

    def pack(self, given: Given) -> tuple[Any, ...]:
        """In the form that `run` takes; tensors may be mere addresses in it."""

    def run(self, packed: tuple[Any, ...], out: Tensor, begin: int, n_columns: int) -> None:
        """Compute as many elements of the part as `out` has, from number `begin` on."""


@dataclass(eq=False, slots=True)
class Fused:
    """A merge of one part, ready to run."""

    loop: Loop
    packed: tuple[Any, ...]
    given: Given
    """What was packed."""

    @property
    def base(self) -> Tensor:
        """The matrix (R, C) that the result is shaped like."""
        return self.given.tensors[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: the base's."""
        return self.base.dtype

    @property
    def n_elements(self) -> int:
        """Of the result."""
        return self.base.numel()

    def result(self) -> Tensor:
        """The merged part, flat."""
        out = torch.empty(self.n_elements, dtype=self.dtype, device=self.base.device)
        self.run(out)
        return out

    def into(self, slot: Tensor) -> None:
        """Write the merged part into a tensor of as many elements, of any float dtype, on any device."""
        if slot.dtype == self.dtype and slot.device == self.base.device and slot.is_contiguous():
            self.run(slot)
        else:
            slot.copy_(self.result().view(slot.shape))

    def run(self, out: Tensor, begin: int = 0) -> None:
        """Compute elements begin, begin + 1, ... of the part.

        Args:
            out: a contiguous tensor of the base's dtype and device, filled with as many elements as it has.
            begin: number of the first among those of the tensors.
        """
        self.loop.run(self.packed, out, begin + self.given.first, self.base.shape[1])


_loops: dict[tuple[str, tuple[Node, ...], tuple[torch.dtype, ...]], Loop | None] = {}


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
    device = tensors[0].device
    if device.type not in LOOPS or OFF in os.environ:
        return None
    if not all(t.dtype in STORED and t.is_contiguous() and t.device == device for t in tensors):
        return None
    try:
        tape, nodes = record(method, coefficients, arguments)
    except Untraceable as error:
        _say_once(f"{error}: this merge is not compiled, and slower")
        return None
    key = (device.type, nodes, (*(t.dtype for t in tensors), tensors[0].dtype))
    if key not in _loops and may_compile:
        _loops[key] = _compile(*key)
    loop = _loops.get(key)
    if loop is None:
        return None
    tables, words = [tensor.contiguous() for tensor in tape.tensors], [word for key in keys for word in key]
    given = Given(tensors, tape.scalars, tables, words, first)
    return Fused(loop, loop.pack(given), given)


def record(
    method: Method, coefficients: Sequence[float], arguments: Mapping[str, Any]
) -> tuple[Tape, tuple[Node, ...]]:
    """A merge written down: its tape, and the tape's key.

    Args:
        method: what to merge with.
        coefficients: D numbers.
        arguments: of the method's merge, without noise.

    Raises:
        Untraceable: if an operation cannot be compiled.
    """
    tape = Tape(len(coefficients) + 1)
    base, *donors = tape.inputs
    noise = {"noise": [tape.symbol("noise", d) for d in range(len(donors))]} if method.random else {}
    return tape, tape.key(method.merge(donors, base, coefficients, **arguments, **noise))


def _compile(kind: str, nodes: tuple[Node, ...], dtypes: tuple[torch.dtype, ...]) -> Loop | None:
    """The loop of a tape's key, or None."""
    try:
        loop: Loop = pkgutil.resolve_name(LOOPS[kind])(nodes, dtypes)
    except CannotCompile as error:
        _say_once(f"{error}: merges run on tensors, slower and with the same bits")
        return None
    return loop


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
