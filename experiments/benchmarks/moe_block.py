"""One MoE block of DeepSeek-V3's real dimensions in FP8, merged expert by expert; from it the whole 671B merge.

    python experiments/benchmarks/moe_block.py [--experts 256] [--work DIR]

Two seeded random parents: with all 256 experts 11.3 GB each, and as much for the result; fewer experts need less disk
and are scaled up. One thread. Figures go to results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from memory import peak_extra
from record import record

from evo.checkpoint import SINGLE_FILE, Checkpoint
from evo.encodings import TensorHeader
from evo.export import write_checkpoint
from evo.safetensors_writer import SafetensorsWriter
from search_spaces.recipe import Recipe, Rule, Source

HIDDEN, WIDTH, N_EXPERTS, N_LAYERS, N_DENSE, VOCABULARY = 7168, 2048, 256, 61, 3, 129280
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": N_LAYERS,
    "n_routed_experts": N_EXPERTS,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
Shape = tuple[int, int]


def experts(layer: int, n: int) -> Iterator[tuple[str, Shape]]:
    """Matrices of the routed experts of a block."""
    for e in range(n):
        for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            yield f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight", shape


def index() -> Iterator[tuple[str, Shape, int]]:
    """Every matrix of DeepSeek-V3 (without the multi-token-prediction block), and the bytes of a number."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN), 2
    yield "lm_head.weight", (VOCABULARY, HIDDEN), 2
    for layer in range(N_LAYERS):
        attention = f"model.layers.{layer}.self_attn"
        yield f"{attention}.q_a_proj.weight", (1536, HIDDEN), 1
        yield f"{attention}.q_b_proj.weight", (128 * 192, 1536), 1
        yield f"{attention}.kv_a_proj_with_mqa.weight", (576, HIDDEN), 1
        yield f"{attention}.kv_b_proj.weight", (128 * 256, 512), 1
        yield f"{attention}.o_proj.weight", (HIDDEN, 128 * 128), 1
        mlp, width = f"model.layers.{layer}.mlp", 18432 if layer < N_DENSE else WIDTH
        for name in ("gate", "up", "down"):
            shape = (HIDDEN, width) if name == "down" else (width, HIDDEN)
            yield f"{mlp}.{'' if layer < N_DENSE else 'shared_experts.'}{name}_proj.weight", shape, 1
        if layer >= N_DENSE:
            yield f"{mlp}.gate.weight", (N_EXPERTS, HIDDEN), 2
            yield from ((name, shape, 1) for name, shape in experts(layer, N_EXPERTS))


def make(folder: Path, n_experts: int, seed: int) -> Path:
    """A parent of one block. Experts are rotations of one random matrix: random bytes would take longer to make."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    headers = {}
    for name, (rows, columns) in experts(N_DENSE, n_experts):
        headers[name] = TensorHeader("F8_E4M3", (rows, columns))
        headers[f"{name}_scale_inv"] = TensorHeader("F32", (rows // 128, columns // 128))
    generator = torch.Generator().manual_seed(seed)
    numbers = (100.0 * torch.randn(WIDTH * HIDDEN, generator=generator)).clamp_(-448, 448).to(torch.float8_e4m3fn)
    writer = SafetensorsWriter(folder / SINGLE_FILE, headers)
    for i, (name, shape) in enumerate(experts(N_DENSE, n_experts)):
        writer.write(name, numbers.view(torch.uint8).roll(i * 4099).view(torch.float8_e4m3fn).view(shape))
        writer.write(
            f"{name}_scale_inv", 1e-4 * (1.0 + torch.rand(headers[f"{name}_scale_inv"].shape, generator=generator))
        )
    writer.close()
    return folder


def main() -> None:
    """Merge, predict, and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=N_EXPERTS)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n = arguments.experts
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        work = Path(temporary)
        folders = {name: make(work / name, n, seed) for seed, name in enumerate("ab")}
        checkpoints = {name: Checkpoint.open(path) for name, path in folders.items()}
        rules = tuple(Rule("linear", {"b": (e + 1) / (n + 1)}, blocks=(N_DENSE,), experts=(e,)) for e in range(n))
        recipe = Recipe({name: Source(str(path)) for name, path in folders.items()}, "a", "a", rules)
        start, processor = time.perf_counter(), time.process_time()
        peak = peak_extra(lambda: write_checkpoint(recipe, checkpoints, work / "out"))
        wall, processor = time.perf_counter() - start, time.process_time() - processor
        shutil.rmtree(work / "out")
    merged = sum(math.prod(shape) for _, shape in experts(N_DENSE, n))
    numbers = sum(math.prod(shape) for _, shape, _ in index())
    stored = sum(math.prod(shape) * (size + (4 / 128**2 if size == 1 else 0)) for _, shape, size in index())
    figures = {
        "experts": n,
        "bytes_a_parent": merged * (1 + 4 / 128**2),
        "wall_seconds": wall,
        "cpu_seconds": processor,
        "peak_anonymous_bytes": peak,
        "of_671b": {
            "parameters": numbers,
            "hours_one_thread": wall * numbers / merged / 3600,
            "cpu_hours": processor * numbers / merged / 3600,
            "disk_bytes_of_the_result": stored,
            "peak_anonymous_bytes": peak + max(math.prod(shape) * size for _, shape, size in index()),
        },
    }
    record({"moe_block": figures})
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
