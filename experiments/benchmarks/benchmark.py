"""What merging costs, against floors of the same machine and against mergekit; one thread on both sides.

    python experiments/benchmarks/benchmark.py [--mergekit PYTHON] [--base DIR --donors DIR DIR] [--work DIR]

Without checkpoints it makes seeded random ones of SmolLM2-135M's shape. `--mergekit` names the interpreter of an
environment with mergekit 0.1.5 (experiments/parity makes one); without it that comparison is left out.
Takes about five minutes; figures go to results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import LLAMA_1B, LLAMA_8B_CUT, SMOLLM2_135M, make
from record import record, recorded

from evo.checkpoint import Checkpoint
from evo.export import write_checkpoint
from evo.materializer import Materializer
from evo.merge.cpp_loop import find_compiler
from evo.residency import Residency
from search_spaces.recipe import Recipe, Rule, Source

HERE = Path(__file__).parent
KNOBS = {
    "linear": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
}
AGAINST_MERGEKIT = ("linear", "ties", "della")
NOT_MEASURED = {
    "gpu": "not measured",
    "apply_linear_over_copy_bandwidth_gpu": None,
    "peak_extra_bytes_over_largest_tensor_fp32_gpu": None,
}
"""Of a GPU, which figures of the CPU leave alone where somebody has measured them."""
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def main() -> None:
    """Measure, and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="python of an environment with mergekit")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--donors", type=Path, nargs=2)
    parser.add_argument("--work", type=Path, help="where to put checkpoints and exports; default: a temporary folder")
    parser.add_argument("--large", action="store_true", help="only exports, of 1.24 B parameters: 10 GB of disk")
    parser.add_argument("--compressed", action="store_true", help="only merges of compressed donors")
    parser.add_argument("--gpu", action="store_true", help="only merges on the GPU: 14 GB of disk and 28 of its memory")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if arguments.gpu:
            write_down(on_gpu(work, arguments.rounds))
            return
        if arguments.large:
            write_down(large_exports(work, arguments.rounds))
            return
        a, b = arguments.donors or [make(work / name, SMOLLM2_135M, seed) for seed, name in ((1, "a"), (2, "b"))]
        base = arguments.base or make(work / "base", SMOLLM2_135M, 0)
        folders = {"base": base, "a": a, "b": b}
        if arguments.compressed:
            write_down(compressed_donors(folders, arguments.rounds))
            return
        write_down(measure(folders, work, arguments.rounds, arguments.mergekit))


def write_down(results: dict[str, Any]) -> None:
    """Print, and merge into results.json."""
    record(results)
    print(json.dumps(results, indent=1))


def on_gpu(work: Path, rounds: int) -> dict[str, Any]:
    """Merges into a resident model on the GPU, where the sources are too, and the memory that they take beyond both,
    statistics and the first look at a loop included.

    Blocks are as wide as those of an 8 B model, as parts of small models are merged faster than Python asks for them.
    """
    folders = {n: make(work / n, LLAMA_8B_CUT, seed) for seed, n in enumerate(("base", "a", "b"))}
    found = in_memory(folders, rounds, GPU)
    largest = max(math.prod(header.shape) for header in Checkpoint.open(folders["base"]).headers.values())
    return {
        "apply_linear_over_copy_bandwidth_gpu": found["floor_seconds"] / found["seconds"]["linear"],
        "peak_extra_bytes_over_largest_tensor_fp32_gpu": max(found["peak_extra_bytes"].values()) / (4 * largest),
        "over_linear_gpu": {name: seconds / found["seconds"]["linear"] for name, seconds in found["seconds"].items()},
        "gpu": {**found, "machine": machine()},
    }


def large_exports(work: Path, rounds: int) -> dict[str, Any]:
    """Exports of 1.24 B parameters, where files outlast what is done once in an export."""
    found = against_cp({n: make(work / n, LLAMA_1B, seed) for seed, n in enumerate(("base", "a", "b"))}, work, rounds)
    return {
        "export_over_cp_1b": found["cp"] / found["linear"],
        "export_of_a_copy_over_cp_1b": found["cp"] / found["copy"],
        "export_1b": {**found, "machine": machine()},
    }


def measure(folders: dict[str, Path], work: Path, rounds: int, mergekit: Path | None) -> dict[str, Any]:
    """All figures."""
    resident = in_memory(folders, rounds)
    exports = against_cp(folders, work, rounds)
    linear = resident["seconds"]["linear"]
    results = {
        "machine": machine(),
        "path": f"compiled: {resident['n_compiled']} of {resident['n_parts']} parts of a linear merge",
        "apply_linear_over_copy_bandwidth": resident["floor_seconds"] / linear,
        "over_linear": {name: seconds / linear for name, seconds in resident["seconds"].items()},
        "resident": resident,
        "export_over_cp": exports["cp"] / exports["linear"],
        "export_of_a_copy_over_cp": exports["cp"] / exports["copy"],
        "export": exports,
        **{name: recorded().get(name, nothing) for name, nothing in NOT_MEASURED.items()},
    }
    if mergekit:
        theirs = merge_with_mergekit(folders, work, mergekit)
        for name in AGAINST_MERGEKIT:
            results[f"{name}_speedup_over_mergekit"] = theirs[name]["operation"] / resident["seconds"][name]
            saved = theirs[name]["operation"] - resident["seconds"][name]
            theirs[name]["candidates_that_repay_what_is_done_once"] = resident["once_seconds"][name] / saved
        results["mergekit"] = theirs
    return results


def recipe_of(folders: dict[str, Path], method: str, seed: int, checkpoint: Checkpoint) -> Recipe:
    """Two donors with coefficients of their own for every block and role."""
    rng = np.random.default_rng(seed)
    cells = dict.fromkeys((part.role, part.block) for part in checkpoint.layout.parts)
    rules = tuple(
        Rule(
            method,
            dict(zip("ab", rng.uniform(0.1, 0.5, 2).tolist(), strict=True)),
            blocks=None if block is None else (block,),
            roles=(role,),
            knobs=KNOBS[method],
        )
        for role, block in cells
    )
    return Recipe({name: Source(str(path)) for name, path in folders.items()}, "base", "a", rules)


def in_memory(folders: dict[str, Path], rounds: int, device: torch.device = CPU) -> dict[str, Any]:
    """Seconds of a candidate, sources and resident model in memory, and of a copy of as many bytes.

    CPU seconds, or on a GPU those on the clock.

    Rounds go through everything in turn; the best of each counts, the machine being shared. Of the memory of a GPU the
    most counts, that of the first write included, which measures parts and looks at loops; sources are there before.
    """
    checkpoints = {name: Checkpoint.open(path) for name, path in folders.items()}
    base = checkpoints["base"]
    slots = {
        name: torch.empty(entry.shape, dtype=torch.bfloat16, device=device) for name, entry in base.entries.items()
    }
    materializer = Materializer(checkpoints, slots, residency=Residency.AUTO if device == CPU else Residency.DEVICE)
    n = sum(slot.numel() for slot in slots.values())
    source, target = (torch.ones(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    best, once, n_compiled = dict.fromkeys(["copy", *KNOBS], float("inf")), {}, 0
    seconds_of, peaks = cpu_seconds if device == CPU else gpu_seconds, {}
    if device == GPU:
        for name in folders:  # copies of the sources bring all of them there
            materializer.write(Recipe({n: Source(str(p)) for n, p in folders.items()}, name, "a", ()).to_dict())
    for method in KNOBS:
        recipe = recipe_of(folders, method, 0, base).to_dict()
        before = reset_peak() if device == GPU else 0
        once[method] = seconds_of(lambda recipe=recipe: materializer.write(recipe))
        peaks[method] = peak_since(before) if device == GPU else 0
    for number in range(1, rounds + 1):
        best["copy"] = min(best["copy"], seconds_of(lambda: target.copy_(source)))
        for method in KNOBS:
            recipe = recipe_of(folders, method, number, base).to_dict()
            reports = []
            before = reset_peak() if device == GPU else 0
            seconds = seconds_of(lambda recipe=recipe, reports=reports: reports.append(materializer.write(recipe)))
            best[method] = min(best[method], seconds)
            peaks[method] = max(peaks[method], peak_since(before) if device == GPU else 0)
            n_compiled = reports[0].n_compiled
    return {
        "n_parameters": n,
        "n_parts": len(base.layout.parts),
        "n_compiled": n_compiled,
        "copy_bytes_per_second": 4 * n / best["copy"],
        "floor_seconds": 2 * best.pop("copy"),  # three reads and a write, at the speed of a read and a write
        "seconds": best,
        "once_seconds": {method: once[method] - best[method] for method in KNOBS},
        **({"peak_extra_bytes": peaks} if device == GPU else {}),
    }


def compressed_donors(folders: dict[str, Path], rounds: int) -> dict[str, Any]:
    """CPU seconds of a linear candidate by how its donors are held, in turns; the best of each counts."""
    checkpoints = {name: Checkpoint.open(path) for name, path in folders.items()}
    entries, makers, best = checkpoints["base"].entries, {}, {}
    for deltas in ("exact", "int8", "int4", "low_rank(16)"):
        slots = {name: torch.empty(entry.shape, dtype=torch.bfloat16) for name, entry in entries.items()}
        residency = Residency.AUTO if deltas == "exact" else Residency.DEVICE
        makers[deltas] = Materializer(checkpoints, slots, residency=residency, deltas=deltas, base="base")
    for number in range(rounds + 1):
        recipe = {**recipe_of(folders, "linear", number, checkpoints["base"]).to_dict(), "compressed": True}
        for deltas, maker in makers.items():
            seconds = cpu_seconds(lambda maker=maker, recipe=recipe: maker.write(recipe))
            if number:  # the first compresses and compiles
                best[deltas] = min(best.get(deltas, seconds), seconds)
    return {"compressed_donors": {"seconds": best, "machine": machine()}}


def against_cp(folders: dict[str, Path], work: Path, rounds: int) -> dict[str, float]:
    """Median wall seconds of exports and of cp, in turns; every file is fsynced on both sides."""
    out, found = work / "export", {"cp": [], "linear": [], "copy": []}
    checkpoint = Checkpoint.open(folders["base"])
    linear = recipe_of(folders, "linear", 0, checkpoint)
    copy = Recipe(linear.sources, "base", "a", ())
    for _ in range(rounds):
        for name, job in (
            ("cp", lambda: subprocess.run(["cp", "-r", folders["base"], out], check=True)),
            ("linear", lambda: export(linear, folders, out)),
            ("copy", lambda: export(copy, folders, out)),
        ):
            os.sync()
            found[name].append(wall_seconds(lambda job=job: (job(), sync(out))))
            shutil.rmtree(out)
    return {name: statistics.median(seconds[1:] or seconds) for name, seconds in found.items()}


def export(recipe: Recipe, folders: dict[str, Path], out: Path) -> None:
    """Write a merge from files to files."""
    write_checkpoint(recipe, {name: Checkpoint.open(path) for name, path in folders.items()}, out)


def sync(folder: Path) -> None:
    """Wait until the disk has every file."""
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def merge_with_mergekit(folders: dict[str, Path], work: Path, python: Path) -> dict[str, Any]:
    """Mergekit's operations on the same checkpoints in CPU seconds, and both end to end in wall seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(
        [python, HERE / "mergekit_worker.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    checkpoint, out, results = Checkpoint.open(folders["base"]), work / "merged", {}

    def theirs(method: str, touch: bool) -> dict[str, float]:
        job = {"config": mergekit_config(folders, method), "out": str(out), "touch": touch}
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline())
        shutil.rmtree(out)
        return answer

    def ours(method: str) -> float:
        seconds = wall_seconds(lambda: export(recipe_of(folders, method, 0, checkpoint), folders, out))
        shutil.rmtree(out)
        return seconds

    for method in AGAINST_MERGEKIT:
        repeats = 4 if method == "linear" else 2
        runs = [theirs(method, touch=True) for _ in range(repeats)]
        wholes = [(ours(method), theirs(method, touch=False)["whole"]) for _ in range(repeats)]
        results[method] = {
            "operation": min(run["operation"] for run in runs),
            "end_to_end_ours": min(ours for ours, _ in wholes),
            "end_to_end_mergekit": min(theirs for _, theirs in wholes),
        }
    worker.stdin.close()
    worker.wait()
    return results


def mergekit_config(folders: dict[str, Path], method: str) -> dict[str, Any]:
    """The same merge, with one coefficient a donor: mergekit takes as long for many."""
    weights = {"a": 0.3, "b": 0.4}
    if method == "linear":
        weights["base"] = 0.3
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folders[name]), "parameters": {"weight": w}} for name, w in weights.items()],
        "parameters": dict(KNOBS[method]),
        "dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = str(folders["base"])
    return config


def cpu_seconds(job: Callable[[], Any]) -> float:
    """Of this process."""
    start = time.process_time()
    job()
    return time.process_time() - start


def wall_seconds(job: Callable[[], Any]) -> float:
    """On the clock."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def gpu_seconds(job: Callable[[], object]) -> float:
    """On the clock, until the GPU is done."""
    torch.cuda.synchronize()
    return wall_seconds(lambda: (job(), torch.cuda.synchronize()))


def reset_peak() -> int:
    """Begin to look for the most memory that is used on the GPU; what is used now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_since(before: int) -> int:
    """The most bytes that were used on the GPU since `reset_peak`, beyond those that it told."""
    return torch.cuda.max_memory_allocated() - before


def machine() -> str:
    """The processor, as its maker calls it."""

    def lines() -> Iterator[str]:
        if Path("/proc/cpuinfo").exists():
            yield from Path("/proc/cpuinfo").read_text().splitlines()

    name = next((line.partition(": ")[2] for line in lines() if line.startswith("model name")), platform.processor())
    compiler = "with a C++ compiler" if find_compiler() else "without a compiler"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} shared cores, {name}, {gpu}, {compiler}, torch {torch.__version__}, 1 thread"


if __name__ == "__main__":
    sys.exit(main())
