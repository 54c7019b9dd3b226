"""What a GPU has to do for a merge, counted in what is compiled for one. Needs no GPU, and measures nothing.

    python experiments/benchmarks/gpu_instructions.py     # half a minute; figures go to results.json

Kernels are compiled for compute capability 9.0 (H100, H200). Of a program of 1,024 elements, it counts the clocks in
which a multiprocessor starts its instructions, and those in which the memory moves its bytes. Rates: CUDA C++
programming guide, table "Throughput of Native Arithmetic Instructions": a multiprocessor starts 4 instructions a clock,
each for 32 elements, of integers, logic, comparisons and selections 2, and of IMAD 2 beside them. Code that runs only
for denormal quotients is counted too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from record import record as write_down

from evo.deltas import Absmax
from evo.encodings.fp8_blocks import Fp8Blocks
from evo.job import Job
from evo.measured import Measured
from evo.merge import get_method
from evo.merge.blocks import Operand
from evo.merge.kernels import record
from evo.merge.triton_kernel import MOST_ELEMENTS, TritonKernel

WARPS = 4
"""Of a program, 32 lanes each."""
BYTES_A_CLOCK = 3.35e12 / 132 / 1.755e9
"""Of an H100 SXM's memory, for each of its 132 multiprocessors at 1.755 GHz."""
FULL_RATE = ("FADD", "FMUL", "FFMA")
BESIDES = ("IMAD",)
NO_ARITHMETIC = {"LDG", "STG", "LDC", "ULDC", "BRA", "EXIT", "S2R", "S2UR", "CS2R", "BSSY", "BSYNC", "CALL"}
SHAPE = (256, 4096)
METHODS = ("linear", "ties", "dare_linear", "dare_ties", "della_linear", "della")


def merges() -> Iterator[tuple[str, str, list[Operand]]]:
    """Name, method, and base and two donors."""
    generator, names = torch.Generator().manual_seed(0), ("base", "a", "b")
    base, *donors = (torch.randn(SHAPE, generator=generator).bfloat16() for _ in names)
    for method in METHODS:
        yield method, method, [base, *donors]
    fp8 = Fp8Blocks((128, 128))
    pieces = [fp8.encode(SHAPE, base.device, lambda at, t=t: t[at].float(), 1 << 20) for t in (base, *donors)]
    yield "linear, FP8 to float32", "linear", [fp8.operand(piece) for piece in pieces]
    for kind in (Absmax(8), Absmax(4)):
        kept = [kind.compress(lambda at, d=d: d[at].float() - base[at].float(), base) for d in donors]
        yield f"linear, int{kind.bits} donors", "linear", [base, *(kind.donor(base, one) for one in kept)]


def compiled(method_name: str, operands: list[Operand]) -> tuple[bytes, float]:
    """Machine code, and bytes that are read and written for an element."""
    method, names = get_method(method_name), ("base", "a", "b")
    job = Job(names, "base", method, (0.3, 0.4), method.arguments({}, names[1:]))
    stats = Measured().of(None, job, torch.device("cpu"), dict(zip(names, operands, strict=True)).__getitem__)
    arguments = {**job.arguments, **({} if stats is None else {"stats": stats})}
    tape, nodes = record(method, operands, job.coefficients, arguments)
    inputs = [tensor.dtype for tensor in tape.inputs]
    result = torch.bfloat16 if inputs[0].itemsize > 1 else torch.float32
    cubin = TritonKernel(nodes, (*inputs, result)).compiled_for(90)["cubin"]
    read = sum(tensor.nbytes for tensor in (*tape.inputs, *tape.tensors))
    return cubin, read / operands[0].numel() + result.itemsize


def instructions(cubin: bytes) -> Counter[str]:
    """How often each instruction occurs in machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text)
    return Counter(name for name in found if name != "NOP")


def counted(method: str, operands: list[Operand]) -> dict[str, Any]:
    """Clocks of a program."""
    cubin, n_bytes = compiled(method, operands)
    counts = instructions(cubin)
    half = sum(n for name, n in counts.items() if name not in {*FULL_RATE, *BESIDES, *NO_ARITHMETIC})
    clocks = {"memory": MOST_ELEMENTS * n_bytes / BYTES_A_CLOCK, "started": counts.total() * WARPS / 4}
    clocks["half_rate"] = half * WARPS / 2
    return {
        "bytes_an_element": n_bytes,
        "instructions": counts.total(),
        "clocks": clocks,
        "least": max(clocks.values()),
    }


def main() -> None:
    """Count, print, and write down."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {name: counted(method, operands) for name, method, operands in merges()}
    for one in found.values():
        one["over_linear"] = one["least"] / found["linear"]["least"]
    write_down({"gpu_counted_not_measured": found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
