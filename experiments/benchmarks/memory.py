"""Peak anonymous memory of merges beyond the resident model, and of exports as a checkpoint grows.

    python experiments/benchmarks/memory.py [write | tensors | export | 'write ties' ...]

`write` merges into resident tensors with compiled loops, `tensors` the same on a machine without a compiler. Every case
is a process of its own, on seeded random checkpoints. Sources are mapped files: their pages are the kernel's to drop,
and are not counted. Figures go to results.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import SMOLLM2_135M, make
from record import record, recorded

from evo.checkpoint import Checkpoint
from evo.export import write_checkpoint
from evo.materializer import Materializer
from evo.merge import METHODS, get_method
from search_spaces.recipe import Recipe, Rule, Source

LARGEST = (8192, 4096)
"""Shape of the embedding, the largest tensor."""
KNOBS = {"density": 0.5, "select_topk": 0.5, "filter_wise": 1.0}
"""Of methods that have them: what needs statistics."""
N_DONORS = (2, 3, 5)
N_LAYERS = (1, 4, 8)
N_RUNS = 2
"""Of each case, of which the larger counts: what the heap has free before a merge differs from run to run."""
MIB = 1 << 20


def config(n_layers: int) -> dict:
    """A small Llama with a large embedding."""
    rows, columns = LARGEST
    return {**SMOLLM2_135M, "vocab_size": rows, "hidden_size": columns, "num_hidden_layers": n_layers}


def main() -> None:
    """Run every case, or those of one kind, and write the figures down as they come."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("["):
        print(case(*json.loads(sys.argv[1])))
        return
    jobs = [(kind, method, n, 1) for kind in ("write", "tensors") for method in METHODS for n in N_DONORS]
    jobs += [("export", "ties", 2, n_layers) for n_layers in N_LAYERS]
    with tempfile.TemporaryDirectory() as folder:
        for kind, method, n_donors, n_layers in jobs:
            if not f"{kind} {method}".startswith(sys.argv[1] if len(sys.argv) > 1 else ""):
                continue
            in_process("make", method, n_donors, n_layers, folder)  # leaves its memory to no one
            peak = max(in_process(kind, method, n_donors, n_layers, folder) for _ in range(N_RUNS))
            record_peak(f"{kind} {method}, {n_donors} donors, {n_layers} layers", peak)


def in_process(*arguments: object) -> int:
    """A case in a process of its own."""
    command = [sys.executable, __file__, json.dumps(arguments)]
    env = {**os.environ, **({"PATH": "", "CXX": ""} if arguments[0] == "tensors" else {})}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def record_peak(name: str, peak: int) -> None:
    """Put a peak into results.json."""
    print(f"{name}: {peak / MIB:.0f} MiB", flush=True)
    largest = 4 * LARGEST[0] * LARGEST[1]
    peaks = {**recorded().get("memory", {}).get("peak_extra_bytes", {}), name: peak}
    memory = {
        "largest_tensor_fp32_bytes": largest,
        "limit_bytes": 2 * largest + 256 * MIB,
        "peak_extra_bytes": peaks,
    }
    record({"peak_extra_bytes_over_largest_tensor_fp32": max(peaks.values()) / largest, "memory": memory})


def case(kind: str, method: str, n_donors: int, n_layers: int, folder: str) -> int:
    """Bytes of anonymous memory that a merge takes at its peak, statistics included."""
    torch.set_num_threads(1)
    names = ["base", *"abcde"[:n_donors]]
    folders = {n: make(Path(folder) / f"{n}{n_layers}", config(n_layers), s) for s, n in enumerate(names)}
    if kind == "make":
        return 0
    checkpoints = {name: Checkpoint.open(path) for name, path in folders.items()}
    knobs = {name: value for name, value in KNOBS.items() if name in get_method(method).knobs}
    rule = Rule(method, dict.fromkeys(names[1:], 0.3), knobs=knobs)
    recipe = Recipe({name: Source(str(path)) for name, path in folders.items()}, "base", "a", (rule,))
    if kind == "export":
        return peak_extra(lambda: write_checkpoint(recipe, checkpoints, Path(folder) / "out", force=True))
    slots = {n: torch.zeros(e.shape, dtype=torch.bfloat16) for n, e in checkpoints["base"].entries.items()}
    return peak_extra(lambda: Materializer(checkpoints, slots).write(recipe.to_dict()))


def peak_extra(job: Callable[[], object]) -> int:
    """Largest growth of anonymous memory while a job runs, looked at every millisecond."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    job()
    done.set()
    watcher.join()
    return peak


def anonymous_bytes() -> int:
    """Resident pages of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
