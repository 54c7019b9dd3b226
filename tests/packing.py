"""Rewrites a checkpoint into other layouts that are found in the wild."""

import re
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _rewrite(folder: Path, out: Path, change) -> Path:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    save_file(change(tensors), out / "model.safetensors", metadata={"format": "pt"})
    return out


def pack(folder: Path, out: Path) -> Path:
    """Experts as transformers 5 holds them: (n_experts, 2 * width, hidden) and (n_experts, hidden, width)."""

    def change(tensors):
        packed, experts = {}, defaultdict(dict)
        for name, tensor in tensors.items():
            if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name):
                experts[match[1]][int(match[2]), match[3]] = tensor
            else:
                packed[name] = tensor
        for prefix, rows in experts.items():
            n = 1 + max(e for e, _ in rows)
            packed[f"{prefix}.gate_up_proj"] = torch.stack(
                [torch.cat([rows[e, "gate"], rows[e, "up"]]) for e in range(n)]
            )
            packed[f"{prefix}.down_proj"] = torch.stack([rows[e, "down"] for e in range(n)])
        return packed

    return _rewrite(folder, out, change)


def store_head(folder: Path, out: Path) -> Path:
    """A tied head, stored as well as its embedding."""
    return _rewrite(folder, out, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
