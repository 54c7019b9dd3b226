"""A search whose engine is vLLM, from the config to an export; and what the engine refuses. Skipped without vLLM."""

import dataclasses
import gc
import os
import signal
import time
from contextlib import closing

import pytest
import torch
from transformers import GptOssConfig

from evo.assemble import build_space, open_sources
from evo.ledger import Ledger
from evo.search import Search
from fitness.types import Decoding, Split
from tests.conftest import CONFIGS_OF_ENGINES, make_checkpoint
from tests.engines import OPTIONS, running
from tests.synthetic import config_of
from tests.test_engine import PROMPTS, reference_ids
from tests.test_engine_contract import MANY, export, ids, recipe

pytest.importorskip("vllm")
ENGINE = {"kind": "vllm", "dtype": "float32", "batch_size": 4, "max_tokens": 12, **OPTIONS["vllm"]}
WRONG = {"method": "no such method"}
TASK = {"kind": "arithmetic", "search": 6, "reserve": 2, "held_out": 4}


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    make = CONFIGS_OF_ENGINES["qwen3_moe"]
    return {name: make_checkpoint(folder / name, make(), seed) for seed, name in enumerate("ab")}


def test_a_search_scores_merges_and_its_export_says_the_same(parents, tmp_path):
    config = config_of(
        parents,
        task=TASK,
        engine=ENGINE,
        optimizer={"kind": "cma_es", "population": 4},
        baselines={"average": True},
        constraints={"max_truncated": 1.0},
        budget={"candidates": 6},
        tracking={"enabled": False},
    )
    search = Search(config, tmp_path / "run")
    front = search.run()
    gc.collect()  # vLLM allows one engine at a time
    with closing(Ledger.open(tmp_path / "run", read_only=True)) as ledger:
        entries = ledger.entries(Split.SEARCH)
        ask = ledger.asks()[5]
        assert len(entries) == 6 and all(entry.losses is not None for entry in entries)
        assert "not bit-reproducible" in ledger.meta("caveat")
    assert all(row.held_out is not None for row in front.members)
    search.export("knee", tmp_path / "export")
    assert "not bit-reproducible" in (tmp_path / "export" / "README.md").read_text()
    space = build_space(config, open_sources(config))
    merge = export(ask.recipe_in(lambda: space), parents, tmp_path / "c5")
    samples = next(entry for entry in entries if entry.candidate_id == 5).detail["samples"]
    with running("vllm", merge) as fresh:
        texts = [c.text for c in fresh.generate([s["question"] for s in samples], max_tokens=12)]
    assert texts == [s["completion"] for s in samples]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers want a processor each")
@pytest.mark.parametrize("name", CONFIGS_OF_ENGINES)
def test_two_workers_hold_one_candidate_together(name, tmp_path, monkeypatch):
    """Tensor-parallel: each writes its shards of the live weights, and the text is that of a fresh load."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    parents = {n: make_checkpoint(tmp_path / n, CONFIGS_OF_ENGINES[name](), seed) for seed, n in enumerate("ab")}
    options = {"options": {**OPTIONS["vllm"]["options"], "tensor_parallel_size": 2}}
    with running("vllm", parents["a"], **options) as engine:
        engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
        found = []
        for share in (0.3, 0.8, 0.5):
            engine.update(recipe(parents, share).to_dict())
            found.append(ids(engine))
            with pytest.raises(ValueError, match="no such method"):  # no answer to it is taken for the next one's
                engine.update({**(wrong := recipe(parents, 0.5).to_dict()), "rules": [{**wrong["rules"][0], **WRONG}]})
            assert ids(engine) == found[-1]
    folder = export(recipe(parents, 0.5), parents, tmp_path / "export")
    with running("vllm", folder, **options) as fresh:
        assert ids(fresh) == found[-1] != found[0]
    if name != "deepseek_v3":  # whose text is another in vLLM than in transformers
        assert found[-1] == [reference_ids(folder, prompt, 16)[1] for prompt in PROMPTS]


class Dying:
    """A writer whose second rank is killed in the middle of a merge, while the first has much to do."""

    def __init__(self, slots, *, device):
        self.rank = torch.distributed.get_rank()

    def feed(self, recipe, load):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(1)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers want a processor each")
def test_a_worker_that_is_killed_in_an_update_ends_it_with_an_error_that_says_so(parents, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {**OPTIONS["vllm"]["options"], "tensor_parallel_size": 2}
    with running("vllm", parents["a"], options=options) as engine:
        engine.host("tests.test_vllm:Dying")
        with pytest.raises(RuntimeError, match="a worker process of vLLM has died"):
            engine.update({})
        with pytest.raises(RuntimeError, match="a worker process of vLLM has died"):  # whoever asks next
            engine.generate(PROMPTS, max_tokens=4)


def test_a_collapsed_merge_fails_alone_where_batches_are_scheduled_ahead(tmp_path, monkeypatch):
    """As on GPUs: when logits are found to be NaN, the next batch is on its way."""
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def ahead(config):
        check(config)
        config.scheduler_config.async_scheduling = True  # which is off on CPUs

    monkeypatch.setattr(type(current_platform), check.__name__, staticmethod(ahead))
    parents = {n: make_checkpoint(tmp_path / n, CONFIGS_OF_ENGINES["llama"](), seed) for seed, n in enumerate("ab")}
    with running("vllm", parents["a"]) as engine:
        engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
        engine.update(recipe(parents, 0.3).to_dict())
        before = engine.generate(MANY, max_tokens=12)
        for _ in range(2):
            engine.update(recipe(parents, 3e38).to_dict())
            with pytest.raises(FloatingPointError):
                engine.generate(MANY, max_tokens=12)
            engine.update(recipe(parents, 0.3).to_dict())
            assert engine.generate(MANY, max_tokens=12) == before


def test_a_processor_with_amx_takes_a_kernel_for_mla_whose_weights_can_be_loaded_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    make = CONFIGS_OF_ENGINES["deepseek_v3"]
    parents = {n: make_checkpoint(tmp_path / n, make(), seed) for seed, n in enumerate("ab")}
    with running("vllm", parents["a"]) as engine:
        engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
        engine.update(recipe(parents, 0.5).to_dict())
        found = ids(engine)
    with running("vllm", export(recipe(parents, 0.5), parents, tmp_path / "export")) as fresh:
        assert ids(fresh) == found


def test_weights_that_vllm_loads_at_its_start_alone_are_told_of(tmp_path):
    """gpt-oss: vLLM says that it has loaded them, and computes with those of the candidate before."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"vocab_size": 18, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    config = GptOssConfig(**sizes, **heads, num_local_experts=2, max_position_embeddings=256)
    parents = {n: make_checkpoint(tmp_path / n, config, seed) for seed, n in enumerate("ab")}
    with running("vllm", parents["a"]) as engine:
        engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
        with pytest.raises(RuntimeError, match=r"not loaded 15 weight\(s\) .*model.layers.0.attn.sinks, .*w13_bias"):
            engine.update(recipe(parents, 0.3).to_dict())


def test_arguments_that_vllm_does_not_know_or_that_are_decided_elsewhere_are_refused(parents):
    from fitness.engines.vllm import VllmEngine

    with pytest.raises(ValueError, match=r"options.max_model_length: .* did you mean 'max_model_len'"):
        VllmEngine(str(parents["a"]), options={"max_model_length": 256})
    with pytest.raises(ValueError, match=r"options.max_num_seqs: .* set engine.batch_size"):
        VllmEngine(str(parents["a"]), options={"max_num_seqs": 4})
    with pytest.raises(ValueError, match=r"options.quantization: .* round the weights while it loads them: leave"):
        VllmEngine(str(parents["a"]), options={"quantization": "fp8"})


def test_layers_among_workers_are_refused_on_a_cpu_before_the_load(parents):
    """vLLM would load them, and fail at the first prompt."""
    from fitness.engines.vllm import VllmEngine

    with pytest.raises(ValueError, match=r"options.pipeline_parallel_size: not on a CPU: use tensor_parallel_size"):
        VllmEngine(str(parents["a"]), options={"pipeline_parallel_size": 2})


@pytest.mark.skipif(
    not torch.cuda.is_available() and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="on a CPU vLLM rounds caches with AVX-512",
)
def test_a_cache_that_rounds_is_told_to_readers_of_the_scores(parents):
    options = {**OPTIONS["vllm"]["options"], "kv_cache_dtype": "fp8_e5m2"}
    with running("vllm", parents["a"], options=options) as engine:
        assert "keys and values were cached as fp8_e5m2" in engine.caveat and "not bit-reproducible" in engine.caveat


@pytest.mark.parametrize("temperature", [0.005, 3.0])
def test_a_temperature_that_vllm_does_not_draw_with_is_refused_before_the_load(parents, temperature):
    from fitness.engines.vllm import VllmEngine

    with pytest.raises(ValueError, match=rf"temperature: vLLM follows 0.01 to 2, got {temperature:g}: .*greedy"):
        VllmEngine(str(parents["a"]), decoding=Decoding(greedy=False, temperature=temperature))


def test_the_temperatures_that_are_let_through_are_those_that_vllm_follows():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from fitness.engines.vllm import TEMPERATURES

    low, high = TEMPERATURES
    assert SamplingParams(temperature=low).temperature == low
    assert SamplingParams(temperature=low / 2).temperature != low / 2
    with pytest.raises(VLLMValidationError):
        SamplingParams(temperature=high + 0.1)


def test_arguments_that_are_refused_exist():
    """Else a version of vLLM has renamed one, and the new name would be let through."""
    from vllm import EngineArgs

    from fitness.engines.vllm import VllmEngine

    assert VllmEngine.refused.keys() <= {field.name for field in dataclasses.fields(EngineArgs)}


def test_the_share_that_plans_take_vllm_to_take_is_its_own():
    from vllm.config import CacheConfig

    from fitness.engines.vllm import UTILIZATION

    assert CacheConfig().gpu_memory_utilization == UTILIZATION
