"""Writes down what a merge does to one element, so that it can be compiled to a single loop.

A merge is run once on symbols in place of tensors. Its own Python decides which operations happen; numbers that
may change from candidate to candidate (coefficients, thresholds) are kept apart from the operations, so that two
candidates have the same operations, and need one kernel, unless they take different branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from evo.merge.magprune import magprune

Node = tuple[Any, ...]
"""An operation and its operands: indices of nodes, or plain integers where the operation says so."""

_BINARY = ("add", "sub", "mul", "div", "ge", "gt", "le", "lt", "eq", "clamp_min", "clamp_max", "hardshrink", "copysign")
_UNARY = ("abs", "neg", "sign", "square")
_OPERATORS = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div"}


class Untraceable(TypeError):
    """A merge does something that is not known here. It can still be run on tensors."""


class Tape:
    """What has been recorded. Symbols are not held: tapes are many, and would go in circles."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inputs: list[Tensor] = []
        """Matrices (R, C) that are read element by element."""
        self.scalars: list[float] = []
        self.tensors: list[Tensor] = []
        """Rows, of shape (R, 1), numbers of tiles, tables, of shape (64,), and thin matrices, all float32."""

    def read(self, tensor: Tensor) -> Symbol:
        """An element of a matrix."""
        for i, known in enumerate(self.inputs):
            if known is tensor:
                return Symbol(self, self.nodes.index(("input", i)))
        self.inputs.append(tensor)
        return self.symbol("input", len(self.inputs) - 1)

    def read_halves(self, codes: Tensor) -> Symbol:
        """An element of a matrix (R, C), C even, of whole numbers from -8 to 7, two to a byte, the lower half first.

        Args:
            codes: of all elements, each with 8 added, (R, C / 2), uint8.
        """
        self.inputs.append(codes)
        return self.symbol("half", len(self.inputs) - 1)

    def tiles(self, numbers: Tensor, shape: tuple[int, int]) -> Symbol:
        """The number of the tile that an element is in.

        Args:
            numbers: of all tiles, (R / height, C / width), both rounded up.
            shape: height and width of a tile.
        """
        self.tensors.append(numbers.float())
        return self.symbol("tile", len(self.tensors) - 1, *shape)

    def add_product(self, symbol: Symbol, left: Tensor, right: Tensor) -> Symbol:
        """Something plus an element of a product of thin matrices, in float64.

        Args:
            symbol: what it is added to.
            left: (R, r), float32; products with `right` and sums of them are exact in float64.
            right: (r, C), float32.
        """
        self.tensors += [left, right]
        return self.symbol("add_product", symbol.node, len(self.tensors) - 2, len(self.tensors) - 1, left.shape[1])

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
            self.nodes.append(("scalar", len(self.scalars) - 1))
            return len(self.nodes) - 1
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

    def _no_answer(self, *_: object) -> bool:
        """Of all elements at once: Python would take what it knows of any object for one."""
        raise Untraceable("cannot record a comparison with an operator, or what Python does for either answer")

    __bool__ = __eq__ = __ne__ = _no_answer  # type: ignore[assignment]
    __hash__ = object.__hash__

    def clamp(self, low: float, high: float) -> Symbol:
        """Numbers below `low` or above `high` replaced by these."""
        return self.clamp_min(low).clamp_max(high)  # type: ignore[no-any-return]

    def clamp_(self, low: float, high: float) -> Symbol:
        """The same in place."""
        self.node = self.clamp(low, high).node
        return self

    def fill_(self, number: float) -> Symbol:
        """The number instead."""
        self.node = self.tape.index(number)
        return self

    def zero_(self) -> Symbol:
        """Zero."""
        return self.fill_(0.0)

    def clone(self) -> Symbol:
        """A symbol of its own."""
        return Symbol(self.tape, self.node)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Symbol:
        """What is asked of a tensor, with a symbol for an argument."""
        if function is not magprune:
            raise Untraceable(f"cannot record torch.{function.__name__}")
        tau, rows, ranks, noise, least, slope, rescale = args
        tape: Tape = tau.tape
        numbers = [tape.index(number) for number in (rows, noise, least, slope)]
        tape.tensors.append(ranks)
        return tape.symbol("magprune", tau.node, *numbers, len(tape.tensors) - 1, int(rescale))


def _binary(name: str, *, swapped: bool = False, in_place: bool = False) -> Callable[[Symbol, Any], Symbol]:
    def call(self: Symbol, other: Any) -> Symbol:
        tape = self.tape
        node = other.node if type(other) is Symbol else tape.index(other)
        tape.nodes.append((name, node, self.node) if swapped else (name, self.node, node))
        if not in_place:
            return Symbol(tape, len(tape.nodes) - 1)
        self.node = len(tape.nodes) - 1
        return self

    return call


def _unary(name: str, *, in_place: bool = False) -> Callable[[Symbol], Symbol]:
    def call(self: Symbol) -> Symbol:
        found = self.tape.symbol(name, self.node)
        if not in_place:
            return found
        self.node = found.node
        return self

    return call


for _name in _BINARY:
    setattr(Symbol, _name, _binary(_name))
    setattr(Symbol, f"{_name}_", _binary(_name, in_place=True))
for _name in _UNARY:
    setattr(Symbol, _name, _unary(_name))
    setattr(Symbol, f"{_name}_", _unary(_name, in_place=True))
for _operator, _name in _OPERATORS.items():
    setattr(Symbol, f"__{_operator}__", _binary(_name))
    setattr(Symbol, f"__r{_operator}__", _binary(_name, swapped=True))
    setattr(Symbol, f"__i{_operator}__", _binary(_name, in_place=True))
