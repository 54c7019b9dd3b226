"""The C++ of a tape: one loop over the elements.

Every operation is rounded by itself to float32, one after the other, as torch does it on tensors, so the loop has the
bits of the merge. Knows no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evo.merge.tape import Node

STORED = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
"""The dtypes that a loop reads and writes."""

_EXPRESSIONS = {
    "input": "float_of(x{0}[c])",
    "noise": "(float)(int32_t)u{0}.halves[c + odd] * 0x1p-16f",
    "scalar": "s[{0}]",
    "row": "t[{0}][r]",
    "gather": "t{0}[v{1}]",
    "add": "v{0} + v{1}",
    "sub": "v{0} - v{1}",
    "mul": "v{0} * v{1}",
    "div": "v{0} / v{1}",
    "ge": "v{0} >= v{1} ? 1.0f : 0.0f",
    "gt": "v{0} > v{1} ? 1.0f : 0.0f",
    "le": "v{0} <= v{1} ? 1.0f : 0.0f",
    "lt": "v{0} < v{1} ? 1.0f : 0.0f",
    "eq": "v{0} == v{1} ? 1.0f : 0.0f",
    "clamp_min": "v{0} < v{1} ? v{1} : v{0}",
    "clamp_max": "v{0} > v{1} ? v{1} : v{0}",
    "hardshrink": "std::fabs(v{0}) <= v{1} ? 0.0f : v{0}",
    "abs": "std::fabs(v{0})",
    "neg": "-v{0}",
    "sign": "(v{0} > 0.0f ? 1.0f : 0.0f) - (v{0} < 0.0f ? 1.0f : 0.0f)",
    "square": "v{0} * v{0}",
    "bits": "bits_of(v{0})",
    "shift": "v{0} >> {1}",
    "minus": "v{0} - {1}",
    "between": "v{0} < {1} ? {1} : v{0} > {2} ? {2} : v{0}",
}
_INTEGERS = ("bits", "shift", "minus", "between")


def source_of(nodes: Sequence[Node], dtypes: Sequence[torch.dtype]) -> str:
    """A C++ function `merge` for a tape's key.

    Args:
        nodes: operations, the last of which names the result.
        dtypes: of the inputs, then of the result.
    """
    lines: dict[str, list[str]] = {"call": [], "strip": [], "element": []}
    for i, dtype in enumerate(dtypes[:-1]):
        lines["strip"].append(f"const {STORED[dtype]}* __restrict x{i} = (const {STORED[dtype]}*)x[{i}] + i;")
    for v, (operation, *operands) in enumerate(nodes[:-1]):
        if operation == "noise":
            lines["strip"].append(f"hashes u{operands[0]}; fill(u{operands[0]}, (uint32_t)(i >> 1), k[{operands[0]}]);")
        if operation == "gather":
            lines["call"].append(f"const float* __restrict t{operands[0]} = t[{operands[0]}];")
        place = {"scalar": "call", "row": "strip"}.get(operation, "element")
        kind = "int32_t" if operation in _INTEGERS else "float"
        lines[place].append(f"const {kind} v{v} = {_EXPRESSIONS[operation].format(*operands)};")
    lines["strip"].append(f"{STORED[dtypes[-1]]}* __restrict y = ({STORED[dtypes[-1]]}*)out + (i - begin);")
    lines["element"].append(f"store(y + c, v{nodes[-1][1]});")
    return _SOURCE % {place: "\n".join(found) for place, found in lines.items()}


_SOURCE = """
#include <cmath>
#include <cstdint>
#include <cstring>

using half = _Float16;
struct bfloat16 { uint16_t bits; };
struct key { uint32_t words[2]; };
enum { STRIP = 1024 };

static inline int32_t bits_of(float x) { int32_t b; std::memcpy(&b, &x, 4); return b; }
static inline float float_of(float x) { return x; }
static inline float float_of(half x) { return (float)x; }
static inline float float_of(bfloat16 x) {
  const uint32_t b = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &b, 4);
  return y;
}
static inline void store(float* to, float x) { *to = x; }
static inline void store(half* to, float x) { *to = (half)x; }
static inline void store(bfloat16* to, float x) {
  const uint32_t b = (uint32_t)bits_of(x);
  to->bits = x == x ? (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16) : (uint16_t)0x7fc0;
}

// Hashes first, first + 1, ... of a stream, as in noise.py; each makes two numbers of 16 bits.
union hashes { uint32_t words[STRIP / 2 + 1]; uint16_t halves[STRIP + 2]; };
static inline void fill(hashes& to, uint32_t first, key k) {
  for (uint32_t j = 0; j < STRIP / 2 + 1; ++j) {
    uint32_t x = (first + j) ^ k.words[0];
    x = (x ^ (x >> 16)) * 0x7feb352du ^ k.words[1];
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    to.words[j] = x ^ (x >> 16) ^ 0x80008000u;
  }
}

// Elements begin to end - 1 of matrices with n_columns; `out` is where element `begin` goes.
extern "C" void merge(const void* const* x, void* out, const float* s, const float* const* t, const key* k,
                      int64_t begin, int64_t end, int64_t n_columns) {
%(call)s
for (int64_t i = begin, stop; i < end; i = stop) {
const int64_t r = i / n_columns, left = (r + 1) * n_columns - i, most = end - i < left ? end - i : left;
const int32_t width = most < STRIP ? (int32_t)most : STRIP, odd = i & 1;
stop = i + width;
%(strip)s
#pragma GCC ivdep
for (int32_t c = 0; c < width; ++c) {
%(element)s
}
}
}
"""
