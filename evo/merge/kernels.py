"""Merges in one pass over memory, where they can be compiled: with the bits of the merge on tensors.

A merge on tensors goes through memory once for each operation. Here its operations are recorded and compiled, once per
process for each set of operations: to a loop of C++ on the CPU, to a Triton kernel on a GPU. Where there is no compiler
the merge runs on tensors.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from evo.merge import Method
from evo.merge.blocks import Block, Operand
from evo.merge.noise import Key
from evo.merge.tape import Node, Symbol, Tape, Untraceable

log = logging.getLogger("mergefront.merge")

LOOPS = {"cpu": "evo.merge.cpp_loop:CppLoop", "cuda": "evo.merge.triton_kernel:TritonKernel"}
"""Kind of device -> what a tape is compiled to there, as "module:attribute"."""
READ = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8)
"""The dtypes that a loop reads; of uint8, each half is a number."""
WRITTEN = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
"""The dtypes that a loop writes; float32 is also what has yet to be encoded."""
FUSE_FROM_ELEMENTS = 1 << 16
"""Smaller parts are not worth compiling a loop for."""
OFF = "MERGEFRONT_NO_COMPILE"
"""Environment variable that, set to anything, has all merges run on tensors."""


@runtime_checkable
class Recordable(Protocol):
    """An operand that is no tensor, and can be written down as what is done to some."""

    def symbol(self, tape: Tape) -> Symbol:
        """An element of it, as `__getitem__` computes one."""


class CannotCompile(RuntimeError):
    """There is no compiler, or it failed. The merge can still be run on tensors."""


class Given(NamedTuple):
    """What a compiled tape works on."""

    tensors: Sequence[Tensor]
    """The tape's inputs, the base's first; contiguous."""
    scalars: Sequence[float]
    tables: Sequence[Tensor]
    """The tape's tensors: numbers of rows and tiles, and tables; contiguous."""
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
    dtype: torch.dtype
    """Of the result."""
    blame: Callable[[Tensor], object] | None = None
    """Called with some of the result whose sum is not finite: finds out why."""

    @property
    def base(self) -> Tensor:
        """The matrix (R, C) that the result is shaped like."""
        return self.given.tensors[0]

    @property
    def n_elements(self) -> int:
        """Of the result."""
        return self.base.numel()

    def result(self) -> Tensor:
        """The merged part, flat."""
        out = torch.empty(self.n_elements, dtype=self.dtype, device=self.base.device)
        self.run(out)
        return out

    def block(self, block: Block) -> Tensor:
        """A block of the merged part, (r, c), as PartMerge.block gives it where the base is encoded."""
        rows, columns = block
        out = torch.empty(
            rows.stop - rows.start, columns.stop - columns.start, dtype=self.dtype, device=self.base.device
        )
        self.run(out, rows.start * self.base.shape[1] + columns.start)
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
            out: a contiguous tensor of the result's dtype on the base's device, filled with as many elements as it has.
            begin: number of the first among those of the tensors.
        """
        self.loop.run(self.packed, out, begin + self.given.first, self.base.shape[1])
        if self.blame is not None and not math.isfinite(float(out.sum())):
            self.blame(out)


_loops: dict[tuple[str, tuple[Node, ...], tuple[torch.dtype, ...]], Loop | None] = {}


def fuse(
    method: Method,
    operands: Sequence[Operand],
    coefficients: Sequence[float],
    arguments: Mapping[str, Any],
    keys: Sequence[Key],
    *,
    dtype: torch.dtype,
    may_compile: bool = True,
    first: int = 0,
) -> Fused | None:
    """Compile a merge of whole matrices, or find its loop among those compiled.

    Args:
        method: what to merge with.
        operands: the base, then the D donors: matrices (R, C).
        coefficients: D numbers.
        arguments: of the method's merge, without noise.
        keys: D streams of noise, for a random method.
        dtype: of the result.
        may_compile: if not, only loops that are there already are used.
        first: number of the operands' first element in the part, where they are some whole rows of it.

    Returns:
        None where the merge has to run on tensors: no compiler, another device, dtype or layout, or an operation
        that cannot be compiled.
    """
    if not _compiles_for(operands[0].device):
        return None
    try:
        tape, nodes = record(method, operands, coefficients, arguments)
    except Untraceable as error:
        _say_once(f"{error}: this merge runs on tensors, slower and with the same bits")
        return None
    return _fused(tape, nodes, dtype, [word for key in keys for word in key], may_compile, first)


def compute(write_down: Callable[[Tape], Symbol], on_tensors: Callable[[Tensor], object], out: Tensor) -> None:
    """Compute something for each element of matrices, compiled where it can be.

    Args:
        write_down: records it.
        on_tensors: does the same on tensors: fills one that is like `out`.
        out: what to fill, (R, C), of any float dtype.
    """

    def expected() -> Tensor:
        found = torch.empty_like(out)
        on_tensors(found)
        return found

    if out.is_contiguous() and out.dtype in WRITTEN and _compiles_for(out.device):
        tape = Tape()
        nodes = tape.key(write_down(tape))
        fused = _fused(tape, nodes, out.dtype, [], out.numel() >= FUSE_FROM_ELEMENTS, 0)
        if fused is not None and is_right(fused, expected):
            fused.run(out)
            return
    on_tensors(out)


def is_right(fused: Fused, expected: Callable[[], Tensor]) -> bool:
    """Whether a loop has the bits of the same on tensors: compared the first time that it is asked of a loop.

    Args:
        fused: with the loop.
        expected: gives the first elements of the result, in its dtype.
    """
    if fused.loop.is_right is None:
        fused.loop.is_right = _gives(fused, expected().contiguous())
    return fused.loop.is_right


def _gives(fused: Fused, expected: Tensor) -> bool:
    """A compiler that does not keep to the rules must not change a merge."""
    found = torch.empty_like(expected)
    try:
        fused.run(found)
    except torch.OutOfMemoryError:  # says nothing of the loop
        raise
    except Exception as error:  # of whatever kind: compilers of GPU code, which run late, have many
        log.warning("the compiled loop of a merge does not run, and is not used: %s", error)
        return False
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    same = (found.view(integers) == expected.view(integers)) | (found.float().isnan() & expected.float().isnan())
    if not same.all():
        log.warning("the compiled loop of a merge has other bits than the merge on tensors, and is not used")
    return bool(same.all())


def _compiles_for(device: torch.device) -> bool:
    return device.type in LOOPS and OFF not in os.environ


def _fused(
    tape: Tape, nodes: tuple[Node, ...], dtype: torch.dtype, words: Sequence[int], may_compile: bool, first: int
) -> Fused | None:
    """A tape ready to run, if it can be compiled."""
    inputs = tape.inputs
    device = inputs[0].device
    if not all(t.dtype in READ and t.is_contiguous() and t.device == device for t in inputs):
        return None
    key = (device.type, nodes, (*(t.dtype for t in inputs), dtype))
    if key not in _loops and may_compile:
        _loops[key] = _compile(*key)
    loop = _loops.get(key)
    if loop is None:
        return None
    if first:
        _number_from_the_top(tape, first // inputs[0].shape[1])
    given = Given(inputs, tape.scalars, [tensor.contiguous() for tensor in tape.tensors], words, first)
    return Fused(loop, loop.pack(given), given, dtype)


def record(
    method: Method, operands: Sequence[Operand], coefficients: Sequence[float], arguments: Mapping[str, Any]
) -> tuple[Tape, tuple[Node, ...]]:
    """A merge written down: its tape, and the tape's key.

    Args:
        method: what to merge with.
        operands: the base, then the D donors: matrices (R, C).
        coefficients: D numbers.
        arguments: of the method's merge, without noise.

    Raises:
        Untraceable: if an operand or an operation cannot be compiled.
    """
    tape = Tape()
    base, *donors = (symbol_of(operand, tape) for operand in operands)
    noise = {"noise": [tape.symbol("noise", d) for d in range(len(donors))]} if method.random else {}
    try:
        merged = method.merge(donors, base, coefficients, **arguments, **noise)
    except Untraceable:
        raise
    except Exception as error:  # of a method that is wrong, or of one that does to a tensor what no symbol can
        raise Untraceable(f"cannot record this merge ({type(error).__name__}: {error})") from error
    if not isinstance(merged, Symbol):
        raise Untraceable(f"cannot record a merge that returns {type(merged).__name__}")
    return tape, tape.key(merged)


def symbol_of(operand: Operand, tape: Tape) -> Symbol:
    """An element of an operand.

    Raises:
        Untraceable: if it cannot be recorded.
    """
    if isinstance(operand, Tensor):
        return tape.read(operand)
    if not isinstance(operand, Recordable):
        raise Untraceable(f"cannot record {type(operand).__name__}")
    return operand.symbol(tape)


def _number_from_the_top(tape: Tape, n_rows: int) -> None:
    """Rows of tiles and of thin matrices are those of whole parts; of some rows of one, those above are anything."""
    for operation, *operands in tape.nodes:
        if operation in ("tile", "add_product"):
            table, height = (operands[0], operands[1]) if operation == "tile" else (operands[1], 1)
            numbers = tape.tensors[table]
            tape.tensors[table] = torch.cat([numbers.new_zeros(n_rows // height, numbers.shape[1]), numbers])


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
