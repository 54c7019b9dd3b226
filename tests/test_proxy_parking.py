"""Whole searches whose candidates are parked and asked on, beside the same candidates asked everything."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from evo import Search
from evo.assemble import build_task
from evo.config import Budget
from evo.errors import ResumeError
from evo.history import History
from evo.ledger import Ledger
from evo.proxy import CLOSING, MEANWHILE, Proxy
from evo.run_folder import request_stop
from evo.terminal import print_status
from evo.tracking.generations import Record
from evo.types import Origin, Status
from fitness.objectives import per_problem
from fitness.proxy.irt import ItemResponse
from fitness.proxy.order import choose
from fitness.tasks.arithmetic import Arithmetic, solve
from fitness.types import Split
from tests.searching import events
from tests.test_proxy_search import N, nothing_held_out, of_search, opened, write_config

__all__ = ["nothing_held_out"]  # a fixture

GAIN = 0.002


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same random candidates, asked everything and with parking."""
    folder = tmp_path_factory.mktemp("parking")
    found = {}
    for name, proxy in (("full", {"enabled": False}), ("parked", {"gain": GAIN, "race": False})):
        search = Search.from_yaml(write_config(folder / name, proxy=proxy, candidates=16), folder / name / "run")
        search.run()
        found[name] = search
    return found


@pytest.fixture(scope="module")
def histories(runs):
    with opened(runs) as found:
        yield found


def test_every_candidate_is_parked_first_and_told_by_its_estimate(histories):
    first = [entry for _, entry in of_search(histories["parked"])]
    assert len(first) == 11 and all(entry.parked and len(entry.detail["problems"]) == 8 for entry in first)
    truth = np.array([histories["full"].entries[Split.SEARCH][e.candidate_id].losses for e in first])
    assert np.corrcoef([e.losses[1] for e in first], truth[:, 1])[0, 1] > 0.9


def test_some_go_on_from_where_they_were_and_answer_as_without_the_proxy(histories):
    parked, full = histories["parked"], histories["full"]
    ends = set()
    for id, entry in parked.later.items():
        ends.add(entry.status)
        before, now = parked.score(parked.entries[Split.SEARCH][id]), parked.score(entry)
        whole = full.score(full.entries[Split.SEARCH][id])
        assert set(before.problem_ids) < set(now.problem_ids)
        places = [whole.problem_ids.index(problem) for problem in now.problem_ids]
        assert now.verdicts.tolist() == whole.verdicts[places].tolist()
        assert now.n_tokens.tolist() == whole.n_tokens[places].tolist()
        if entry.status is Status.DONE:
            assert now.problem_ids == whole.problem_ids
            same = full.entries[Split.SEARCH][id]
            assert entry.losses == same.losses and entry.summary == pytest.approx(same.summary, abs=1e-4)
    assert Status.DONE in ends and 0 < len(parked.later) < 10


def test_the_front_is_of_what_answered_everything_and_misses_little(histories):
    front, full = histories["parked"].front, histories["full"].front
    assert {row.search.summary["n_problems"] for row in front.evaluated} == {N}
    found = {row.ask.id: row.losses for row in full.evaluated}
    assert all(row.losses == found[row.ask.id] for row in front.members)
    assert any(row.ask.origin is Origin.SEARCH for row in front.members)
    assert front.hypervolume >= 0.97 * full.hypervolume


def test_by_which_rules_somebody_goes_on(runs, monkeypatch):
    """A spent budget of candidates keeps nobody from it; only tokens and hours are used by it."""
    with opened(runs) as found:
        history = found["parked"]

        def proxy(gain, seed=1, **options):
            config, task = runs["parked"].config, Arithmetic(search=N)
            changes = {"proxy": config.proxy.model_copy(update={"gain": gain, **options}), "seed": seed}
            return Proxy(config.model_copy(update=changes), history, task)

        assert history.share_spent() == 1.0
        assert proxy(GAIN).next_parked(at_the_end=True) is None  # the search went on until nobody promised enough
        history.later.clear()  # as if nobody had gone on
        entry, rules = proxy(1e-9).next_parked(at_the_end=True)
        assert entry.parked and rules.enough == 1e-9
        promised = {}
        for ask, one in of_search(history):
            problems, seen = np.array(one.detail["problems"]), per_problem(history.score(one), rules.objectives)
            mean, deviation = (f(problems, seen)[None] for f in (rules.estimator.estimate, rules.estimator.deviation))
            promised[ask.id] = rules.promise.of(mean, deviation)[0]
        assert promised[entry.candidate_id] == max(promised.values()) > min(promised.values())
        monkeypatch.setattr("evo.proxy.MEANWHILE", 1e-8)
        again, rules = proxy(1e-9).next_parked()
        assert again == entry and rules.enough == 1e-8
        worst = min((row.search.summary for row in history.front.parents), key=lambda s: s["accuracy"])
        floor = worst["accuracy"] - 2 * worst["accuracy_stderr"]
        assert rules.promise.limits == pytest.approx([1 - floor, np.inf])
        traces = proxy(GAIN, likelihood=True).trial().screen.traces
        assert {trace.parent for trace in traces} == {"reasoner", "concise"}
        assert all(trace.text.rpartition("</think>")[2] == str(solve(trace.prompt)) for trace in traces)
        orders = [proxy(GAIN, seed).trial().race.order.problems.tolist() for seed in (1, 2, 1)]
        assert orders[0] == orders[2] != orders[1] and orders[0][:8] == orders[1][:8]  # chosen ones are not drawn


def test_an_estimator_is_told_which_of_the_references_are_parents(runs):
    with opened(runs) as found:
        history, config = found["parked"], runs["parked"].config
        changes = {"proxy": config.proxy.model_copy(update={"estimator": "irt"})}
        rules = Proxy(config.model_copy(update=changes), history, Arithmetic(search=N)).trial()
        rows = (*history.front.parents, *history.front.baselines)
        losses = np.array([per_problem(history.score(row.search), rules.objectives) for row in rows])
        asked = rules.race.order.problems[:8]
        for seen in losses[:, asked]:
            expected = ItemResponse(losses, 2, rules.objectives).estimate(asked, seen)
            assert rules.estimator.estimate(asked, seen) == pytest.approx(expected)


def test_every_answer_is_paid_for_once(histories, capsys, runs):
    history = histories["parked"]
    ids = history.entries[Split.SEARCH]
    assert history.spent["tokens"] == sum(history.score(history.latest(id)).n_generated for id in ids)
    assert history.spent["candidates"] == len(ids) == 16
    assert history.spent["tokens"] < 0.9 * histories["full"].spent["tokens"]
    print_status(runs["parked"].folder)
    left = sum(history.latest(id).parked for id in ids)
    assert f"proxy {left} parked, 0 stopped in the race" in capsys.readouterr().out


def test_the_record_of_generations_ends_with_the_front_and_the_spend(runs, histories):
    with closing(Ledger.open(runs["parked"].folder, read_only=True)) as ledger:
        record = Record.read(ledger)
    *_, last = record.generations()
    front, spent = histories["parked"].front, histories["parked"].spent
    assert last.metrics["front/hypervolume"] == front.hypervolume == record.front.hypervolume
    assert {row.ask.id: row.losses for row in last.front.evaluated} == {r.ask.id: r.losses for r in front.evaluated}
    assert {name: last.metrics[f"budget/{name}"] for name in spent} == pytest.approx(spent) == record.spent
    assert not [generation for generation in record.generations(running=True) if generation.index == last.index]


def test_who_went_on_is_neither_parked_nor_saved_in_the_last_generation_as_in_status(runs, capsys):
    print_status(runs["parked"].folder)
    with closing(Ledger.open(runs["parked"].folder, read_only=True)) as ledger:
        n_first, generations = sum(e.parked for e in ledger.entries(Split.SEARCH)), [*Record.read(ledger).generations()]
    proxy = {name: round(generations[-1].metrics[f"proxy/{name}"]) for name in ("parked", "stopped", "collapsed")}
    assert 0 < proxy["parked"] < n_first
    told = "{parked} parked, {stopped} stopped in the race, {collapsed} collapsed".format(**proxy)
    saved = round(generations[-1].metrics["proxy/tokens_saved"])
    assert f"{told}; about {saved:,} tokens" in capsys.readouterr().out


def test_killed_and_resumed_equals_uninterrupted(tmp_path, runs):
    """Killed right after a candidate went on, and while one does."""

    class KilledError(Exception):
        pass

    path = write_config(tmp_path, proxy={"gain": GAIN, "race": False}, candidates=16)
    search = Search.from_yaml(path, tmp_path / "run")
    n_later = []

    def kill(event):
        if len(event.history.later) > len(n_later):
            n_later.append(len(event.history.later))
            raise KilledError

    for _ in range(20):
        try:
            search.run(kill)
            break
        except KilledError:
            pass
    assert len(n_later) == len(_later(runs["parked"].folder)) > 1
    assert events(search.folder) == events(runs["parked"].folder)
    assert _later(search.folder) == _later(runs["parked"].folder)


def test_who_was_asked_in_another_order_does_not_go_on(runs, monkeypatch):
    """As after an update of numpy: some problems would be asked twice and others never."""
    search = runs["parked"]
    config = search.config.model_copy(update={"proxy": search.config.proxy.model_copy(update={"gain": 1e-12})})
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        history, task = History(ledger), build_task(config)
        assert Proxy(config, history, task).next_parked(at_the_end=True)

        def backwards(*arguments):
            return replace(order := choose(*arguments), problems=order.problems[::-1])

        monkeypatch.setattr("evo.proxy.choose", backwards)
        with pytest.raises(ResumeError, match=r"'c\d+' was asked its problems in another order"):
            Proxy(config, history, task).next_parked(at_the_end=True)


def test_several_samples_a_problem_go_on_and_are_counted_and_likelihoods_asked_once(tmp_path):
    path = write_config(tmp_path, proxy={"gain": GAIN, "race": False, "likelihood": True}, candidates=12)
    path.write_text(
        path.read_text().replace("max_tokens: 110", "max_tokens: 110, decoding: {samples: 2, greedy: false}")
    )
    search = Search.from_yaml(path, tmp_path / "run")
    search.run(lambda event: request_stop(search.folder) if event.history.later else None)
    assert len(_later(search.folder)) == 1
    search.run()
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        first, later = ledger.entries(Split.SEARCH), ledger.later()
        assert all(("n_forced" in entry.detail) == entry.parked for entry in first)
        assert len(later) > 1 and not any("n_forced" in entry.detail for entry in later)
        whole = [entry for entry in later if entry.status is Status.DONE]
        assert whole and all(ledger.score(entry).n_tokens.shape == (N, 2) for entry in whole)
        told = {entry.candidate_id: entry for entry in first if entry.parked}
        for entry in whole:
            truth = entry.summary["n_generated"] - told[entry.candidate_id].summary["n_generated"]
            assert told[entry.candidate_id].n_saved == pytest.approx(truth, rel=0.25)


def test_a_budget_of_tokens_holds_for_parked_candidates_too(tmp_path):
    path = write_config(tmp_path, proxy={"gain": 1e-6, "race": False})
    path.write_text(path.read_text().replace("{candidates: 13}", "{tokens: 17000}"))
    search = Search.from_yaml(path, tmp_path / "run")
    search.run()
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        history, first = History(ledger), ledger.entries(Split.SEARCH)
        later = {entry.seq: entry for entry in ledger.later()}
        costs = sorted((entry.seq, entry.n_tokens) for entry in (*first, *later.values()))
    spent = history.spent["tokens"]
    assert spent - costs[-1][1] < 17000 <= spent  # nothing is begun when it is used up
    promised = {entry.candidate_id: entry.detail.get("promise") for entry in first}  # a front that grows lowers it
    spent, n_closing = 0, 0
    for seq, cost in costs:
        if seq in later:
            n_closing += spent >= (1 - CLOSING) * 17000
            assert promised[later[seq].candidate_id] >= MEANWHILE or spent >= (1 - CLOSING) * 17000
            promised[later[seq].candidate_id] = later[seq].detail.get("promise")
        spent += cost
    assert n_closing


def test_who_goes_on_with_compressed_donors_joins_the_front_by_an_exact_score(tmp_path):
    path = write_config(tmp_path, proxy={"gain": GAIN}, candidates=12)
    path.write_text(path.read_text() + "memory: {deltas: int4}\n")
    search = Search.from_yaml(path, tmp_path / "run")
    front = search.run()
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        later = ledger.later()
    assert not front.unproven and all(row.search.exact for row in front.members)
    found = [row.ask.id for row in front.members if row.ask.origin is Origin.SEARCH]
    assert found and {(id, False) for id in found} < {(e.candidate_id, e.exact) for e in later if e.measured}


def test_an_extended_search_asks_on_who_was_parked_before(tmp_path):
    path = write_config(tmp_path, proxy={"gain": 0.9}, candidates=9)
    search = Search.from_yaml(path, tmp_path / "run")
    search.run()
    assert not _later(search.folder)  # nobody promises nine tenths of the box
    search.run(budget=Budget(candidates=11))
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        assert sum(entry.parked for entry in ledger.entries(Split.SEARCH)) == 6


def test_an_estimate_below_the_accuracy_floor_is_a_violation(histories):
    history = histories["parked"]
    worst = min(row.search.summary["accuracy"] for row in history.front.parents)
    for _, entry in of_search(history):
        low = 1.0 - entry.losses[0] < worst - 2 * max(
            row.search.summary["accuracy_stderr"]
            for row in history.front.parents
            if row.search.summary["accuracy"] == worst
        )
        assert ("accuracy" in entry.violations) == low


def _later(folder):
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        return [(e.candidate_id, e.status, e.losses, e.summary, e.detail.get("problems")) for e in ledger.later()]
