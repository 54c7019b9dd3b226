"""A plan against arithmetic by hand, against real tensors, and on a machine that is too small."""

import json
import math
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from evo.adapter import open_checkpoints
from evo.checkpoint import Checkpoint
from evo.deltas import LowRankDelta
from evo.encodings import TensorHeader
from evo.ledger import Ledger
from evo.materializer import Materializer
from evo.parallel import LAYOUTS
from evo.planning.footprint import model_bytes
from evo.planning.machine import _batch_size, plan_search, ranks_report
from evo.planning.plan import PICTURE_BYTES, Load, PlanError, Settings, check, make_plan, run_bytes
from evo.planning.ranks import Share, rank_table, shares
from evo.planning.sources import Sources
from evo.residency import Residency
from evo.types import Candidate, Evaluation, Origin, Status
from fitness.engines.transformers import TransformersEngine
from fitness.types import Score, Split
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import make_checkpoint
from tests.encoding import to_fp8
from tests.ranks import slots_of
from tests.synthetic import config_of
from tests.test_adapter import make_adapter

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


def stored_bytes(checkpoint):
    """Of its files, without their headers: nothing in these checkpoints is unscored."""
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    return sum(math.prod(h.shape) * sizes[h.dtype] for h in checkpoint.headers.values())


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


def test_a_plan_counts_how_tokens_are_drawn(chimera):
    checkpoints = open_checkpoints(chimera.sources)
    load, rows = Load(prompt=10, answers=200, evaluations=1000), []
    for decoding in ({"greedy": True}, {"greedy": False, "top_p": 0.9}):
        options = {"dtype": "float32", "max_tokens": 110, "decoding": decoding}
        config = config_of(chimera.sources, engine=options)
        plan = make_plan(config, Sources(config, checkpoints), load, Settings("host", "float32", 1), python_bytes=0)
        rows.append(plan.row)
    vocabulary = checkpoints["reasoner"].config()["vocab_size"]
    assert rows[1] - rows[0] == (32 - 4) * vocabulary


def test_compiled_products_are_counted_where_there_are_any(plan_of):
    """In bfloat16 on a CPU with AVX-512, more of them with more answers; not in float32, nor on a GPU."""
    more = []
    cases = ("host", "bfloat16", 4), ("host", "bfloat16", 8), ("host", "float32", 8), ("gpu", "bfloat16", 8)
    for device, dtype, rows in cases:
        told = [plan_of(Settings(device, dtype, rows, has_avx512=has)).total("host") for has in (False, True)]
        more.append(told[1] - told[0])
    assert more[1] == 2 * more[0] > 0 and more[2:] == [0, 0]


def test_an_automatic_batch_is_what_the_engine_makes_of_as_much_memory(chimera, monkeypatch):
    options = {"dtype": "float32", "batch_size": "auto"}
    config = config_of(chimera.sources, engine={**options, "max_tokens": 110})
    interface = open_checkpoints(chimera.sources)["reasoner"]
    engine = TransformersEngine(str(interface.path), device="cpu", **options)
    load, found = Load(prompt=10, answers=200, evaluations=1000), []
    for n in (int(1.2**k * 10**6) for k in range(24)):
        monkeypatch.setattr("fitness.engines.transformers.free_bytes", lambda _, n=n: n)
        found.append(engine._find_batch_size(10 + 110))
        free = n + model_bytes(interface, "float32")
        assert _batch_size(config, interface, load, options, torch.device("cpu"), free) == found[-1]
    assert len(set(found)) > 4


@pytest.mark.parametrize("max_tokens", [1024, 16384])
def test_answers_that_a_ledger_keeps_in_full_are_counted(chimera, tmp_path, max_tokens):
    """Of answers half as long as they may be, three of each evaluation, in a real ledger."""
    config = config_of(chimera.sources, engine={"max_tokens": max_tokens}, tracking={"enabled": False})
    n, n_problems, sample = 100, 200, {"question": "1+2", "answer": "3", "completion": " the" * (max_tokens // 2)}
    score = np.zeros((n_problems, 1), np.int32)
    score = Score(tuple(f"{i:016x}" for i in range(n_problems)), score.astype(np.uint8), score, score)
    with closing(Ledger.create(tmp_path, {}, {Split.SEARCH: score.problem_ids})) as ledger:
        recipe = Recipe({"a": Source("a")}, "a", "a")
        ledger.append_asks(
            [Candidate(i, f"c{i}", Origin.SEARCH, 0, recipe, np.zeros(30, np.float32)) for i in range(n)]
        )
        for i in range(n):
            detail = {"samples": [sample] * 3}
            ledger.append_evaluation(
                Evaluation(i, Status.DONE, 1.0, np.zeros(2), score=score, detail=detail), Split.SEARCH
            )
    told = run_bytes(config, Load(prompt=10, answers=n_problems, evaluations=n, genes=30)) - PICTURE_BYTES
    assert told == pytest.approx(sum(file.stat().st_size for file in tmp_path.iterdir()), rel=0.25)


def test_more_tokens_than_the_context_are_refused(chimera, tmp_path):
    engine = chimera.engine.model_copy(update={"max_tokens": 256})
    with pytest.raises(PlanError, match=r"engine.max_tokens is 256, but the model's context has room for 256"):
        plan_search(chimera.model_copy(update={"engine": engine}), out=tmp_path)
    engine = chimera.engine.model_copy(update={"max_tokens": 255})
    lines = list(plan_search(chimera.model_copy(update={"engine": engine}), out=tmp_path).report(None))
    assert any("exceeds the context of 256" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(chimera, tmp_path):
    config = config_of(chimera.sources, engine={"dtype": "float32", "device": "cuda", "max_tokens": 110})
    with pytest.raises(PlanError, match=r"engine.device is 'cuda', but torch sees no GPU here"):
        plan_search(config, out=tmp_path)
    assert list(ranks_report(config, 2))


@pytest.fixture
def plan_of(chimera):
    load = Load(prompt=10, answers=200, evaluations=1000)
    sources = Sources(chimera, open_checkpoints(chimera.sources))
    return partial(make_plan, chimera, sources, load, python_bytes=10**8, free={"gpu": 10**12})


def test_what_cannot_fit_is_refused_with_the_setting_that_helps(plan_of):
    asked = Settings("host", "float32", rows=100)
    plan = plan_of(asked)
    need = plan.total("host")
    assert check(plan_of, asked, {"host": need}) == plan
    with pytest.raises(PlanError, match=r"^host: expected at most .*\nengine.batch_size: 64 would fit"):
        check(plan_of, asked, {"host": need - 1})
    with pytest.raises(PlanError, match=r"\nengine.batch_size: 64 would fit"):
        check(plan_of, asked, {"host": need - 36 * plan.row})
    with pytest.raises(PlanError, match=r"\nengine.batch_size: 32 would fit"):
        check(plan_of, asked, {"host": need - 36 * plan.row - 1})
    one = plan_of(replace(asked, rows=1)).total("host")
    with pytest.raises(PlanError, match=r"\nengine.dtype: bfloat16 with engine.batch_size: \d+ would fit"):
        check(plan_of, asked, {"host": one - 1})
    with pytest.raises(PlanError, match=r"\nNo setting would help: use a machine with more memory"):
        check(plan_of, asked, {"host": 10**8})
    with pytest.raises(PlanError, match=r"^disk: expected at most 1\.0 MB.*\nFree some of the disk"):
        check(plan_of, asked, {"host": need, "disk": 10**6})


def test_on_a_gpu_sources_stay_beside_the_model_and_on_a_cpu_they_are_mapped(plan_of, chimera):
    gpu, host = (plan_of(Settings(where, "bfloat16", 4)) for where in ("gpu", "host"))
    checkpoints = open_checkpoints(chimera.sources)
    two = 2 * stored_bytes(checkpoints["concise"])  # linear does not read the ancestor
    assert host.total("gpu") == gpu.total("mapped") == 0 and host.total("mapped") == two
    assert gpu.total("gpu") == model_bytes(checkpoints["base"], "bfloat16") + two + 4 * gpu.row + (512 + 8) * 2**20
    with pytest.raises(PlanError, match=r"\nengine.device: cpu would fit"):
        check(plan_of, Settings("gpu", "bfloat16", 1), {"gpu": two, "host": 10**9})


@pytest.mark.parametrize("deltas", ["exact", "int8", "int4", "low_rank(2)"])
@pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.PINNED, Residency.DISK])
@pytest.mark.parametrize("adapter", [False, True])
def test_sources_are_counted_as_a_materializer_keeps_them(
    moe_parents, llama_adapter, residency, deltas, adapter, monkeypatch
):
    monkeypatch.setattr("evo.materializer.choose", lambda kind, *_, **__: kind)  # pinned without a GPU
    parents = llama_adapter if adapter else {name: moe_parents[name] for name in ("base", "a", "b")}
    config = config_of(parents, space={"kind": "block", "method": "task_arithmetic"}, interface="base")
    checkpoints = open_checkpoints(parents)
    slots = {n: torch.full(e.shape, torch.nan) for n, e in checkpoints["base"].scored.items()}
    base = config.space_base
    writer = Materializer(checkpoints, slots, residency=residency, deltas=deltas, base=base)
    donors = {name: 0.3 for name in parents if name != base}
    recipe = Recipe({n: Source(str(p)) for n, p in parents.items()}, base, "base", (Rule("linear", donors),))
    writer.write({**recipe.to_dict(), "compressed": True})
    kept = list(writer._pieces._kept.values())
    compressed = sum(t.nbytes for held in (writer._deltas._kept.values() if writer._deltas else ()) for t in held)
    items = Sources(config, checkpoints).items(residency, deltas, "host")
    originals = [i for i in items if i.what.startswith(("the checkpoint", "factors")) and "exact scores" not in i.what]
    exact, pinned = sum(t.nbytes for t in kept), sum(2 ** math.ceil(math.log2(t.nbytes)) for t in kept)
    assert sum(i.n_bytes for i in originals) == (pinned if residency is Residency.PINNED else exact)
    assert sum(i.n_bytes for i in items if i.what.startswith("differences")) == compressed
    assert writer._n_bytes() == (exact + compressed, pinned + compressed)
    where = {i.where for i in originals if i.what.startswith("the checkpoint")}
    assert where == {"mapped" if residency is Residency.DISK else "host"}


@pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.DISK])
def test_compressing_is_counted_beside_what_is_kept_by_then(tmp_path, residency, monkeypatch):
    """A large embedding comes first, when hardly anything else is kept: against a real search's first merge."""
    model = LlamaConfig(
        vocab_size=4000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    parents = {name: make_checkpoint(tmp_path / name, model, seed) for seed, name in enumerate(["base", "a", "b"])}
    config = config_of(parents, space={"kind": "block", "method": "task_arithmetic"}, interface="base")
    checkpoints, took, compress = open_checkpoints(parents), [0], LowRankDelta.compress
    monkeypatch.setattr("evo.deltas._SCRATCH", 1000)

    def kept():
        deltas = sum(t.nbytes for held in writer._deltas._kept.values() for t in held)
        return deltas + (residency is Residency.DEVICE) * sum(t.nbytes for t in writer._pieces._kept.values())

    def watched(self, delta, like):
        took.append(kept() + self.scratch_bytes(tuple(like.shape)))
        return compress(self, delta, like)

    monkeypatch.setattr(LowRankDelta, "compress", watched)
    slots = {n: torch.full(e.shape, torch.nan) for n, e in checkpoints["base"].scored.items()}
    writer = Materializer(checkpoints, slots, residency=residency, deltas="low_rank(2)", base="base")
    rule = Rule("linear", {"a": 0.3, "b": 0.3})
    recipe = Recipe({n: Source(str(p)) for n, p in parents.items()}, "base", "base", (rule,))
    writer.write({**recipe.to_dict(), "compressed": True})
    items = Sources(config, checkpoints).items(residency, "low_rank(2)", "host")
    told = sum(item.n_bytes for item in items if item.where == "host")
    assert told == pytest.approx(max(*took, kept()), rel=0.07)  # a donor's difference is counted before it is made


@pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.PINNED, Residency.DISK])
@pytest.mark.parametrize("deltas", ["exact", "int8"])
def test_what_is_not_on_a_gpu_is_copied_there(chimera, residency, deltas):
    """A matrix of 128 x 256 in bfloat16 of two parents at once; two matrices in turn, from pinned memory."""
    checkpoints = open_checkpoints(chimera.sources)
    items = {item.what: item for item in Sources(chimera, checkpoints).items(residency, deltas, "gpu")}
    arriving = sum(item.n_bytes for what, item in items.items() if what.startswith("what is merged now"))
    largest = 2 * 2 * 128 * 256
    everything_is_there = residency is Residency.DEVICE and deltas == "exact"
    assert arriving == (0 if everything_is_there else 2 * largest if residency is Residency.PINNED else largest)
    if deltas == "int8":
        original = items["the checkpoint reasoner, for exact scores"]
        assert (original.where, original.n_bytes) == ("mapped", stored_bytes(checkpoints["reasoner"]))


def test_memory_settings_that_help_are_named(plan_of):
    gpu = Settings("gpu", "bfloat16", rows=1, residency="device")
    plan, rest = plan_of(gpu), {"host": 10**10}
    pinned = plan_of(replace(gpu, residency="pinned"))
    assert pinned.total("gpu") < plan.total("gpu") and pinned.total("host") > plan.total("host")
    with pytest.raises(PlanError, match=r"\nmemory.residency: pinned would fit"):
        check(plan_of, gpu, {"gpu": plan.total("gpu") - 1, **rest})
    with pytest.raises(PlanError, match=r"\nmemory.residency: disk would fit"):
        check(plan_of, gpu, {"gpu": plan.total("gpu") - 1, "host": pinned.total("host") - 1})


def test_what_auto_comes_to_is_told(plan_of):
    found = {}
    for n in (10**9, 12 * 10**6, 4 * 10**6):  # model and sources are 2 and 8 MB
        found[n] = plan_of(Settings("gpu", "bfloat16", 1), free={"gpu": n, "host": 10**9}).residency
    assert list(found.values()) == [Residency.DEVICE, Residency.PINNED, Residency.PINNED]
    small = plan_of(Settings("gpu", "bfloat16", 1), free={"gpu": 10**6, "host": 10**6})
    assert small.residency is Residency.DISK
    assert plan_of(Settings("host", "bfloat16", 1), free={"host": 10**12}).residency is Residency.DISK


class TestVllm:
    """On the built-in parents, whose model of 2 MB in bfloat16 has a share of the device's memory."""

    def plan_of(self, chimera, **options):
        engine = {"kind": "vllm", "dtype": "bfloat16", "max_tokens": 110, "options": options}
        config = config_of(chimera.sources, engine=engine)
        load, sources = (
            Load(prompt=10, answers=200, evaluations=1000),
            Sources(config, open_checkpoints(config.sources)),
        )
        return partial(make_plan, config, sources, load, python_bytes=10**8, free={"gpu": 10**12})

    def test_takes_its_share_whatever_the_model(self, chimera):
        plan_of = self.plan_of(chimera)
        plan = plan_of(Settings("gpu", "bfloat16", 1, engine="vllm", total=10**9, share=0.5))
        assert sum(item.n_bytes for item in plan.items if "vLLM" in item.what) == 10**9 // 2
        assert plan.total("gpu") - 10**9 // 2 < 9 * 2**20  # a merge; its sources stay on disk
        assert plan.total("mapped") == 2 * stored_bytes(open_checkpoints(chimera.sources)["concise"])
        assert any("reload" in what for what in plan.unknown)

    def test_a_cache_of_a_size_of_its_own_is_that_size(self, chimera, monkeypatch):
        model = model_bytes(open_checkpoints(chimera.sources)["reasoner"], "bfloat16")
        for options, space in (({"kv_cache_memory_bytes": 3 << 30}, ""), ({}, "3")):
            monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
            plan = self.plan_of(chimera, **options)(Settings("host", "bfloat16", 1, engine="vllm", total=10**9))
            assert [item.n_bytes for item in plan.items if "vLLM" in item.what] == [model, 3 << 30]
            assert any("pass" in what for what in plan.unknown)

    def test_ranks_share_the_weights(self, chimera):
        plan = self.plan_of(chimera, tensor_parallel_size=2)(Settings("gpu", "bfloat16", 1, total=10**9, share=0.5))
        assert plan.model == model_bytes(open_checkpoints(chimera.sources)["reasoner"], "bfloat16") // 2

    def test_a_context_that_vllm_is_given_is_the_one_that_answers_must_fit(self, chimera, tmp_path):
        engine = {"kind": "vllm", "max_tokens": 110, "options": {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 20}}
        config = config_of(chimera.sources, engine=engine)
        with pytest.raises(PlanError, match=r"max_tokens is 110, but the model's context has room for 64 tokens"):
            plan_search(config, out=tmp_path)

    @pytest.mark.parametrize("name", ["tensor_parallel_size", "kv_cache_memory_bytes", "gpu_memory_utilization"])
    def test_what_has_to_be_a_number_is_named(self, chimera, tmp_path, name):
        config = config_of(chimera.sources, engine={"kind": "vllm", "max_tokens": 110, "options": {name: "64M"}})
        with pytest.raises(ValueError, match=rf"^engine.options.{name}: expected a number, got '64M'"):
            plan_search(config, out=tmp_path)

    def test_a_share_that_is_too_small_or_too_large_is_refused_with_one_that_fits(self, chimera):
        plan_of, asked = self.plan_of(chimera), Settings("gpu", "bfloat16", 1, engine="vllm", total=10**8, share=0.01)
        with pytest.raises(
            PlanError, match=r"^vLLM: expected at least .*\nengine.options.gpu_memory_utilization: 0.05"
        ):
            check(plan_of, asked, {"gpu": 10**8})
        with pytest.raises(PlanError, match=r"^gpu: expected at most .*\n.*gpu_memory_utilization: 0.9 "):
            check(plan_of, replace(asked, total=10**9, share=0.95), {"gpu": 92 * 10**7})


def test_a_plan_of_this_machine(chimera, tmp_path):
    planned = plan_search(chimera, out=tmp_path / "not" / "there")
    assert planned.plan.fits(planned.free) and replace(planned.settings, total=0, has_avx512=False) == Settings(
        "host", "float32", 32
    )
    lines = list(planned.report(tokens=None))
    assert any("the resident model" in line for line in lines) and "--calibrate" in "".join(lines)
    with pytest.raises(PlanError):
        plan_search(chimera, out=tmp_path, free={"host": 10**6})


@pytest.fixture(scope="module")
def llama_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    base = make_checkpoint(folder / "base", "llama", 0)
    return {"base": base, "a": make_adapter(folder / "a", base, 1), "b": make_checkpoint(folder / "b", "llama", 2)}
