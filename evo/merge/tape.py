"""Writes down what a merge does to one element, so that it can be compiled to a single loop.

A merge is run once on symbols in place of tensors. Its own Python decides which operations happen; numbers that
may change from candidate to candidate (coefficients, thresholds) are kept apart from the operations, so that two
candidates have the same operations, and need one kernel, unless they take different branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Node = tuple[Any, ...]
"""An operation and its operands: indices of nodes, or plain integers where the operation says so."""

_BINARY = ("add", "sub", "mul", "div", "ge", "gt", "le", "lt", "eq", "clamp_min", "clamp_max", "hardshrink")
_UNARY = ("abs", "neg", "sign", "square")
_OPERATORS = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div"}


class Untraceable(TypeError):
    """A merge does something that is not known here. It can still be run on tensors."""


class Tape:
    """What has been recorded.

    Args:
        n_inputs: number of tensors, the base first.
    """

    def __init__(self, n_inputs: int) -> None:
        self.nodes: list[Node] = []
        self.scalars: list[float] = []
        self.tensors: list[Tensor] = []
        """Rows, of shape (R, 1), and tables, of shape (K,), both float32."""
        self.inputs = [self.symbol("input", i) for i in range(n_inputs)]

    def symbol(self, operation: str, *operands: int) -> Symbol:
        """The result of an operation."""
        self.nodes.append((operation, *operands))
        return Symbol(self, len(self.nodes) - 1)

    def index(self, operand: Any) -> int:
        """The node of a symbol, a number, or a tensor with a number for each row."""
        if isinstance(operand, Symbol):
            return operand.node
        if isinstance(operand, int | float):
            self.scalars.append(float(operand))
            return self.symbol("scalar", len(self.scalars) - 1).node
        if isinstance(operand, Tensor) and operand.ndim == 2 and operand.shape[1] == 1:
            self.tensors.append(operand)
            return self.symbol("row", len(self.tensors) - 1).node
        raise Untraceable(f"cannot record an operation on {type(operand).__name__}")

    def key(self, result: Any) -> tuple[Node, ...]:
        """Equal where one loop does for both, for the symbol that a merge returned."""
        return (*self.nodes, ("result", result.node))


class Symbol:
    """Stands for any one element of a tensor. Has the part of a tensor's interface that merges use."""

    __slots__ = ("node", "tape")

    def __init__(self, tape: Tape, node: int) -> None:
        self.tape, self.node = tape, node

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"cannot record Tensor.{name}")

    def clamp(self, low: float, high: float) -> Symbol:
        """Numbers below `low` or above `high` replaced by these."""
        return self.clamp_min(low).clamp_max(high)  # type: ignore[no-any-return]

    def clamp_(self, low: float, high: float) -> Symbol:
        """The same in place."""
        return self._become(self.clamp(low, high))

    def zero_(self) -> Symbol:
        """Zero."""
        return self._become(self.tape.symbol("scalar", self.tape.nodes[self.tape.index(0.0)][1]))

    def clone(self) -> Symbol:
        """A symbol of its own."""
        return Symbol(self.tape, self.node)

    def reshape(self, *shape: int) -> Symbol:
        """Itself: what is done to an element does not depend on the shape."""
        return self

    def view_as(self, other: Symbol) -> Symbol:
        """Itself."""
        return self

    def view(self, dtype: torch.dtype) -> Bits:
        """The bits of a float32."""
        if dtype is not torch.int32:
            raise Untraceable(f"cannot record a view as {dtype}")
        self.tape.nodes.append(("bits", self.node))
        return Bits(self.tape, len(self.tape.nodes) - 1)

    def _become(self, other: Symbol) -> Symbol:
        self.node = other.node
        return self

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Symbol:
        name, out = function.__name__, (kwargs or {}).pop("out", None)
        tape: Tape = next(x for x in args if isinstance(x, Symbol | Bits)).tape
        if name == "empty_like":
            return Symbol(tape, -1)
        if name == "index_select":
            return _gather(tape, *args)
        if kwargs or len(args) != 2 or name not in _BINARY:
            raise Untraceable(f"cannot record torch.{name}")
        found = tape.symbol(name, *(tape.index(x) for x in args))
        return found if out is None else out._become(found)


class Bits(Symbol):
    """Stands for an int32: the index into a table."""

    __slots__ = ()

    def __rshift__(self, n_bits: int) -> Bits:
        return self._next("shift", n_bits)

    def sub_(self, number: int) -> Bits:
        """Minus a number."""
        return self._next("minus", number)

    def clamp_(self, low: int, high: int) -> Bits:  # type: ignore[override]
        """Kept between two numbers."""
        return self._next("between", low, high)

    def _next(self, operation: str, *numbers: int) -> Bits:
        self.tape.nodes.append((operation, self.node, *numbers))
        return Bits(self.tape, len(self.tape.nodes) - 1)


def _gather(tape: Tape, table: Tensor, dim: int, index: Bits) -> Symbol:
    tape.tensors.append(table)
    return tape.symbol("gather", len(tape.tensors) - 1, index.node)


def _binary(name: str, swapped: bool = False) -> Callable[[Symbol, Any], Symbol]:
    def call(self: Symbol, other: Any) -> Symbol:
        operands = (self.node, self.tape.index(other))
        return self.tape.symbol(name, *(operands[::-1] if swapped else operands))

    return call


def _in_place(function: Callable[..., Symbol]) -> Callable[..., Symbol]:
    return lambda self, *args: self._become(function(self, *args))


for _name in _BINARY:
    setattr(Symbol, _name, _binary(_name))
    setattr(Symbol, f"{_name}_", _in_place(_binary(_name)))
for _name in _UNARY:
    setattr(Symbol, _name, lambda self, _name=_name: self.tape.symbol(_name, self.node))
    setattr(Symbol, f"{_name}_", _in_place(getattr(Symbol, _name)))
for _operator, _name in _OPERATORS.items():
    setattr(Symbol, f"__{_operator}__", _binary(_name))
    setattr(Symbol, f"__r{_operator}__", _binary(_name, swapped=True))
    setattr(Symbol, f"__i{_operator}__", _in_place(_binary(_name)))
