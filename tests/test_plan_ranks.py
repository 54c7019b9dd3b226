"""What ranks hold of the 671B pair, by hand, and of tiny checkpoints, against what they really hold."""

import json
import math

import pytest
import torch

from evo.adapter import open_checkpoints
from evo.checkpoint import Checkpoint
from evo.encodings import TensorHeader
from evo.materializer import Materializer
from evo.parallel import LAYOUTS
from evo.planning.footprint import model_bytes
from evo.planning.ranks import Share, rank_table, shares
from search_spaces.recipe import Recipe, Rule, Source
from tests.encoding import stored_bytes, to_fp8
from tests.ranks import slots_of

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


N_MATRICES = 671_026_419_200
"""Parameters of DeepSeek-V3 without multi-token prediction, as its model card counts them (671B)."""


def test_the_671b_pair_on_16_ranks_by_hand(deepseek):
    assert model_bytes(deepseek, "bfloat16") == 2 * N_MATRICES
    expert = 3 * HIDDEN * WIDTH
    stored_expert = expert + 4 * expert // 128**2
    routed, stored = (one * (N_LAYERS - N_DENSE) * N_EXPERTS for one in (expert, stored_expert))
    whole = Share(model_bytes(deepseek, "bfloat16"), 2 * stored_bytes(deepseek))
    sibling = Checkpoint(deepseek.path / "sibling", deepseek.weight_map, deepseek.headers)
    sibling.config = deepseek.config
    found = {layout: shares(layout, [deepseek, sibling], torch.bfloat16, 16) for layout in LAYOUTS}
    assert set(found["expert"]) == {
        Share(whole.model - 2 * routed + 2 * routed // 16, whole.sources - 2 * stored + 2 * stored // 16)
    }
    assert sum(found["pipeline"], Share(0, 0)) == whole
    fullest = max(share.model for share in found["pipeline"])
    assert 4 * 2 * N_EXPERTS * expert < fullest < 4.1 * 2 * N_EXPERTS * expert + 2 * VOCABULARY * HIDDEN  # 4 blocks
    repeated = N_LAYERS * (1536 * HIDDEN + 576 * HIDDEN + 1536 + 512 + 2 * HIDDEN) + HIDDEN  # q_a, kv_a and norms
    repeated += (N_LAYERS - N_DENSE) * N_EXPERTS * (HIDDEN + 1)  # routers
    assert {share.model for share in found["tensor"]} == {2 * ((N_MATRICES - repeated) // 16 + repeated)}
    assert found["tensor"][0].seconds(1e12) == (found["tensor"][0].model + found["tensor"][0].sources) / 1e12


def test_a_layout_that_would_cut_blocks_of_fp8_is_said_to_be_none(deepseek):
    lines = list(rank_table([deepseek], torch.bfloat16, 32, 1e9))
    (line,) = [line for line in lines if "tensor-parallel" in line]
    assert "cannot be" in line and "multiples of 128 rows" in line  # 2048 / 32 is 64
    assert sum("pipeline-parallel" in line for line in lines) > 1 and sum("expert-parallel" in line for line in lines)
    assert any("expert-parallel 0-31 " in line for line in lines)  # 256 experts: all ranks alike


def assert_shares_are_held(parents, interface, layout):
    """Each of two ranks writes a merge, and then holds what was predicted."""
    sources = {name: Source(str(path)) for name, path in parents.items()}
    recipe = Recipe(sources, "base", interface, (Rule("linear", {"a": 0.3, "b": 0.4}),)).to_dict()
    checkpoints = open_checkpoints(parents)
    for rank, share in enumerate(shares(layout, list(checkpoints.values()), torch.bfloat16, 2)):
        slots, tensors = slots_of(layout, checkpoints[interface], rank, 2)
        materializer = Materializer(open_checkpoints(parents), slots, partial=True)
        materializer.write(recipe)
        assert share.model == sum(2 * tensor.numel() for tensor in tensors.values())
        assert share.sources == sum(held.nbytes for held in materializer._pieces._kept.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True])
def test_shares_are_what_a_rank_really_holds(moe_parents, layout, fp8, tmp_path):
    parents = {n: to_fp8(p, tmp_path / n, (8, 8)) if fp8 else p for n, p in moe_parents.items()}
    assert_shares_are_held(parents, "a", layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_of_an_adapter_count_its_base_once(llama_adapter, layout):
    assert_shares_are_held(llama_adapter, "b", layout)
