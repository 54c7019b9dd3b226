"""A tape as a Triton kernel: one pass over a GPU's memory.

Every operation is rounded by itself, as in the C++ loop (cpp.py): no fused multiply-add, division rounded correctly,
bfloat16 converted by hand (Triton's interpreter rounds otherwise). A program computes up to 1,024 elements of a row.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo.merge.kernels import CannotCompile, Given
from evo.merge.magprune import chances
from evo.merge.tape import Node

MOST_ELEMENTS = 1024
"""Of a program."""

_EXPRESSIONS = {
    "input": "to_float32(tl.load(x{0} + at, mask=there, other=0.0))",
    "half": "((tl.load(x{0} + (at >> 1), mask=there, other=0).to(tl.int32) >> ((at & 1) * 4).to(tl.int32) & 15) - 8)"
    ".to(tl.float32)",
    "noise": "uniform(i, k{0}, l{0})",
    "scalar": "tl.full([N], s{0}, tl.float32)",
    "row": "tl.full([N], tl.load(t{0} + first_row + row), tl.float32)",
    "tile": "tl.load(t{0} + (first_row + row) // {1} * ((n_columns + {2} - 1) // {2}) + column // {2}, "
    "mask=there, other=0.0)",
    "magprune": "magprune(v{0}, v{2}, t{5} + bucket(v{0} * v{1}), {6})",
    "add_product": "add_product(v{0}, t{1} + (first_row + row) * {3}, t{2} + column, n_columns, there, {3})",
    "add": "v{0} + v{1}",
    "sub": "v{0} - v{1}",
    "mul": "v{0} * v{1}",
    "div": "tl.math.div_rn(v{0}, v{1})",
    "ge": "tl.where(v{0} >= v{1}, 1.0, 0.0)",
    "gt": "tl.where(v{0} > v{1}, 1.0, 0.0)",
    "le": "tl.where(v{0} <= v{1}, 1.0, 0.0)",
    "lt": "tl.where(v{0} < v{1}, 1.0, 0.0)",
    "eq": "tl.where(v{0} == v{1}, 1.0, 0.0)",
    "copysign": "floats((bits(v{0}) & 0x7fffffff) | (bits(v{1}) & SIGN))",
    "clamp_min": "tl.where(v{0} < v{1}, v{1}, v{0})",
    "clamp_max": "tl.where(v{0} > v{1}, v{1}, v{0})",
    "hardshrink": "tl.where(tl.abs(v{0}) <= v{1}, 0.0, v{0})",
    "abs": "tl.abs(v{0})",
    "neg": "floats(bits(v{0}) ^ SIGN)",
    "sign": "tl.where(v{0} > 0.0, 1.0, 0.0) - tl.where(v{0} < 0.0, 1.0, 0.0)",
    "square": "v{0} * v{0}",
}
_STORED = {
    torch.float32: "v{0}",
    torch.float16: "v{0}.to(tl.float16)",
    torch.bfloat16: "to_bfloat16(v{0})",
    torch.float8_e4m3fn: "to_e4m3(v{0})",
}
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*u8",
    torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
_OPTIONS = {"enable_fp_fusion": False}


class TritonKernel:
    """See kernels.Loop.

    Raises:
        CannotCompile: without Triton.
    """

    def __init__(self, nodes: Sequence[Node], dtypes: Sequence[torch.dtype]) -> None:
        self.is_right: bool | None = None
        self._nodes, self._dtypes = nodes, dtypes
        self._has_rows = any(operation in ("row", "tile", "add_product") for operation, *_ in nodes)
        try:
            with tempfile.TemporaryDirectory(prefix="mergefront-") as folder:  # Triton reads a function from its file
                file = Path(folder) / "merge_kernel.py"
                file.write_text(source_of(nodes, dtypes))
                spec = importlib.util.spec_from_file_location("merge_kernel", file)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
        except ImportError as error:
            raise CannotCompile(f"no Triton ({error})") from error
        self._kernel = module.merge

    def pack(self, given: Given) -> tuple[Any, ...]:
        """See kernels.Loop."""
        tables = list(given.tables)
        for _, _, _, _, least, slope, ranks, _ in (node for node in self._nodes if node[0] == "magprune"):
            least, slope = (given.scalars[self._nodes[number][1]] for number in (least, slope))
            chance = chances(given.tables[ranks], least, slope)
            tables[ranks] = torch.cat([chance, chance.reciprocal()])  # a division for each element would cost more
        return given.first, (*map(_as_bytes, given.tensors), *given.scalars, *tables, *given.words)

    def run(self, packed: tuple[Any, ...], out: Tensor, begin: int, n_columns: int) -> None:
        """See kernels.Loop; where rows have numbers of their own, the tensors and `out` start with whole rows."""
        first, arguments = packed
        if not out.numel():
            return
        begin, first_row = begin - first, first // n_columns
        end = begin + out.numel()
        if not self._has_rows:  # then all is one row, and no program has less to do than others
            n_columns = end
        n = max(64, min(MOST_ELEMENTS, 1 << (n_columns - 1).bit_length()))
        n_pieces = -(-n_columns // n)
        grid = ((-(-end // n_columns) - begin // n_columns) * n_pieces,)
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            self._kernel[grid](
                *(_as_bytes(out), begin, end, first, first_row, n_columns, n_pieces),
                *arguments,
                N=n,
                **_OPTIONS,
            )

    def compiled_for(self, capability: int) -> dict[str, Any]:
        """What a GPU would run, which need not be here: of programs of 1,024 elements, all of it aligned.

        Args:
            capability: compute capability of the GPU, e.g. 90.

        Returns:
            "ptx" (text), "cubin" (bytes) and what else Triton makes.
        """
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kinds = {"N": "constexpr", "out": _POINTERS[self._dtypes[-1]]}
        kinds |= {f"x{i}": _POINTERS[dtype] for i, dtype in enumerate(self._dtypes[:-1])}
        signature = {n: kinds.get(n) or {"s": "fp32", "t": "*fp32"}.get(n[0], "i32") for n in self._kernel.arg_names}
        aligned = {"begin", "end", "first", "n_columns", *(n for n, kind in signature.items() if kind.startswith("*"))}
        hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
        source = ASTSource(self._kernel, signature, {"N": MOST_ELEMENTS}, hints)
        found: dict[str, Any] = compile(source, target=GPUTarget("cuda", capability, 32), options=_OPTIONS).asm
        return found


def _as_bytes(tensor: Tensor) -> Tensor:
    """E4M3 numbers are read and written as their bits."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def source_of(nodes: Sequence[Node], dtypes: Sequence[torch.dtype]) -> str:
    """A module with a kernel `merge` for a tape's key.

    Args:
        nodes: operations, the last of which names the result.
        dtypes: of the inputs, then of the result.
    """
    n = Counter(operation for operation, *_ in nodes)
    n_tables = n["row"] + n["tile"] + n["magprune"] + 2 * n["add_product"]
    names = [f"x{i}" for i in range(len(dtypes) - 1)]
    names += [f"s{i}" for i in range(n["scalar"])]
    names += [f"t{i}" for i in range(n_tables)]
    words = [f"{letter}{d}" for d in range(n["noise"]) for letter in "kl"]
    values = [_EXPRESSIONS[operation].format(*operands) for operation, *operands in nodes[:-1]]
    return _SOURCE.format(
        words=words,
        names=", ".join([*names, *words]),
        body="\n    ".join(f"v{v} = {value}" for v, value in enumerate(values)),
        result=_STORED[dtypes[-1]].format(nodes[-1][1]),
    )


_SOURCE = """
import triton
import triton.language as tl

SIGN: tl.constexpr = tl.constexpr(-2147483648)
MASK: tl.constexpr = tl.constexpr(0x87f00000 - (1 << 32))


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def floats(x):
    return x.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def to_float32(x):
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.uint8:  # E4M3, as evo.merge.scaled.floats
        b = (x.to(tl.int8, bitcast=True).to(tl.int32) << 20) & MASK
        return b.to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        return x.to(tl.float32)


@triton.jit
def to_bfloat16(x):
    b = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7fc00000)  # a GPU's NaN, 0x7fffffff, would become -0
    b = (b + 0x7fff + ((b >> 16) & 1)) >> 16
    return b.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_e4m3(x):
    b = x.to(tl.uint32, bitcast=True)
    m = b & 0x7fffffff
    normal = (m + 0x7ffff + ((m >> 20) & 1) - (120 << 23)) >> 20
    subnormal = (m.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - (141 << 23)
    found = tl.where(m >= 0x43f00000, 0x7f, tl.where(m < (121 << 23), subnormal, normal))
    return (found | ((b >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def uniform(i, first_word, second_word):
    # Number i of a stream, as in noise.py: each hash makes two numbers of 16 bits.
    x = (i >> 1).to(tl.uint32) ^ first_word.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * tl.full([1], 0x7feb352d, tl.uint32) ^ second_word.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 15)) * tl.full([1], 0x846ca68b, tl.uint32)
    x = x ^ (x >> 16)
    half = tl.where((i & 1) == 1, x >> 16, x & 0xffff) ^ 0x8000
    return half.to(tl.int32).to(tl.float32) * 1.52587890625e-05


@triton.jit
def bucket(x):
    # As in magprune.py: buckets are the upper halves of floats from one to another, over 32.
    upper = (bits(x) & 0x7fffffff) >> 16
    return (tl.minimum(tl.maximum(upper, 0x3800), 0x3fff) - 0x3800) >> 5


@triton.jit
def magprune(tau, noise, table, rescale: tl.constexpr):
    kept = noise < tl.load(table)  # its chance; 1 / chance is 64 numbers later
    return tau * tl.where(kept, tl.load(table + 64) if rescale else 1.0, 0.0)


@triton.jit
def add_product(x, left, right, n_columns, there, rank: tl.constexpr):
    total = tl.full(x.shape, 0.0, tl.float64)
    for k in range(rank):  # exact, in whatever order
        number = tl.load(left + k).to(tl.float64)
        total += number * tl.load(right + k * n_columns, mask=there, other=0.0).to(tl.float64)
    return (total + x.to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize={words})
def merge(out, begin, end, first, first_row, n_columns, n_pieces, {names}, N: tl.constexpr):
    # Elements begin to end - 1 of tensors whose first element and row have these numbers in the part.
    program = tl.program_id(0)
    row = (begin // n_columns + program // n_pieces).to(tl.int64)
    column = (program % n_pieces).to(tl.int64) * N + tl.arange(0, N)
    at = row * n_columns + column
    there = (column < n_columns) & (at >= begin) & (at < end)
    i = first + at
    {body}
    tl.store(out + (at - begin), {result}, mask=there)
"""
