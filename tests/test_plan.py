"""A plan against arithmetic by hand, against real tensors, and on a machine that is too small."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evo.calibrate import extrapolated, plan_search, search_seconds
from evo.checkpoint import Checkpoint
from evo.encodings import TensorHeader
from evo.plan import (
    Load,
    PlanError,
    cache_row_bytes,
    columns,
    export_bytes,
    make_plan,
    model_bytes,
    shards,
    source_bytes,
)
from fitness.engines.columns import Columns
from tests.conftest import CHIMERA, make_checkpoint
from tests.synthetic import config_of

HIDDEN, WIDTH, N_EXPERTS, N_LAYERS, N_DENSE, VOCABULARY = 7168, 2048, 256, 61, 3, 129280
DEEPSEEK = {
    "num_hidden_layers": N_LAYERS, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """DeepSeek-V3 as headers alone: 61 layers, FP8, no multi-token prediction."""
    folder, headers = tmp_path_factory.mktemp("deepseek"), {}

    def fp8(name, rows, columns):
        headers[name] = TensorHeader("F8_E4M3", (rows, columns))
        headers[f"{name}_scale_inv"] = TensorHeader("F32", (math.ceil(rows / 128), math.ceil(columns / 128)))

    def ffn(place, width):
        fp8(f"{place}.gate_proj.weight", width, HIDDEN)
        fp8(f"{place}.up_proj.weight", width, HIDDEN)
        fp8(f"{place}.down_proj.weight", HIDDEN, width)

    headers["model.embed_tokens.weight"] = TensorHeader("BF16", (VOCABULARY, HIDDEN))
    for layer in range(N_LAYERS):
        block = f"model.layers.{layer}"
        fp8(f"{block}.self_attn.q_a_proj.weight", 1536, HIDDEN)
        fp8(f"{block}.self_attn.q_b_proj.weight", 128 * 192, 1536)
        fp8(f"{block}.self_attn.kv_a_proj_with_mqa.weight", 576, HIDDEN)
        fp8(f"{block}.self_attn.kv_b_proj.weight", 128 * 256, 512)
        fp8(f"{block}.self_attn.o_proj.weight", HIDDEN, 128 * 128)
        vectors = {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
        vectors |= {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
        headers |= {f"{block}.{name}.weight": TensorHeader("BF16", (n,)) for name, n in vectors.items()}
        if layer < N_DENSE:
            ffn(f"{block}.mlp", 18432)
            continue
        headers[f"{block}.mlp.gate.weight"] = TensorHeader("BF16", (N_EXPERTS, HIDDEN))
        headers[f"{block}.mlp.gate.e_score_correction_bias"] = TensorHeader("F32", (N_EXPERTS,))
        ffn(f"{block}.mlp.shared_experts", WIDTH)
        for expert in range(N_EXPERTS):
            ffn(f"{block}.mlp.experts.{expert}", WIDTH)
    headers["model.norm.weight"] = TensorHeader("BF16", (HIDDEN,))
    headers["lm_head.weight"] = TensorHeader("BF16", (VOCABULARY, HIDDEN))
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    return Checkpoint(folder, dict.fromkeys(headers, "model.safetensors"), headers)


def test_the_671b_pair_on_16_ranks(deepseek):
    assert model_bytes(deepseek, "bfloat16") == 2 * 671_026_419_200  # as the paper's table counts it
    found = {shard.layout: shard for shard in shards([deepseek, deepseek], "bfloat16", 16)}
    matrices = sum(math.prod(e.shape) for e in deepseek.entries.values() if len(e.shape) > 1)
    vectors = sum(math.prod(e.shape) for e in deepseek.entries.values() if len(e.shape) == 1)
    assert found["tensor"].model_bytes == pytest.approx(2 * (matrices / 16 + vectors), rel=1e-6)
    expert = 3 * HIDDEN * WIDTH
    routed = (N_LAYERS - N_DENSE) * N_EXPERTS * expert
    assert found["expert"].model_bytes == 2 * (671_026_419_200 - routed) + 2 * routed // 16
    stored = (N_LAYERS - N_DENSE) * N_EXPERTS // 16 * (expert + 4 * expert // 128**2)
    assert 0 < found["expert"].source_bytes - 2 * stored < 2 * 20e9
    block = 2 * N_EXPERTS * expert
    assert 4 * block < found["pipeline"].model_bytes < 4.1 * block + 2 * VOCABULARY * HIDDEN  # 58 in 16: 4 at most
    slow, fast = found["tensor"].seconds(1e12), found["tensor"].seconds(2e12)
    assert slow == 2 * fast == (found["tensor"].model_bytes + found["tensor"].source_bytes) / 1e12


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 7, 61, 100])
def test_stages_are_runs_of_blocks_and_the_fullest_is_the_smallest(deepseek, n_ranks):
    whole = shards([deepseek], "bfloat16", 1)
    assert {s.model_bytes for s in whole} == {model_bytes(deepseek, "bfloat16")}
    assert {s.source_bytes for s in whole} == {source_bytes(deepseek)}
    (stage,) = [s for s in shards([deepseek], "bfloat16", n_ranks) if s.layout == "pipeline"]
    blocks = {}
    for part in deepseek.layout.parts:
        blocks[part.block] = blocks.get(part.block, 0) + 2 * math.prod(deepseek.entries[part.tensor].shape)
    assert stage.model_bytes >= max(max(blocks.values()), whole[0].model_bytes / n_ranks)
    assert stage.model_bytes <= whole[0].model_bytes / n_ranks + max(blocks.values())


@pytest.mark.parametrize("config", ["llama", "llama_tied", "qwen3_moe", "deepseek_v3"])
def test_bytes_are_those_of_the_real_model_cache_and_files(tmp_path, config):
    folder = make_checkpoint(tmp_path / "model", config, 0)
    checkpoint = Checkpoint.open(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    resident = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert model_bytes(checkpoint, "bfloat16") == pytest.approx(resident, rel=0.01)  # a float32 bias in DeepSeek's
    assert export_bytes(checkpoint) == sum(checkpoint.tensor(name).nbytes for name in checkpoint.headers)
    prompt, answer, rows = 5, 64, 3
    cache = Columns(rows)
    cache.join(rows, prompt)
    model(input_ids=torch.ones(rows, prompt, dtype=torch.long), past_key_values=cache, use_cache=True)
    for n in range(prompt, prompt + answer - 1):
        cache.step(n)
        at = torch.full((rows, 1), n)
        mask = torch.ones(rows, n + 1)
        model(input_ids=at % 2, position_ids=at, attention_mask=mask, past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert rows * cache_row_bytes(AutoConfig.from_pretrained(folder).to_dict(), prompt, answer, 2) == held


def test_columns_by_hand():
    assert columns(10, 20) == 42  # fits at once
    assert columns(10, 60) == 42 + 32  # 42, then 32 more, which is more than half of 42
    assert columns(100, 100) == 132 + 66 + 99  # 132, 198 are less than 200


@pytest.fixture
def chimera():
    return config_of({name: CHIMERA / name for name in ("reasoner", "concise", "base")}, engine=ENGINE)


ENGINE = {"dtype": "float32", "device": "cpu", "batch_size": 32, "max_tokens": 110}


def test_what_cannot_fit_is_refused_with_the_setting_that_helps(chimera, tmp_path):
    planned = plan_search(chimera, out=tmp_path)
    need, row = planned.plan.total("host"), planned.plan.row_bytes
    with pytest.raises(PlanError, match=r"^host: expected at most .* engine.batch_size: 29 or less would fit"):
        plan_search(chimera, out=tmp_path, free={"host": need - 3 * row})
    assert plan_search(chimera, out=tmp_path, free={"host": need})
    with pytest.raises(PlanError, match=r"engine.dtype: bfloat16 would fit, with engine.batch_size: \d+ or less"):
        plan_search(chimera, out=tmp_path, free={"host": need - 32 * row})
    with pytest.raises(PlanError, match="No setting would help: use a machine with more memory"):
        plan_search(chimera, out=tmp_path, free={"host": 10**6})
    with pytest.raises(PlanError, match=r"disk: expected at most 1\.0 MB"):
        plan_search(chimera, out=tmp_path, free={"host": need, "disk": 10**6})


def test_on_a_gpu_sources_stay_beside_the_model(chimera):
    checkpoints = {name: Checkpoint.open(path) for name, path in chimera.sources.items()}
    load = Load(prompt=10, rows=4, answers=4)
    gpu = make_plan(chimera, checkpoints, load, device="gpu", dtype="bfloat16")
    host = make_plan(chimera, checkpoints, load, device="host", dtype="bfloat16")
    two = 2 * export_bytes(checkpoints["concise"])  # linear does not read the ancestor
    assert host.total("gpu") == 0 and host.total("mapped") == two
    assert gpu.total("gpu") - 512 * 2**20 == model_bytes(checkpoints["base"], "bfloat16") + two + 8 * 2**20 + sum(
        item.n_bytes for item in gpu.items if "keys and values" in item.what
    )


def test_times_extrapolate_along_a_line_and_to_the_nearest_limit(chimera):
    assert extrapolated([(4, 3.0, 40.0), (8, 4.0, 80.0)], 16) == (6.0, 160.0)
    assert extrapolated([(4, 3.0, 40.0), (8, 2.0, 80.0)], 16) == (2.0, 160.0)  # noise does not make it negative
    budgets = {"candidates": 100, "tokens": 5000, "hours": 0.01}
    for limits, seconds in ((["candidates"], 200), (["candidates", "tokens"], 100), (list(budgets), 36)):
        config = chimera.model_copy(update={"budget": type(chimera.budget)(**{k: budgets[k] for k in limits})})
        assert search_seconds(config, 2.0, 100.0) == pytest.approx(seconds)
