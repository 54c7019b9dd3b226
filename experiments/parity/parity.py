"""Compares every merge method with mergekit 0.1.5 on tiny dense checkpoints, and prints the table of README.md.

    python experiments/parity/parity.py

Needs mergefront to be installed (with its dev tools or not). Makes an environment for mergekit beside this file
(2 GB, once), or uses the one given by --env. Writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
import yaml
from architectures import SHOWN, configs
from cases import DETERMINISTIC, RANDOM, Case
from files import EXPORTS, FILES
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.merge_file import merge
from evo.mergekit.writer import write_mergekit
from search_spaces.recipe import Recipe, Rule, Source

HERE = Path(__file__).parent
PACKAGES = ("torch==2.13.0", "mergekit==0.1.5")
CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
NAMES, ADAPTED = ("base", "a", "b", "c"), ("q_proj.weight", "down_proj.weight")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Tensors = dict[str, Tensor]


def main() -> None:
    """Run both sides and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=HERE / ".venv", help="virtual environment with mergekit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder), mergekit_python(arguments.env))
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def mergekit_python(env: Path) -> Path:
    """The interpreter of an environment with mergekit, made if it is missing."""
    python = env / "bin" / "python"
    if not python.exists():
        venv.create(env, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def compare(folder: Path, python: Path) -> dict[str, Any]:
    """All cases, in both dtypes."""
    parents = {dtype: make_parents(folder / dtype, dtype) for dtype in DTYPES}
    modes = {"float32": ("float32", "float32"), "bfloat16": ("float32", "bfloat16"), "pure": ("bfloat16", "bfloat16")}
    jobs: dict[tuple[str, str], Path] = {}
    todo: list[list[Any]] = []
    for mode, dtypes in modes.items():
        for case in [*DETERMINISTIC, *RANDOM] if mode == "float32" else DETERMINISTIC:
            out = jobs[mode, case.name] = folder / f"{mode}-{len(jobs)}"
            todo.append([case.config(parents["float32" if mode == "float32" else "bfloat16"], *dtypes), str(out)])
    texts = hand_texts(parents["float32"]) | export_texts(parents["float32"])
    for name, text in texts.items():
        jobs["file", name] = folder / f"file-{len(jobs)}"
        todo.append([as_job(text), str(jobs["file", name])])
    others = {name: make_parents(folder / name, "float32", config) for name, config in configs().items()}
    for name, of_model in others.items():
        for shown in SHOWN:
            out = jobs[name, shown] = folder / f"{name}-{len(jobs)}"
            todo.append([as_job(hand_texts(of_model)[shown]), str(out)])
    (folder / "jobs.json").write_text(json.dumps(todo))
    subprocess.run([python, HERE / "mergekit_runner.py", folder / "jobs.json"], check=True)
    theirs = {key: tensors_of(out) for key, out in jobs.items() if key[0] not in others}
    return {
        "mergekit": PACKAGES[1],
        "torch": torch.__version__,
        "n_parameters": sum(t.numel() for t in tensors_of(Path(parents["float32"]["base"])).values()),
        "deterministic": [_deterministic(case, theirs, parents) for case in DETERMINISTIC],
        "files": [_file(name, text, theirs["file", name], parents["float32"], folder) for name, text in texts.items()],
        "architectures": [
            _architecture(name, parents, {s: jobs[name, s] for s in SHOWN}, folder) for name, parents in others.items()
        ],
        "random": [_random(case, theirs["float32", case.name], parents["float32"]) for case in RANDOM],
    }


def as_job(text: str) -> dict[str, Any]:
    """A file as mergekit is given it: these parents have no tokenizer."""
    config = {"dtype": "float32", **yaml.safe_load(text)}
    config.pop("tokenizer_source", None)
    return config


def hand_texts(parents: dict[str, str]) -> dict[str, str]:
    """YAML of mergekit's, written by hand, by what it shows."""
    places = {**parents, "lora": str(Path(parents["a"]).parent / "lora")}
    return {name: re.sub(r"(?<=model: )\w+|(?<=\+)lora", lambda m: places[m[0]], text) for name, text in FILES.items()}


def export_texts(parents: dict[str, str]) -> dict[str, str]:
    """The same, exported from recipes of ours."""
    return {f"export: {name}": write_mergekit(*_recipe(rules, parents))[0] for name, rules in EXPORTS.items()}


def _recipe(rules: tuple[Rule, ...], parents: dict[str, str]) -> tuple[Recipe, dict[str, Checkpoint]]:
    names = ("base", "a", "b")
    recipe = Recipe({name: Source(parents[name]) for name in names}, "base", "base", rules)
    return recipe, {name: Checkpoint.open(parents[name]) for name in names}


def _file(name: str, text: str, theirs: Tensors, parents: dict[str, str], folder: Path) -> dict[str, Any]:
    (folder / "file.yaml").write_text(text)
    merge(folder / "file.yaml", folder / "ours", force=True)
    read = tensors_of(folder / "ours")
    assert read.keys() == theirs.keys(), read.keys() ^ theirs.keys()
    found = {"file": name, "max_abs": max(float((read[n] - t).abs().max()) for n, t in theirs.items())}
    if name.startswith("export: "):  # the way back must give the bits that were exported
        recipe, checkpoints = _recipe(EXPORTS[name.removeprefix("export: ")], parents)
        exported = dict(Materializer(checkpoints).stream(recipe))
        found["max_abs_back"] = max(float((read[n] - t).abs().max()) for n, t in exported.items())
    return found


def _architecture(name: str, parents: dict[str, str], outs: dict[str, Path], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"architecture": name, "max_abs": {}}
    for shown, out in outs.items():
        if (error := out / "error.txt").exists():
            return {**found, "mergekit": error.read_text().replace(str(folder), "")}
        found["max_abs"][shown] = _file(shown, hand_texts(parents)[shown], tensors_of(out), parents, folder)["max_abs"]
    return found


def make_parents(folder: Path, dtype: str, config: PretrainedConfig = CONFIG) -> dict[str, str]:
    """Checkpoints name -> folder: task vectors far larger than the base, and no two magnitudes of one alike. Beside
    them an adapter of a.
    """
    torch.manual_seed(0)
    base: Tensors = {}
    for name in NAMES:
        model = AutoModelForCausalLM.from_config(config)
        for key, parameter in model.named_parameters():
            parameter.data = _drawn(parameter.data.shape, base.get(key), DTYPES[dtype])
            base.setdefault(key, parameter.data.clone())
        model.config.dtype = DTYPES[dtype]
        model.save_pretrained(folder / name)
    make_adapter(folder / "a", folder / "lora")
    return {name: str(folder / name) for name in NAMES}


def make_adapter(model: Path, folder: Path) -> None:
    """A LoRA of rank 4 for some of a model's matrices, as peft saves one."""
    factors: Tensors = {}
    for name, tensor in tensors_of(model).items():
        if name.endswith(ADAPTED):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, tensor.shape[1])
            factors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(tensor.shape[0], 4)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [name.split(".")[-2] for name in ADAPTED]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _drawn(shape: torch.Size, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    if base is None:
        return (0.01 * torch.randn(shape)).to(dtype)
    donor = (base.float() + 0.1 * torch.randn(shape)).to(dtype)
    while (tied := _repeated((donor.float() - base.float()).abs())).any():
        redrawn = (base.float() + 0.1 * torch.randn(shape)).to(dtype)
        donor = torch.where(tied, redrawn, donor)
    return donor


def _repeated(values: Tensor) -> Tensor:
    """Which values have occurred before."""
    order = values.reshape(-1).argsort(stable=True)
    ascending = values.reshape(-1)[order]
    repeated = torch.zeros_like(ascending, dtype=torch.bool)
    repeated[order[1:]] = ascending[1:] == ascending[:-1]
    return repeated.view_as(values)


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.headers}


def ours(case: Case, parents: dict[str, str], seed: int = 0) -> Tensors:
    """A case merged by this project."""
    sources = {name: Source(path) for name, path in parents.items()}
    rule = Rule(case.method, case.coefficients, knobs=case.knobs)
    checkpoints = {name: Checkpoint.open(path) for name, path in parents.items()}
    return dict(Materializer(checkpoints).stream(Recipe(sources, case.base, case.base, (rule,), seed)))


def _deterministic(case: Case, theirs: dict[Any, Tensors], parents: dict[str, dict[str, str]]) -> dict[str, Any]:
    merged, rounded = (ours(case, parents[dtype]) for dtype in DTYPES)
    expected, expected_rounded, pure = (theirs[mode, case.name] for mode in ("float32", "bfloat16", "pure"))
    assert merged.keys() == expected.keys(), merged.keys() ^ expected.keys()
    inputs = [tensors_of(Path(path)) for path in parents["bfloat16"].values()]
    return {
        "case": case.name,
        "max_abs_float32": max(float((merged[n] - t).abs().max()) for n, t in expected.items()),
        "bfloat16": _differences(rounded, expected_rounded, inputs),
        "pure_bfloat16": _differences(rounded, pure, inputs),
    }


def _differences(x: Tensors, y: Tensors, inputs: list[Tensors]) -> dict[str, float]:
    """Distances in units in the last place, i.e. in numbers that bfloat16 has between the two.

    Where inputs of magnitude m cancel to less than m / 256, float32's own rounding is more than bfloat16's last
    place; such elements are told apart, with their difference relative to m.
    """
    names = list(y)
    ours, theirs = (torch.cat([side[n].reshape(-1) for n in names]) for side in (x, y))
    largest = torch.stack([torch.cat([i[n].reshape(-1) for n in names]).float().abs() for i in inputs]).max(0).values
    places = [torch.where(p < 0, -(p & 0x7FFF), p) for p in (t.view(torch.int16).int() for t in (ours, theirs))]
    ulps = (places[0] - places[1]).abs()
    cancelled = theirs.float().abs() < largest / 256
    relative = (ours.float() - theirs.float()).abs() / largest
    return {
        "n": len(ulps),
        "n_differing": int((ulps > 0).sum()),
        "max_ulp": int(ulps[~cancelled].max()),
        "n_beyond_1_ulp": int((ulps[~cancelled] > 1).sum()),
        "n_cancelled": int(cancelled.sum()),
        "max_relative_cancelled": float(relative[cancelled].max()) if cancelled.any() else 0.0,
    }


def _random(case: Case, theirs: Tensors, parents: dict[str, str]) -> dict[str, Any]:
    base, donor = tensors_of(Path(parents["base"])), tensors_of(Path(parents["a"]))
    return {
        "case": case.name,
        "density": case.knobs["density"],
        "ours": _mask_statistics(ours(case, parents), base, donor),
        "mergekit": _mask_statistics(theirs, base, donor),
    }


def _mask_statistics(merged: Tensors, base: Tensors, donor: Tensors) -> dict[str, float]:
    """Keep rate with its standard error, the factor of what is kept, and expectation over task vector."""
    tau = torch.cat([(donor[n] - base[n]).reshape(-1) for n in base]).double()
    change = torch.cat([(merged[n] - base[n]).reshape(-1) for n in base]).double()
    kept = change.abs() > 1e-7
    rate = float(kept.double().mean())
    factors = change[kept] / tau[kept]
    small = tau.abs() < tau.abs().median()
    return {
        "keep_rate": rate,
        "keep_rate_stderr": math.sqrt(rate * (1 - rate) / len(tau)),
        "factor_low": float(factors.quantile(0.05)),
        "factor_high": float(factors.quantile(0.95)),
        "expectation": float((change * tau).sum() / tau.square().sum()),
        "expectation_small_half": float((change * tau)[small].sum() / tau[small].square().sum()),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| method | float32: max abs difference | bf16: max ulp | differ at all | beyond 1 ulp | where inputs cancel |"
        " pure bf16: max ulp | differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["deterministic"]:
        mixed, pure = row["bfloat16"], row["pure_bfloat16"]
        line = (
            f"| {row['case']} | {row['max_abs_float32']:.1e} | {mixed['max_ulp']} "
            f"| {mixed['n_differing']} | {mixed['n_beyond_1_ulp']} | {mixed['max_relative_cancelled']:.0e} "
            f"| {pure['max_ulp']} | {pure['n_differing'] / pure['n']:.0%} |"
        )
        lines.append(line)
    lines += ["", "| file | float32: max abs difference | there and back |", "|---|---|---|"]
    for row in results["files"]:
        back = f"{row['max_abs_back']:.1e}" if "max_abs_back" in row else ""
        lines.append(f"| {row['file']} | {row['max_abs']:.1e} | {back} |")
    lines += ["", "| architecture | float32: max abs difference | |", "|---|---|---|"]
    for row in results["architectures"]:
        found = sorted(row["max_abs"].items(), key=lambda item: -item[1])
        beyond = ", ".join(f"{value:.1e}: {name}" for name, value in found if value > 1e-5)
        within = f"{max(value for _, value in found if value <= 1e-5):.1e}" if found else ""
        lines.append(f"| {row['architecture']} | {within} | {beyond}{row.get('mergekit', '')} |")
    lines += [
        "",
        "| method | | keep rate | factor of what is kept, 5% to 95% | expectation / task vector: all, smaller half |",
        "|---|---|---|---|---|",
    ]
    for row in results["random"]:
        for side in ("ours", "mergekit"):
            s = row[side]
            line = (
                f"| {row['case']} | {side} | {s['keep_rate']:.4f} ± {s['keep_rate_stderr']:.4f} "
                f"| {s['factor_low']:.3f} to {s['factor_high']:.3f} "
                f"| {s['expectation']:.3f}, {s['expectation_small_half']:.3f} |"
            )
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
