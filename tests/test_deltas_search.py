"""A whole search with compressed donors, beside scores of the donors themselves."""

from contextlib import closing

from evo import Search
from evo.assemble import build_space, build_task, build_worker, open_sources
from evo.config import Budget
from evo.config_file import load_config
from evo.ledger import Ledger
from evo.loop import Loop
from evo.run_folder import request_stop
from evo.types import Candidate, Origin
from fitness.types import Split
from tests.searching import write_config


def test_what_was_searched_with_compressed_donors_is_scored_again_exactly(tmp_path, monkeypatch, caplog):
    path = write_config(tmp_path)
    path.write_text(path.read_text() + "memory: {deltas: int4}\n")
    search = Search.from_yaml(path, tmp_path / "run")
    with monkeypatch.context() as killed:
        killed.setattr(Loop, "_prove", lambda self: None)
        front = search.run()
    assert [message.partition(";")[0] for message in caplog.messages] == ["donors are held as int4"]  # once
    searched = [row for row in front.evaluated if row.ask.origin is Origin.SEARCH]
    assert front.unproven and all(row.ask.origin is not Origin.SEARCH for row in front.members)
    assert all(min(row.search.detail["delta_errors"].values()) > 0.01 for row in searched)
    n_unproven = len(front.unproven)
    search.run(lambda event: request_stop(search.folder))
    assert len(search.front().unproven) == n_unproven - 1
    front = search.run()  # the budget is spent: what is left to do is to prove
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        told, proofs = (
            {e.candidate_id: e for e in ledger.entries(Split.SEARCH)},
            {e.candidate_id: e for e in ledger.later()},
        )
    assert not front.unproven and proofs
    assert all(entry.exact for row in front.members for entry in (row.search, row.held_out))
    assert {row.ask.id for row in front.evaluated if row.ask.origin is Origin.SEARCH} == {r.ask.id for r in searched}
    config = load_config(write_config(tmp_path / "exact"))
    worker, space = build_worker(config, build_task(config), None), build_space(config, open_sources(config))
    for row in [row for row in front.evaluated if row.ask.id in proofs]:
        recipe = row.ask.recipe_in(lambda: space)
        candidate = Candidate(row.ask.id, row.ask.name, row.ask.origin, row.ask.generation, recipe)
        assert row.losses == tuple(worker.evaluate(candidate, Split.SEARCH).losses)
        assert told[row.ask.id].detail["delta_errors"] and not row.search.detail.get("delta_errors")
    front = search.run(budget=Budget(candidates=18))  # the optimizer is told what it was told before
    assert len(front.evaluated) == 18 and not front.unproven
