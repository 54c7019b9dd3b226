import pytest

from evo.checkpoint import Checkpoint
from search_spaces.layout import Layout, Role, UnknownTensorError, is_by_token, parse_layout

# Names as published: DeepSeek-V3, Qwen2-MoE, Mixtral, GPT-2, Qwen3, and what others call the same.
PUBLISHED = {
    "model.embed_tokens.weight": (Role.EMBEDDING, None, None),
    "lm_head.weight": (Role.HEAD, None, None),
    "model.norm.weight": (Role.NORM, None, None),
    "model.layers.7.input_layernorm.weight": (Role.NORM, 7, None),
    "model.layers.7.post_attention_layernorm.weight": (Role.NORM, 7, None),
    "model.layers.7.pre_feedforward_layernorm.weight": (Role.NORM, 7, None),
    "model.layers.7.self_attn.kv_a_proj_with_mqa.weight": (Role.ATTENTION, 7, None),
    "model.layers.7.self_attn.q_a_layernorm.weight": (Role.ATTENTION, 7, None),
    "model.layers.7.self_attn.q_norm.weight": (Role.ATTENTION, 7, None),
    "model.layers.0.mlp.gate_proj.weight": (Role.FFN, 0, None),
    "model.layers.7.mlp.gate.weight": (Role.ROUTER, 7, None),
    "model.layers.7.mlp.gate.e_score_correction_bias": (Role.ROUTER, 7, None),
    "model.layers.7.mlp.shared_expert_gate.weight": (Role.ROUTER, 7, None),
    "model.layers.7.mlp.shared_experts.up_proj.weight": (Role.SHARED_EXPERT, 7, None),
    "model.layers.7.mlp.shared_expert.up_proj.weight": (Role.SHARED_EXPERT, 7, None),
    "model.layers.7.mlp.experts.255.gate_proj.weight": (Role.ROUTED_EXPERT, 7, 255),
    "model.layers.7.block_sparse_moe.gate.weight": (Role.ROUTER, 7, None),
    "model.layers.7.block_sparse_moe.experts.3.w1.weight": (Role.ROUTED_EXPERT, 7, 3),
    "transformer.h.2.attn.c_attn.weight": (Role.ATTENTION, 2, None),
    "transformer.h.2.ln_1.weight": (Role.NORM, 2, None),
    "transformer.wte.weight": (Role.EMBEDDING, None, None),
    "output.weight": (Role.HEAD, None, None),
    "backbone.embeddings.weight": (Role.EMBEDDING, None, None),
    "model.decoder.embed_positions.weight": (Role.EMBEDDING, None, None),
    "model.embed_tokens_per_layer.weight": (Role.EMBEDDING, None, None),
    "word_embeddings_layernorm.weight": (Role.NORM, None, None),
    "model.layers.3.layer_scalar": (Role.NORM, 3, None),
    "transformer.h.3.self_attention.dense.weight": (Role.ATTENTION, 3, None),
    "model.layers.3.mamba.A_log": (Role.ATTENTION, 3, None),
    "model.layers.3.conv.conv.weight": (Role.ATTENTION, 3, None),
    "backbone.layers.3.mixer.in_proj.weight": (Role.ATTENTION, 3, None),
    "backbone.layers.3.mixer.up_proj.weight": (Role.FFN, 3, None),
    "backbone.layers.3.mixer.gate.e_score_correction_bias": (Role.ROUTER, 3, None),
    "backbone.layers.3.mixer.experts.5.up_proj.weight": (Role.ROUTED_EXPERT, 3, 5),
    "model.decoder.layers.3.fc1.weight": (Role.FFN, 3, None),
    "transformer.blocks.3.ffn.router.layer.weight": (Role.ROUTER, 3, None),
    "model.language_model.layers.3.router.proj.weight": (Role.ROUTER, 3, None),  # Gemma 4
    "model.language_model.layers.3.router.per_expert_scale": (Role.ROUTER, 3, None),
    "model.language_model.layers.3.cross_attn_mlp_gate": (Role.ATTENTION, 3, None),  # Mllama
    "transformer.blocks.3.ffn.experts.mlp.w1": (Role.ROUTED_EXPERT, 3, None),
    "model.layers.3.feed_forward.expert_bias": (Role.ROUTER, 3, None),
    "model.layers.3.mlp.moe_statics.e_score_correction_bias": (Role.ROUTER, 3, None),
    "model.layers.3.mlp.experts.e_score_correction_bias": (Role.ROUTER, 3, None),
    "model.layers.3.mlp.shared_mlp.gate_proj.weight": (Role.SHARED_EXPERT, 3, None),
    "model.layers.3.shared_mlp.input_linear.weight": (Role.SHARED_EXPERT, 3, None),
}


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_published_names_get_their_place(name, expected):
    (part,) = parse_layout({name: (4, 4)}).parts
    assert part.cell == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("lm_head.weight", True),
        ("embed_out.weight", True),  # GPT-NeoX
        ("output.weight", True),  # InternLM2
        ("lm_head.bias", False),
        ("transformer.wpe.weight", False),
        ("model.layers.0.attention.output.weight", False),
    ],
)
def test_what_has_a_row_for_each_token(name, expected):
    assert is_by_token(name) == expected


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.block_sparse_moe.input_linear.weight"]
)
def test_packed_experts_are_one_part_each(name):
    layout = parse_layout({name: (6, 8, 4)})
    assert [(p.row, p.expert, p.block) for p in layout.parts] == [(e, e, 1) for e in range(6)]
    assert layout.n_experts == 6


@pytest.mark.parametrize(
    ("name", "shape"),
    [("transformer.blocks.0.ffn.experts.mlp.w1", (24, 8)), ("model.layers.0.mlp.input_linear.weight", (8, 4))],
)
def test_a_matrix_is_no_stack_of_experts(name, shape):
    (part,) = parse_layout({name: shape}).parts
    assert part.row is None and part.expert is None


def test_unknown_tensors_are_all_named():
    with pytest.raises(UnknownTensorError, match=r"2 tensor\(s\).*mystery\.weight, other\.thing"):
        parse_layout({"mystery.weight": (2,), "lm_head.weight": (2, 2), "other.thing": (1,)})


def test_every_tensor_of_a_real_checkpoint_is_accounted_for(parents):
    checkpoint = Checkpoint.open(parents["a"])
    layout: Layout = checkpoint.layout
    assert [part.tensor for part in layout.parts] == list(checkpoint.headers)
    assert layout.n_blocks == 3
    keys = ("n_routed_experts", "num_experts", "num_local_experts")  # as the architectures spell it
    assert layout.n_experts == next((n for key in keys if (n := checkpoint.config().get(key))), 0)
