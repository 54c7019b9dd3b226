"""Quantised checkpoints that cannot be merged are refused when they are opened, with a way out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from evo.checkpoint import Checkpoint, CheckpointError


@pytest.fixture
def folder(moe_parents, tmp_path):
    return shutil.copytree(moe_parents["a"], tmp_path / "copy")


METHODS = ["awq", "gptq", "compressed-tensors", "bitsandbytes", "eetq", "hqq", "torchao", "quanto", "fbgemm_fp8", "new"]


@pytest.mark.parametrize("method", METHODS)
def test_by_what_the_config_says(folder, method):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match=rf"quantised with '{method}'.*take the bfloat16 checkpoint"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.self_attn.q_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.self_attn.q_proj.SCB", "bitsandbytes"),
        ("model.layers.0.self_attn.q_proj.W_q", "HQQ"),
        ("model.layers.0.self_attn.q_proj.weight._data", "quanto"),
    ],
)
def test_by_a_tensor(tmp_path, tensor, kind):
    save_file({tensor: torch.zeros(4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is one of {kind}'s"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("bitsandbytes", r"\.dequantize\(\)\.save_pretrained"),
        ("compressed-tensors", r"CompressedTensorsConfig\(dequantize=True\)"),
        ("gptq", r"dequantize_model\(PATH, NEW_PATH\)"),
        ("awq", r"AutoAWQConverter\.from_pretrained\(PATH\)\), then .*CompressedTensorsDequantizer\(PACKED_PATH\)"),
    ],
)
def test_the_way_out_is_code_where_there_is_some(folder, method, code):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"convert it first: .*{code}"):
        Checkpoint.open(folder)


def test_gguf(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="gguf_file="):
        Checkpoint.open(tmp_path)


def test_integers_cannot_be_merged(tmp_path):
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"up_proj\.weight \(I8\)"):
        _ = Checkpoint.open(tmp_path).layout


def test_a_float8_tensor_of_another_kind(tmp_path):
    tensor = torch.zeros(4, 4, dtype=torch.float8_e5m2)
    save_file({"model.layers.0.mlp.up_proj.weight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight \(F8_E5M2\)"):
        _ = Checkpoint.open(tmp_path).layout
