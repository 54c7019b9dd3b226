"""A plan against arithmetic by hand, against real tensors, and on a machine that is too small."""

from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from evo.adapter import open_checkpoints
from evo.ledger import Ledger
from evo.planning.footprint import columns, model_bytes
from evo.planning.machine import (
    _batch_size,
    _copied_a_second,
    arrival_bandwidth,
    copy_bandwidth,
    plan_search,
    ranks_report,
)
from evo.planning.plan import PICTURE_BYTES, Load, PlanError, Settings, check, make_plan, run_bytes
from evo.planning.sources import Sources
from evo.planning.times import span
from evo.residency import Residency
from evo.types import Candidate, Evaluation, Origin, Status
from fitness.engines.transformers import TransformersEngine
from fitness.types import Score, Split
from search_spaces.recipe import Recipe, Source
from tests.encoding import stored_bytes
from tests.pretend import GPU
from tests.pretend import gpu as pretended_gpu
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


@pytest.fixture
def gpu_of_a_plan(monkeypatch):
    """Where a plan looks for a GPU, it finds one; of how much memory, it is told."""
    monkeypatch.setattr("evo.planning.machine.device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr("evo.planning.machine.total_bytes", lambda _: 10**12)
    monkeypatch.setattr("evo.planning.machine.copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr("evo.planning.machine.arrival_bandwidth", lambda *_: 1e8)


@pytest.mark.parametrize("residency", ["auto", "device", "pinned", "disk"])
@pytest.mark.parametrize("deltas", ["exact", "int8"])
def test_an_automatic_batch_has_what_sources_leave_of_a_gpu(
    chimera, tmp_path, monkeypatch, gpu_of_a_plan, residency, deltas
):
    """As it does for the engine, which looks when sources are there; on a GPU of 10 GB auto is device."""
    looked, free, checkpoints = [], 10**10, open_checkpoints(chimera.sources)
    monkeypatch.setattr("evo.planning.machine.rows_that_fit", lambda _, n, device: looked.append((n, device.type)) or 1)
    engine, memory = {"batch_size": "auto", "max_tokens": 110}, {"residency": residency, "deltas": deltas}
    config = config_of(chimera.sources, engine=engine, memory=memory)
    planned = plan_search(config, out=tmp_path, free={"gpu": free, "host": free, "disk": free})
    names = ("the checkpoint", "differences")
    kept = sum(i.n_bytes for i in planned.plan.items if i.where == "gpu" and i.what.startswith(names))
    assert looked == [(free - model_bytes(checkpoints["reasoner"], "bfloat16") - kept, "cuda")]
    if deltas == "exact":
        assert kept == (2 * stored_bytes(checkpoints["concise"]) if residency in ("auto", "device") else 0)
    else:
        assert (kept > 0) == (residency in ("auto", "device"))


@pytest.mark.parametrize("residency", ["device", "pinned", "disk"])
def test_sources_that_come_to_a_gpu_take_the_time_of_coming_there(chimera, tmp_path, gpu_of_a_plan, residency):
    """At 0.1 GB a second, where a copy on the GPU has 1 GB: by hand, from a floor of one token an answer."""
    engine = {"dtype": "bfloat16", "batch_size": 256, "max_tokens": 110}
    config = config_of(chimera.sources, engine=engine, memory={"residency": residency})
    planned = plan_search(config, out=tmp_path, free={"gpu": 10**10, "host": 10**10, "disk": 10**10})
    n, plan = 2 * stored_bytes(open_checkpoints(chimera.sources)["concise"]), planned.plan
    assert planned.settings.rows > planned.load.answers  # one batch, whose single step reads the model and the answers
    step = (plan.model + plan.row * planned.settings.rows / 2) / 1e9
    merge = plan.model / 1e9 + (n / 1e9 if residency == "device" else n / 1e8)
    lines = list(planned.report(tokens=1.0))
    assert any(line.startswith(f"a candidate: {span(merge + step)} to ") for line in lines)
    assert any("comes from the host, at 100.0 MB a second" in line for line in lines) == (residency != "device")


def test_a_gpu_copies_more_than_its_cache_holds_if_it_has_room(monkeypatch):
    copied = []
    monkeypatch.setattr("evo.planning.machine._copied_a_second", lambda *a: copied.append(a) or 1.5)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for n_free in (10**11, 2 << 30):
        monkeypatch.setattr("evo.planning.machine.free_bytes", lambda _, n=n_free: n)
        assert copy_bandwidth(gpu) == 3.0
    assert (copy_bandwidth(cpu), arrival_bandwidth(gpu)) == (3.0, 1.5)
    assert copied == [(gpu, gpu, 1 << 30), (gpu, gpu, 1 << 29), (cpu, cpu, 64 << 20), (cpu, gpu, 64 << 20)]


@pytest.mark.parametrize("origin", ["cpu", "cuda"])
def test_what_a_gpu_copies_is_timed_until_it_is_done(monkeypatch, origin):
    """On a clock that a GPU moves on, by 0.5 s for all that it has been asked when Python waits for it."""
    clock = [0.0]
    monkeypatch.setattr("evo.planning.machine.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: clock.__setitem__(0, clock[0] + 0.5))
    with pretended_gpu():
        assert _copied_a_second(GPU if origin == "cuda" else torch.device("cpu"), GPU, 1000) == 16 * 1000 / 0.5


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


@pytest.mark.parametrize(("held_out", "rows", "n_waiting"), [(0, 64, 65), (0, 200, 0), (300, 200, 201), (300, 1, 0)])
def test_a_gpu_has_a_whole_buffer_and_answers_that_wait_beside_it(chimera, held_out, rows, n_waiting):
    """Of 1010 tokens each, in 1515 columns; a single row is the only one of its length. A CPU takes what is used."""
    config = config_of(chimera.sources, engine={"dtype": "bfloat16", "max_tokens": 1000})
    checkpoints = open_checkpoints(chimera.sources)
    load = Load(prompt=10, answers=200, evaluations=1000, held_out=held_out)
    model = checkpoints["reasoner"].config()
    token = 2 * model["num_hidden_layers"] * (model["kv_lora_rank"] + model["qk_rope_head_dim"])
    gpu, host = (
        {item.what: item.n_bytes for item in make_plan(config, sources, load, settings, python_bytes=0).items}
        for sources in [Sources(config, checkpoints)]
        for settings in (Settings(where, "bfloat16", rows) for where in ("gpu", "host"))
    )
    what, waiting = f"cached keys and values of {rows} answers", "cached keys and values of answers that wait"
    assert gpu[what] == rows * 1515 * token and host[what] == rows * columns(10, 1000) * token
    assert sum(n for name, n in gpu.items() if name.startswith(waiting)) == n_waiting * 1010 * token
    assert not any(name.startswith(waiting) for name in host)


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
