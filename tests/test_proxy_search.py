"""Whole searches with the proxy, beside the same candidates without it."""

from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch

from evo import Search
from evo.config import Budget, ConfigError
from evo.history import History
from evo.ledger import Ledger
from evo.loop import Loop
from evo.terminal import print_status
from evo.tracking.generations import Record
from evo.types import Origin, Status
from fitness.engines.transformers import TransformersEngine
from fitness.types import Split
from tests.conftest import PARENTS
from tests.searching import events

N = 18
TOLERANCE = 0.04


def write_config(folder, *, proxy=None, optimizer="{kind: random}", candidates=13):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"enabled": True, "chosen": 8, "screen": 0, "tolerance": TOLERANCE, "gain": 0, **(proxy or {})}
    (folder / "search.yaml").write_text(f"""\
parents: {{reasoner: {PARENTS}/reasoner, concise: {PARENTS}/concise}}
base: {PARENTS}/base
task: {{kind: arithmetic, search: {N}, reserve: 4, held_out: 4}}
engine: {{dtype: float32, device: cpu, batch_size: 64, max_tokens: 110, threads: 1}}
optimizer: {optimizer}
baselines: {{line_points: 3}}
proxy: {{{", ".join(f"{key}: {str(value).lower()}" for key, value in settings.items())}}}
budget: {{candidates: {candidates}}}
tracking: {{enabled: false}}
seed: 1
""")
    return folder / "search.yaml"


@pytest.fixture(scope="module", autouse=True)
def nothing_held_out():
    """What a search ends with takes as long as the search, and the proxy has no part in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "score_held_out", lambda self, **_: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same random candidates, asked everything and with the proxy."""
    folder = tmp_path_factory.mktemp("proxy")
    found = {}
    for name, proxy in (("full", {"enabled": False}), ("proxy", {"likelihood": True})):
        search = Search.from_yaml(write_config(folder / name, proxy=proxy), folder / name / "run")
        search.run()
        found[name] = search
    return found


@contextmanager
def opened(runs):
    """Name -> history of a run."""
    ledgers = {name: Ledger.open(search.folder, read_only=True) for name, search in runs.items()}
    yield {name: History(ledger) for name, ledger in ledgers.items()}
    for ledger in ledgers.values():
        ledger.close()


@pytest.fixture(scope="module")
def histories(runs):
    with opened(runs) as found:
        yield found


def of_search(history):
    entries = history.entries[Split.SEARCH]
    return [(a, entries[a.id]) for a in history.asks if a.origin is Origin.SEARCH and a.id in entries]


def test_some_are_stopped_and_cost_less(histories):
    stopped = [e for _, e in of_search(histories["proxy"]) if e.status is Status.PARTIAL]
    assert 2 <= len(stopped) < 7
    cost = {
        name: sum(e.summary["n_generated"] for e in history.entries[Split.SEARCH].values())
        for name, history in histories.items()
    }
    assert cost["proxy"] < cost["full"]


def test_what_was_asked_was_answered_as_without_the_proxy(histories):
    """The same answers to the same problems; those of a candidate that was asked everything in the split's order."""
    for ask, entry in of_search(histories["proxy"]):
        whole = histories["full"].score(histories["full"].entries[Split.SEARCH][ask.id])
        score = histories["proxy"].score(entry)
        asked = np.arange(N)
        if entry.status is Status.PARTIAL:
            asked = np.array(entry.detail["problems"])
            assert len(set(asked)) == len(asked) < N
        else:
            samples = [history.entries[Split.SEARCH][ask.id].detail["samples"] for history in histories.values()]
            assert samples[0] == samples[1]
        assert score.problem_ids == tuple(np.array(whole.problem_ids)[asked])
        assert score.verdicts.tolist() == whole.verdicts[asked].tolist()
        assert score.n_tokens.tolist() == whole.n_tokens[asked].tolist()


def test_all_are_asked_the_same_problems_in_the_same_order(histories):
    asked = [e.detail["problems"] for _, e in of_search(histories["proxy"]) if e.status is Status.PARTIAL]
    longest = max(asked, key=len)
    assert all(longest[: len(one)] == one for one in asked)


def test_a_stopped_candidate_is_no_better_than_its_member_and_truly_does_not_beat_it(histories):
    proxy, full = histories["proxy"], histories["full"]
    box = proxy.front.scale.reference
    for ask, entry in of_search(proxy):
        if entry.status is Status.PARTIAL:
            member = proxy.entries[Split.SEARCH][entry.detail["stopped_by"]]
            assert member.status is Status.DONE and member.feasible
            assert (np.array(entry.losses) >= np.array(member.losses)).all()
            truth = np.array(full.entries[Split.SEARCH][ask.id].losses)
            assert (truth >= np.array(member.losses) - TOLERANCE * box - 1e-9).all()


def test_a_stopped_candidate_is_on_no_front_and_on_no_table(histories):
    proxy = histories["proxy"]
    stopped = {ask.id for ask, entry in of_search(proxy) if entry.status is Status.PARTIAL}
    front = proxy.front
    assert not stopped & {row.ask.id for row in (*front.members, *front.evaluated, *front.unscored(every=True))}
    assert {e.summary["n_problems"] for e in (row.search for row in front.members)} == {N}
    assert front.hypervolume >= histories["full"].front.hypervolume - 2 * TOLERANCE  # a strip of the unit box each


def test_the_saving_is_reported(runs, histories, capsys):
    proxy, full = histories["proxy"], histories["full"]
    entries = [e for _, e in of_search(proxy) if e.status is Status.PARTIAL]
    truly = sum(
        full.score(full.entries[Split.SEARCH][e.candidate_id]).n_generated - e.summary["n_generated"] for e in entries
    )
    assert sum(e.n_saved for e in entries) == pytest.approx(truly, rel=0.25)
    print_status(runs["proxy"].folder)
    assert f"{len(entries)} stopped in the race, 0 collapsed" in capsys.readouterr().out
    with closing(Ledger.open(runs["proxy"].folder, read_only=True)) as ledger:
        *_, last = Record.read(ledger).generations()
    assert last.metrics["proxy/stopped"] == len(entries)
    assert last.metrics["proxy/tokens_saved"] == sum(e.n_saved for e in entries)


def test_forced_tokens_are_counted(histories):
    entries = histories["proxy"].entries[Split.SEARCH].values()
    assert sum(e.detail.get("n_forced", 0) for e in entries) > 0
    generated = sum(e.summary["n_generated"] for e in entries)
    assert histories["proxy"].spent["tokens"] == generated + sum(e.detail.get("n_forced", 0) for e in entries)


def test_stopped_and_extended_equals_uninterrupted(tmp_path):
    optimizer = "{kind: cma_es, population: 3}"
    Search.from_yaml(write_config(tmp_path / "whole", optimizer=optimizer), tmp_path / "whole" / "run").run()
    path = write_config(tmp_path / "parts", optimizer=optimizer)
    for n in (7, 9, 13):
        Search.from_yaml(path, tmp_path / "parts" / "run").run(budget=Budget(candidates=n))
    asks, entries, scores = events(tmp_path / "whole" / "run")
    asks_in_parts, entries_in_parts, scores_in_parts = events(tmp_path / "parts" / "run")
    assert any(status is Status.PARTIAL for _, _, status, *_ in entries)
    on_search = [e for e in entries if e[1] is Split.SEARCH]
    assert [e for e in entries_in_parts if e[1] is Split.SEARCH] == on_search
    assert asks_in_parts == asks and set(scores) <= set(scores_in_parts)


def test_a_dead_merge_is_found_by_its_likelihood(runs, histories, monkeypatch, tmp_path):
    """A model of noise: it would talk to the limit, and is asked nothing at all."""
    write = TransformersEngine.update
    calls = []

    def update(self, recipe):
        report = write(self, recipe)
        calls.append(recipe)
        if len(calls) == 9:  # the first candidate after parents (written twice) and baselines
            rng = torch.Generator().manual_seed(0)
            for slot in self.slots().values():
                slot.copy_(torch.randn(slot.shape, generator=rng))
        return report

    monkeypatch.setattr(TransformersEngine, "update", update)
    path = write_config(tmp_path, proxy={"likelihood": True}, candidates=8)
    search = Search.from_yaml(path, tmp_path / "run")
    search.run()
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        dead, alive = [e for e in ledger.entries(Split.SEARCH) if e.candidate_id >= 6]
    assert dead.collapsed and "blind guess" in dead.detail["reason"] and dead.summary is None
    assert dead.losses == (1.0, 110.0) and dead.violations == {"collapsed": 1.0} and dead.n_tokens > 0
    assert not alive.collapsed


def test_a_likelihood_needs_an_engine_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "capabilities", frozenset({"generate"}))
    with pytest.raises(ConfigError, match=r"proxy\.likelihood.*needs logprobs"):
        Search.from_yaml(write_config(tmp_path, proxy={"likelihood": True}), tmp_path / "run")


def test_an_unknown_estimator_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no estimator is called 'kringing'.*expected one of kriging, irt"):
        Search.from_yaml(write_config(tmp_path, proxy={"estimator": "kringing"}), tmp_path / "run")
