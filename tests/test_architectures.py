"""Architectures beyond those of the other tests: what is resident is what a fresh load of the export has."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from evo.checkpoint import Checkpoint, CheckpointError
from evo.compatible import check_compatible
from evo.export import write_checkpoint
from evo.materializer import Materializer
from evo.planning.batching import Batch
from fitness.engines.columns import cache_name
from fitness.engines.decoding import Request
from fitness.engines.transformers import TransformersEngine, find_slots, load_model
from search_spaces.layout import Role
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import tiny_tokenizer

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
OLD = ("num_key_value_heads",)  # what a config must not have
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
ARCHITECTURES = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bloom": {"without": OLD},
    "dbrx": {
        "without": (*OLD, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        "d_model": 32, "n_heads": 2, "n_layers": 3, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
    },
    "falcon": {"without": OLD},
    "gemma3n_text": {
        "head_dim": 16, "sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 3,
    },
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gpt2": {"without": OLD},
    "gpt_neox": {"without": OLD},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 24},
    "hy_v3": {**MOE, "head_dim": 16},
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "minimax_m2": {**LOCAL, "head_dim": 16, "rotary_dim": 8},
    "nemotron_h": {
        "head_dim": 16, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    },
    "opt": {"without": OLD, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_next": {
        **MOE, "head_dim": 16, "shared_expert_intermediate_size": 24, "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
}  # fmt: skip
"""Model type of transformers -> its config, where it is not the common one."""


def write_parents(folder, kind, **changes):
    """Three random checkpoints, head stored even where it is tied."""
    options = {**COMMON, **ARCHITECTURES.get(kind, {}), **changes}
    without = options.pop("without", ())
    config = {key: value for key, value in options.items() if key not in without}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(folder / name)
    return {name: folder / name for name in ("base", "a", "b")}


def recipe_of(parents):
    """Coefficients of its own for every role."""
    rules = [Rule("linear", {"a": 0.1 + 0.1 * i, "b": 0.7 - 0.05 * i}, roles=(role,)) for i, role in enumerate(Role)]
    return Recipe({name: Source(str(path)) for name, path in parents.items()}, "base", "a", tuple(rules))


def write_and_load(parents, out):
    """State dicts of the resident model and of the export, and the latter's tensors."""
    recipe, checkpoints = recipe_of(parents), {name: Checkpoint.open(path) for name, path in parents.items()}
    check_compatible(checkpoints)
    model = load_model(str(parents["a"]), torch.float32)
    Materializer(checkpoints, find_slots(model)).write(recipe.to_dict())
    write_checkpoint(recipe, checkpoints, out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return model.state_dict(), loaded.state_dict(), load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_resident_is_exported(kind, tmp_path):
    parents = write_parents(tmp_path, kind)
    resident, loaded, written = write_and_load(parents, tmp_path / "out")
    assert resident.keys() == loaded.keys()
    assert all(torch.equal(resident[name], loaded[name]) for name in loaded)
    base, a, b = (load_file(path / "model.safetensors") for path in parents.values())
    roles = {part.tensor: part.role for part in Checkpoint.open(parents["a"]).layout.parts}
    assert written.keys() == roles.keys() == a.keys()
    for name, role in roles.items():
        i = list(Role).index(role)
        expected = base[name] + (0.1 + 0.1 * i) * (a[name] - base[name]) + (0.7 - 0.05 * i) * (b[name] - base[name])
        assert torch.allclose(written[name], expected, atol=1e-5), name


TEXT = {**COMMON, "head_dim": 16}
SEEING = {
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                    "mrope_section": [2, 3, 3]}},
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEING)
def test_models_that_see_answer_text(kind, tmp_path):
    """Their tower is copied, their text is searched: what is written is what the export's `generate` writes."""
    parents = {name: tmp_path / name for name in ("base", "a", "b")}
    for seed, path in enumerate(parents.values()):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **SEEING[kind]))
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        model.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    recipe, checkpoints = recipe_of(parents), {name: Checkpoint.open(path) for name, path in parents.items()}
    engine = TransformersEngine(str(parents["a"]), dtype="float32", device="cpu", batch_size=3)
    engine.host("evo.materializer:Materializer.hosted", sources={name: str(path) for name, path in parents.items()})
    engine.update(recipe.to_dict())
    write_checkpoint(recipe, checkpoints, tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    resident = engine._model.state_dict()
    assert all(torch.equal(resident[name], tensor) for name, tensor in loaded.state_dict().items())
    prompts = ["1+2", "34*5-6", "7", "8+9+1"]
    for prompt, completion in zip(prompts, engine.generate(prompts, max_tokens=12), strict=True):
        ids = torch.tensor([engine._text.encode(prompt)])
        whole = loaded.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert completion == engine._text.completion(whole[0, ids.shape[1] :].tolist(), 12)


def engine_of(folder, kind, batch_size=32, **changes):
    """An engine for a random model."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **changes}))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return TransformersEngine(str(folder), dtype="float32", device="cpu", batch_size=batch_size)


@pytest.mark.parametrize("kind", ["llama", "lfm2_moe", "nemotron_h", "qwen3_next"])
def test_a_batch_size_is_found_for_models_that_remember_more_than_keys_and_values(kind, tmp_path, monkeypatch):
    """On a machine with room for 8 rows, if each takes what transformers' own cache of it does."""
    changes = {k: v for k, v in ARCHITECTURES.get(kind, {}).items() if k != "without"}
    engine = engine_of(tmp_path, kind, "auto", **changes)
    n_tokens, cache = len(engine._text.encode("1+2")) + 40, DynamicCache(config=engine._model.config)
    ids = torch.ones(1, n_tokens, dtype=torch.long)
    with torch.inference_mode():
        engine._model(input_ids=ids, **{cache_name(engine._model): cache}, use_cache=True)
    held = [t for layer in cache.layers for v in vars(layer).values() for t in (v.values() if type(v) is dict else [v])]
    row = sum(t.nbytes for t in held if isinstance(t, torch.Tensor)) + 32 * COMMON["vocab_size"]
    for free, rows in ((8 * row, 8), (8 * row - 1, 4)):
        monkeypatch.setattr("fitness.engines.transformers.free_bytes", lambda _, n=free: math.ceil(n * 2.5 / 0.5))
        engine.batch_size = None
        engine.generate(["1+2"], max_tokens=40)
        assert engine.batch_size == rows


def test_the_work_of_a_batch_that_is_not_refilled_is_what_the_model_is_given(tmp_path):
    """As hybrids are decoded: every row goes on until the longest answer of its batch has ended."""
    changes = {k: v for k, v in ARCHITECTURES["qwen3_next"].items() if k != "without"}
    engine, given = engine_of(tmp_path, "qwen3_next", 3, **changes), []
    engine._model.register_forward_pre_hook(
        lambda model, args, inputs: given.append(inputs["attention_mask"].shape), with_kwargs=True
    )
    most = [2, 9, 4, 7, 1, 3, 12]
    requests = [Request(engine._text.encode("1+2"), n, i) for i, n in enumerate(most)]
    lengths = [len(ids) for ids in engine._decoder.decode(requests, 3)]
    prompt = len(requests[0].ids)
    work = Batch(3, prompt, refilled=False).work(lengths, 12)
    passes = [(rows, columns + 1) for rows, columns in given]
    assert len(set(lengths)) > 3
    assert work.tolist() == [1, 7, len(passes), sum(r for r, _ in passes), sum(r * c for r, c in passes)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("minimax", {**LOCAL, "head_dim": 16, "block_size": 16,
                     "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
        ("mamba", {"state_size": 8, "conv_kernel": 4, "expand": 2}),
    ],
)  # fmt: skip
def test_a_memory_that_is_not_known_is_told_at_once(kind, options, tmp_path):
    with pytest.raises(ValueError, match=f"cannot decode model_type '{kind}', which remembers text"):
        engine_of(tmp_path, kind, **options)


def test_a_caveat_where_positions_are_scaled_by_length(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "factor": 8.0}  # fmt: skip
    scaled = engine_of(tmp_path / "a", "phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert scaled.caveat is not None and "beyond 32 tokens" in scaled.caveat
    assert engine_of(tmp_path / "b", "phi3").caveat is None


def test_a_config_of_something_else(tmp_path):
    AutoConfig.for_model("vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no model that writes text for model_type 'vit'"):
        load_model(str(tmp_path), torch.float32)


def set_key(folder, key, value):
    """Put something else in place of a key of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**{k: v for k, v in config.items() if k != key}, **value}))


def rewrite(folder, change):
    """Write other tensors, made from those of a checkpoint."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def store_head(folder, head, embedding, scale=1.0):
    """Write the head of a tied checkpoint beside its embedding."""
    rewrite(folder, lambda tensors: {**tensors, head: tensors[embedding] * scale})


class TestTiedHeads:
    """Stored beside the embedding although they are one tensor: they get the same numbers."""

    @pytest.mark.parametrize("said", [True, False])
    @pytest.mark.parametrize(
        ("kind", "embedding"),
        [("gpt2", "transformer.wte.weight"), ("gemma", "model.embed_tokens.weight"),
         ("starcoder2", "model.embed_tokens.weight")],
    )  # fmt: skip
    def test_under_any_name(self, kind, embedding, said, tmp_path):
        parents = write_parents(tmp_path, kind, tie_word_embeddings=True)
        for path in parents.values():
            store_head(path, "lm_head.weight", embedding)
            if not said:  # as published configs that leave it to the architecture's default
                set_key(path, "tie_word_embeddings", {})
        resident, loaded, written = write_and_load(parents, tmp_path / "out")
        assert torch.equal(written["lm_head.weight"], written[embedding])
        assert all(torch.equal(resident[name], loaded[name]) for name in loaded)

    def test_that_are_stored_with_other_bits_are_refused(self, tmp_path):
        """transformers 5 takes the stored head then, and others the embedding."""
        parents = write_parents(tmp_path, "gemma", tie_word_embeddings=True)
        for name, path in parents.items():
            store_head(path, "lm_head.weight", "model.embed_tokens.weight", 0.5 if name == "a" else 1.0)
        with pytest.raises(CheckpointError, match=r"a: config.json says tie_word_embeddings, but lm_head.weight is s"):
            write_and_load(parents, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("stored", [True, False])
    def test_that_one_config_alone_speaks_of(self, stored, tmp_path):
        """As a published Gemma and the same saved by transformers 5, which writes what was a default."""
        parents = write_parents(tmp_path, "gemma", tie_word_embeddings=True)
        for path in parents.values() if stored else ():
            store_head(path, "lm_head.weight", "model.embed_tokens.weight")
        for key in ("tie_word_embeddings", "architectures"):
            set_key(parents["a"], key, {})
        resident, loaded, _ = write_and_load(parents, tmp_path / "out")
        assert all(torch.equal(resident[name], loaded[name]) for name in loaded)

    def test_in_one_parent_only(self, tmp_path):
        parents = write_parents(tmp_path, "gemma", tie_word_embeddings=True)
        for name, path in parents.items():
            store_head(path, "lm_head.weight", "model.embed_tokens.weight", 0.5 if name == "b" else 1.0)
            set_key(path, "tie_word_embeddings", {})
        with pytest.raises(CheckpointError, match=r"the head is the embedding in base .* and not in b"):
            write_and_load(parents, tmp_path / "out")


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("mistral", "model.")])
def test_names_without_their_prefix(kind, prefix, tmp_path):
    """As openai-community/gpt2 is published, and what AutoModel saves."""
    parents = write_parents(tmp_path, kind)
    for path in parents.values():
        rewrite(path, lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    resident, loaded, written = write_and_load(parents, tmp_path / "out")
    assert not any(name.startswith(prefix) for name in written)
    assert all(torch.equal(resident[name], loaded[name]) for name in loaded)


def test_masks_that_old_checkpoints_store_are_copied(tmp_path):
    parents = write_parents(tmp_path, "gpt_neox")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    stored = {f"gpt_neox.layers.{i}.attention.bias": mask.clone() for i in range(3)}
    stored |= {f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(3)}
    for path in parents.values():
        rewrite(path, lambda tensors: {**tensors, **stored})
    resident, loaded, written = write_and_load(parents, tmp_path / "out")
    assert torch.equal(written["gpt_neox.layers.2.attention.bias"], mask)
    assert all(torch.equal(resident[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("gpt2", "n_head", 4), ("gpt2", "activation_function", "relu"), ("gpt_neox", "use_parallel_residual", False),
        ("gemma3_text", "hidden_activation", "relu"),
    ],
)  # fmt: skip
def test_parents_whose_weights_mean_something_else(kind, key, value, tmp_path):
    parents = write_parents(tmp_path, kind)
    set_key(parents["b"], key, {key: value})
    with pytest.raises(CheckpointError, match=rf"config.json {key}: .* in base, {value!r} in b"):
        check_compatible({name: Checkpoint.open(path) for name, path in parents.items()})


def test_what_a_nested_config_says_counts(tmp_path):
    parents = write_parents(tmp_path, "gpt_neox")
    for name, path in parents.items():
        set_key(path, "num_attention_heads", {"text_config": {"num_attention_heads": 4 if name == "b" else 2}})
    with pytest.raises(CheckpointError, match=r"num_attention_heads: 2 in base, 4 in b"):
        check_compatible({name: Checkpoint.open(path) for name, path in parents.items()})
