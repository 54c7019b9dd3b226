"""Checkpoints in other encodings, made by independent numpy code from the published formats."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from evo.checkpoint import Checkpoint

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_values() -> np.ndarray:
    """The 256 numbers of E4M3 (OCP 8-bit floating point, table 1): bias 7, no infinities, NaN at 0x7f and 0xff."""
    codes = np.arange(256)
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 7), (codes >> 3) & 15, codes & 7
    normal = sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, sign * mantissa / 8 * 2.0**-6, normal)
    values[(codes & 127) == 127] = np.nan
    return values


def e4m3_round(x: np.ndarray) -> np.ndarray:
    """Codes of the nearest E4M3 numbers, ties to the even code; beyond 448 it is 448."""
    magnitudes = e4m3_values()[:127]  # ascending
    x = np.asarray(x, np.float64)
    size = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(magnitudes, size)
    below = np.maximum(above - 1, 0)
    up, down = magnitudes[above] - size, size - magnitudes[below]
    codes = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (codes + 128 * (np.signbit(x))).astype(np.uint8)


def quantize(w: np.ndarray, block=(128, 128), ue8m0=False) -> tuple[np.ndarray, np.ndarray]:
    """DeepSeek's published weights: s = amax / 448 of each block, codes = round(w / s)."""
    w = np.asarray(w, np.float32)
    rows, columns = -(-w.shape[0] // block[0]), -(-w.shape[1] // block[1])
    codes, scales = np.zeros(w.shape, np.uint8), np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale = np.abs(w[at]).max() / np.float32(448)
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale)))) if ue8m0 else scale
            scales[i, j] = scale if scale else 1.0
            codes[at] = e4m3_round(w[at] / scales[i, j])
    return codes, scales


def dequantize(codes: np.ndarray, scales: np.ndarray, block=(128, 128)) -> np.ndarray:
    """Float32 values."""
    spread = np.kron(scales, np.ones(block, np.float32))[: codes.shape[0], : codes.shape[1]]
    return e4m3_values()[codes].astype(np.float32) * spread


def is_quantized(name: str) -> bool:
    """The weights that DeepSeek publishes in FP8: projections, but no gate, norm, embedding or head."""
    return name.endswith("proj.weight") or "kv_a_proj" in name


def to_fp8(folder: Path, out: Path, block=(16, 16), scale_fmt: str | None = None) -> Path:
    """A checkpoint with its projections in FP8, as DeepSeek publishes them."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"]["weight_block_size"] = list(block)
    if scale_fmt:
        config["quantization_config"]["scale_fmt"] = scale_fmt
    (out / "config.json").write_text(json.dumps(config))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in sorted(out.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            if is_quantized(name):
                codes, scales = quantize(tensor.float().numpy(), block, scale_fmt == "ue8m0")
                tensors[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.from_numpy(scales)
                index["weight_map"][f"{name}_scale_inv"] = file.name
            else:
                tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def first_shard(folder: Path) -> Path:
    """The first file of a folder's weights."""
    return sorted(folder.glob("*.safetensors"))[0]


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def values_in(folder: Path, block=(16, 16)) -> dict[str, np.ndarray]:
    """Float32 values of every tensor of a folder, FP8 decoded."""
    found, files = {}, files_of(folder)
    for name, tensor in files.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scales = files[f"{name}_scale_inv"].numpy()
            found[name] = dequantize(tensor.view(torch.uint8).numpy(), scales, block)
        elif not name.endswith("_scale_inv"):
            found[name] = tensor.float().numpy()
    return found


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Of a checkpoint's files, without their headers: nothing in these checkpoints is unscored."""
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    return sum(math.prod(h.shape) * sizes[h.dtype] for h in checkpoint.headers.values())
