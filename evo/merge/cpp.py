"""The C++ of a tape: strips of elements; in each a loop over them, and before it what is pruned by magnitude.

Every operation is rounded by itself to float32, one after the other, as torch does it on tensors, so the loop has the
bits of the merge. Knows no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evo.merge.tape import Node

STORED = {
    torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "e4m3", torch.int8: "int8_t", torch.uint8: "uint8_t",
}  # fmt: skip
"""What C++ calls the dtypes of tensors."""

_EXPRESSIONS = {
    "input": "float_of(x{0}[c])",
    "half": "(float)n{0}[c]",
    "noise": "(float)(int32_t)u{0}.halves[c + odd] * 0x1p-16f",
    "scalar": "s[{0}]",
    "row": "t[{0}][r]",
    "tile": "t[{0}][(r / {1}) * ((n_columns + {2} - 1) / {2}) + column / {2}]",
    "magprune": "pruned{5}[c]",
    "add_product": "(float)(product{1}[c] + (double)v{0})",
    "add": "v{0} + v{1}",
    "sub": "v{0} - v{1}",
    "mul": "v{0} * v{1}",
    "div": "v{0} / v{1}",
    "ge": "v{0} >= v{1} ? 1.0f : 0.0f",
    "gt": "v{0} > v{1} ? 1.0f : 0.0f",
    "le": "v{0} <= v{1} ? 1.0f : 0.0f",
    "lt": "v{0} < v{1} ? 1.0f : 0.0f",
    "eq": "v{0} == v{1} ? 1.0f : 0.0f",
    "copysign": "std::copysign(v{0}, v{1})",
    "clamp_min": "v{0} < v{1} ? v{1} : v{0}",
    "clamp_max": "v{0} > v{1} ? v{1} : v{0}",
    "hardshrink": "std::fabs(v{0}) <= v{1} ? 0.0f : v{0}",
    "abs": "std::fabs(v{0})",
    "neg": "-v{0}",
    "sign": "(v{0} > 0.0f ? 1.0f : 0.0f) - (v{0} < 0.0f ? 1.0f : 0.0f)",
    "square": "v{0} * v{0}",
}
_PLACES = {"scalar": "call", "row": "strip", "tile": "strip"}
"""Where what does not change from element to element is computed."""
_FROM_MEMORY = ("input", "half", "noise", "magprune")
"""What needs no other node in the same loop."""
_N_NODES = {"add_product": 1}
"""How many operands are nodes, where not all are."""


def source_of(nodes: Sequence[Node], dtypes: Sequence[torch.dtype]) -> str:
    """A C++ function `merge` for a tape's key.

    Args:
        nodes: operations, the last of which names the result.
        dtypes: of the inputs, then of the result.
    """
    lines: dict[str, list[str]] = {"call": [], "cut": [], "strip": []}
    for tile in sorted({node[3] for node in nodes if node[0] == "tile"}):
        lines["cut"].append(f"if (most > {tile} - column % {tile}) most = {tile} - column % {tile};")
    for i, dtype in enumerate(dtypes[:-1]):
        at = "(i >> 1)" if dtype == torch.uint8 else "i"
        lines["strip"].append(f"const {STORED[dtype]}* __restrict x{i} = (const {STORED[dtype]}*)x[{i}] + {at};")
    for v, (operation, *operands) in enumerate(nodes):
        if operation == "noise":
            lines["strip"].append(f"hashes u{operands[0]}; fill(u{operands[0]}, (uint32_t)(i >> 1), k[{operands[0]}]);")
        elif operation == "half":
            lines["strip"].append(
                f"int8_t n{operands[0]}[STRIP + 1]; unpack(x{operands[0]}, odd, width, n{operands[0]});"
            )
        elif operation == "add_product":
            _, left, right, rank = operands
            lines["strip"].append(
                f"alignas(64) double product{left}[STRIP]; "
                f"multiply<{rank}>(t[{left}] + r * {rank}, t[{right}] + column, n_columns, width, product{left});"
            )
        elif operation in _PLACES:
            lines[_PLACES[operation]].append(f"const float v{v} = {_EXPRESSIONS[operation].format(*operands)};")
    if pruned := [node[1:] for node in nodes if node[0] == "magprune"]:
        for *_, least, slope, ranks, rescale in pruned:
            lines["call"].append(f"const chances h{ranks}(t[{ranks}], v{least}, v{slope}, {rescale});")
            lines["strip"].append(f"alignas(64) float pruned{ranks}[STRIP];")
        uses = [f"pruned{ranks}[c] = v{tau};" for tau, *_, ranks, _ in pruned]
        lines["strip"] += _loop(nodes, [tau for tau, *_ in pruned], uses)
        for _, rows, noise, *_, ranks, _ in pruned:
            stream = f"u{nodes[noise][1]}.halves + odd"
            lines["strip"].append(f"magprune(pruned{ranks}, v{rows}, {stream}, h{ranks}, width);")
    result, kind = nodes[-1][1], STORED[dtypes[-1]]
    lines["strip"].append(f"{kind}* __restrict y = ({kind}*)out + (i - begin);")
    lines["strip"] += _loop(nodes, [result], [f"store(y + c, v{result});"])
    return _SOURCE % {place: "\n".join(found) for place, found in lines.items()}


def _loop(nodes: Sequence[Node], targets: Sequence[int], uses: Sequence[str]) -> list[str]:
    """A loop over a strip that computes some nodes from those that they depend on, and uses them."""
    wanted, lines = set(targets), [*uses, "}"]
    for v in range(max(targets), -1, -1):
        operation, *operands = nodes[v]
        if v in wanted and operation not in _PLACES:
            lines.insert(0, f"const float v{v} = {_EXPRESSIONS[operation].format(*operands)};")
            wanted.update(() if operation in _FROM_MEMORY else operands[: _N_NODES.get(operation)])
    return ["#pragma GCC ivdep", "#pragma GCC unroll 2", "for (int32_t c = 0; c < width; ++c) {", *lines]


_SOURCE = """
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

using half = _Float16;
struct bfloat16 { uint16_t bits; };
struct e4m3 { int8_t bits; };
struct key { uint32_t words[2]; };
enum { STRIP = 256 };

static inline int32_t bits_of(float x) { int32_t b; std::memcpy(&b, &x, 4); return b; }
static inline float float_of(float x) { return x; }
static inline float float_of(half x) { return (float)x; }
static inline float float_of(bfloat16 x) {
  const uint32_t b = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &b, 4);
  return y;
}
static inline float float_of(int8_t x) { return (float)x; }
static inline float float_of(e4m3 x) {  // as evo.merge.scaled.floats: of finite numbers
  const uint32_t b = (uint32_t)(int32_t)x.bits << 20 & 0x87f00000u;
  float y;
  std::memcpy(&y, &b, 4);
  return y * 0x1p120f;
}
static inline void store(float* to, float x) { *to = x; }
static inline void store(half* to, float x) { *to = (half)x; }
static inline void store(bfloat16* to, float x) {
  const uint32_t b = (uint32_t)bits_of(x);
  to->bits = (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);  // not-a-number stays so: its last bits are zeros
}

static inline void store(e4m3* to, float x) {  // to nearest, ties to even
  const uint32_t b = (uint32_t)bits_of(x), m = b & 0x7fffffffu;
  const uint32_t normal = (m + 0x7ffffu + ((m >> 20) & 1u) - (120u << 23)) >> 20;
  float magnitude;
  std::memcpy(&magnitude, &m, 4);
  const uint32_t subnormal = (uint32_t)bits_of(magnitude + 0x1p14f) - (141u << 23);  // in units of 2^-9
  const uint32_t found = m < (121u << 23) ? subnormal : normal;
  to->bits = (int8_t)((m >= 0x43f00000u ? 0x7fu : found) | (b >> 24 & 0x80u));  // beyond 464 or not a number
}

// Hashes first, first + 1, ... of a stream, as in noise.py; each makes two numbers of 16 bits.
enum { HASHES = STRIP / 2 + 16 };  // one more than a strip could need, rounded up to whole vectors
union alignas(64) hashes { uint32_t words[HASHES]; uint16_t halves[2 * HASHES]; };
static inline void fill(hashes& to, uint32_t first, key k) {
  for (uint32_t j = 0; j < HASHES; ++j) {
    uint32_t x = (first + j) ^ k.words[0];
    x = (x ^ (x >> 16)) * 0x7feb352du ^ k.words[1];
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    to.words[j] = x ^ (x >> 16) ^ 0x80008000u;
  }
}

// Halves of bytes, less 8, from the lower half of the first byte on, or from the upper one if `odd`.
static inline void unpack(const uint8_t* bytes, int32_t odd, int32_t n, int8_t* __restrict found) {
  if (odd) *found++ = (int8_t)(*bytes++ >> 4) - 8, --n;
  for (int32_t j = 0; j < n / 2; ++j) {
    found[2 * j] = (int8_t)(bytes[j] & 15) - 8;
    found[2 * j + 1] = (int8_t)(bytes[j] >> 4) - 8;
  }
  if (n & 1) found[n - 1] = (int8_t)(bytes[n / 2] & 15) - 8;
}

#ifdef __FMA__
static inline double multiply_add(double x, double y, double z) { return __builtin_fma(x, y, z); }
#else
static inline double multiply_add(double x, double y, double z) { return x * y + z; }
#endif

// A row of a matrix times a strip of columns of another, of RANK rows: exact sums of products, so they may be fused.
template <int RANK>
static inline void multiply(const float* left, const float* right, int64_t n_columns, int32_t width, double* found) {
  enum { WIDE = 32 };  // sums in as many registers as hide how long an addition takes
  int32_t c = 0;
  for (; c + WIDE <= width; c += WIDE) {
    double sum[WIDE] = {};
    for (int32_t k = 0; k < RANK; ++k)
      for (int32_t j = 0; j < WIDE; ++j) sum[j] = multiply_add(left[k], right[k * n_columns + c + j], sum[j]);
    std::memcpy(found + c, sum, sizeof sum);
  }
  for (; c < width; ++c) {
    found[c] = 0.0;
    for (int32_t k = 0; k < RANK; ++k) found[c] = multiply_add(left[k], right[k * n_columns + c], found[c]);
  }
}

// What magprune.py does in each of its 64 buckets, where noise is a whole number of 16 bits.
struct chances {
  float factor[64];            // of those that are kept,
  uint16_t low[64], high[64];  // its two halves,
  uint16_t last[64];           // and the largest noise with which they are
  chances(const float* ranks, float least, float slope, bool rescale) {
    for (int32_t j = 0; j < 64; ++j) {
      const float product = ranks[j] * slope, sum = product + least, chance = sum < 0x1p-16f ? 0x1p-16f : sum;
      last[j] = (uint16_t)(chance < 1.0f ? std::ceil(chance * 0x1p16f) - 1.0f : 65535.0f);
      factor[j] = rescale ? 1.0f / chance : 1.0f;
      low[j] = (uint16_t)bits_of(factor[j]);
      high[j] = (uint16_t)(bits_of(factor[j]) >> 16);
    }
  }
};

static inline void magprune(float* __restrict tau, float row, const uint16_t* noise, const chances& of, int32_t n) {
  enum { SMALLEST = 0x3800, LARGEST = 0x3fff };  // upper halves of floats: buckets are what is between them, over 32
#ifdef __AVX512BW__  // tables of 64 numbers of 16 bits fit into two registers, and 32 are looked up at once
  const auto load = [](const void* p) { return _mm512_loadu_si512(p); };
  const auto pick = [](__m512i a, __m512i index, __m512i b) { return _mm512_permutex2var_epi16(a, index, b); };
  const auto integers = [](__m512 x) { return _mm512_castps_si512(x); };
  uint16_t numbers[3][32];
  for (int32_t j = 0; j < 32; ++j) {
    numbers[0][j] = (uint16_t)(2 * j + 1);                 // upper halves of two vectors
    numbers[1][j] = (uint16_t)(j / 2 + (j & 1) * 32);      // the first of two vectors' interleaved halves,
    numbers[2][j] = (uint16_t)(j / 2 + (j & 1) * 32 + 16); // and the second
  }
  const __m512i upper = load(numbers[0]), first = load(numbers[1]), second = load(numbers[2]);
  const __m512i last0 = load(of.last), last1 = load(of.last + 32);
  const __m512i low0 = load(of.low), low1 = load(of.low + 32);
  const __m512i high0 = load(of.high), high1 = load(of.high + 32);
  for (int32_t j = 0; j < n; j += 32) {  // may go on after n: strips are multiples of 32
    const __m512 a = _mm512_loadu_ps(tau + j), b = _mm512_loadu_ps(tau + j + 16), rows = _mm512_set1_ps(row);
    __m512i i = pick(integers(_mm512_mul_ps(a, rows)), upper, integers(_mm512_mul_ps(b, rows)));
    i = _mm512_subs_epu16(_mm512_and_si512(i, _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(SMALLEST));
    i = _mm512_srli_epi16(_mm512_min_epu16(i, _mm512_set1_epi16(LARGEST - SMALLEST)), 5);
    const __mmask32 kept = _mm512_cmple_epu16_mask(load(noise + j), pick(last0, i, last1));
    const __m512i low = _mm512_maskz_mov_epi16(kept, pick(low0, i, low1));
    const __m512i high = _mm512_maskz_mov_epi16(kept, pick(high0, i, high1));
    _mm512_storeu_ps(tau + j, _mm512_mul_ps(a, _mm512_castsi512_ps(pick(low, first, high))));
    _mm512_storeu_ps(tau + j + 16, _mm512_mul_ps(b, _mm512_castsi512_ps(pick(low, second, high))));
  }
#else
  for (int32_t j = 0; j < n; ++j) {
    int32_t i = (bits_of(tau[j] * row) & 0x7fffffff) >> 16;
    i = ((i < SMALLEST ? SMALLEST : i > LARGEST ? LARGEST : i) - SMALLEST) / 32;
    tau[j] *= noise[j] <= of.last[i] ? of.factor[i] : 0.0f;
  }
#endif
}

// Elements begin to end - 1 of matrices with n_columns; `out` is where element `begin` goes.
extern "C" void merge(const void* const* x, void* out, const float* s, const float* const* t, const key* k,
                      int64_t begin, int64_t end, int64_t n_columns) {
%(call)s
for (int64_t i = begin, stop; i < end; i = stop) {
const int64_t r = i / n_columns, column = i - r * n_columns, left = n_columns - column;
int64_t most = end - i < left ? end - i : left;
%(cut)s
const int32_t width = most < STRIP ? (int32_t)most : STRIP, odd = i & 1;
stop = i + width;
%(strip)s
}
}
"""
