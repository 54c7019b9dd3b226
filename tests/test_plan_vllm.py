"""A plan of a search with vLLM, on the built-in parents, whose model of 2 MB in bfloat16 has a share of the memory."""

from dataclasses import replace
from functools import partial

import pytest

from evo.adapter import open_checkpoints
from evo.planning.footprint import model_bytes
from evo.planning.machine import plan_search
from evo.planning.plan import Load, PlanError, Settings, check, make_plan
from evo.planning.sources import Sources
from tests.encoding import stored_bytes
from tests.synthetic import config_of


def planner(chimera, **options):
    engine = {"kind": "vllm", "dtype": "bfloat16", "max_tokens": 110, "options": options}
    config = config_of(chimera.sources, engine=engine)
    load, sources = (
        Load(prompt=10, answers=200, evaluations=1000),
        Sources(config, open_checkpoints(config.sources)),
    )
    return partial(make_plan, config, sources, load, python_bytes=10**8, free={"gpu": 10**12})


def test_takes_its_share_whatever_the_model(chimera):
    plan_of = planner(chimera)
    plan = plan_of(Settings("gpu", "bfloat16", 1, engine="vllm", total=10**9, share=0.5))
    assert sum(item.n_bytes for item in plan.items if "vLLM" in item.what) == 10**9 // 2
    assert plan.total("gpu") - 10**9 // 2 < 9 * 2**20  # a merge; its sources stay on disk
    assert plan.total("mapped") == 2 * stored_bytes(open_checkpoints(chimera.sources)["concise"])
    assert any("reload" in what for what in plan.unknown)


def test_a_cache_of_a_size_of_its_own_is_that_size(chimera, monkeypatch):
    model = model_bytes(open_checkpoints(chimera.sources)["reasoner"], "bfloat16")
    for options, space in (({"kv_cache_memory_bytes": 3 << 30}, ""), ({}, "3")):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
        plan = planner(chimera, **options)(Settings("host", "bfloat16", 1, engine="vllm", total=10**9))
        assert [item.n_bytes for item in plan.items if "vLLM" in item.what] == [model, 3 << 30]
        assert any("pass" in what for what in plan.unknown)


def test_ranks_share_the_weights(chimera):
    plan = planner(chimera, tensor_parallel_size=2)(Settings("gpu", "bfloat16", 1, total=10**9, share=0.5))
    assert plan.model == model_bytes(open_checkpoints(chimera.sources)["reasoner"], "bfloat16") // 2


def test_a_context_that_vllm_is_given_is_the_one_that_answers_must_fit(chimera, tmp_path):
    engine = {"kind": "vllm", "max_tokens": 110, "options": {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 20}}
    config = config_of(chimera.sources, engine=engine)
    with pytest.raises(PlanError, match=r"max_tokens is 110, but the model's context has room for 64 tokens"):
        plan_search(config, out=tmp_path)


@pytest.mark.parametrize("name", ["tensor_parallel_size", "kv_cache_memory_bytes", "gpu_memory_utilization"])
def test_what_has_to_be_a_number_is_named(chimera, tmp_path, name):
    config = config_of(chimera.sources, engine={"kind": "vllm", "max_tokens": 110, "options": {name: "64M"}})
    with pytest.raises(ValueError, match=rf"^engine.options.{name}: expected a number, got '64M'"):
        plan_search(config, out=tmp_path)


def test_a_share_that_is_too_small_or_too_large_is_refused_with_one_that_fits(chimera):
    plan_of, asked = planner(chimera), Settings("gpu", "bfloat16", 1, engine="vllm", total=10**8, share=0.01)
    with pytest.raises(PlanError, match=r"^vLLM: expected at least .*\nengine.options.gpu_memory_utilization: 0.05"):
        check(plan_of, asked, {"gpu": 10**8})
    with pytest.raises(PlanError, match=r"^gpu: expected at most .*\n.*gpu_memory_utilization: 0.9 "):
        check(plan_of, replace(asked, total=10**9, share=0.95), {"gpu": 92 * 10**7})
