"""A plan against arithmetic by hand, against real tensors, and on a machine that is too small."""

from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from evo.adapter import open_checkpoints
from evo.ledger import Ledger
from evo.planning.footprint import model_bytes
from evo.planning.machine import _batch_size, plan_search, ranks_report
from evo.planning.plan import PICTURE_BYTES, Load, PlanError, Settings, check, make_plan, run_bytes
from evo.planning.sources import Sources
from evo.residency import Residency
from evo.types import Candidate, Evaluation, Origin, Status
from fitness.engines.transformers import TransformersEngine
from fitness.types import Score, Split
from search_spaces.recipe import Recipe, Source
from tests.encoding import stored_bytes
from tests.synthetic import config_of


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


def test_a_plan_of_this_machine(chimera, tmp_path):
    planned = plan_search(chimera, out=tmp_path / "not" / "there")
    assert planned.plan.fits(planned.free) and replace(planned.settings, total=0, has_avx512=False) == Settings(
        "host", "float32", 32
    )
    lines = list(planned.report(tokens=None))
    assert any("the resident model" in line for line in lines) and "--calibrate" in "".join(lines)
    with pytest.raises(PlanError):
        plan_search(chimera, out=tmp_path, free={"host": 10**6})
