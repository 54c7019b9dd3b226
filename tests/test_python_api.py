"""What a user of Python says, and what is said back: no file, so places without lines."""

import pytest

import evo
from evo import Budget, Search
from evo.config import Config, ConfigError
from evo.export import ExportError
from tests.conftest import CHIMERA

SAID = {
    "parents": {"reasoner": CHIMERA / "reasoner", "concise": str(CHIMERA / "concise")},
    "task": {"kind": "arithmetic", "search": 8, "reserve": 2, "held_out": 6},
    "engine": {"dtype": "float32", "device": "cpu", "batch_size": 8, "max_tokens": 110, "threads": 1},
    "optimizer": {"kind": "random", "population": 2},
    "budget": {"candidates": 3},
    "tracking": {"enabled": False},
}


@pytest.fixture
def no_model(monkeypatch):
    """What is refused is refused before a model is loaded."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))


def test_a_search_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(CHIMERA)  # paths are relative to the current folder
    search = Search({**SAID, "parents": {"reasoner": "reasoner", "concise": "concise"}}, tmp_path / "run")
    assert search.config.parents == Config.model_validate(SAID).parents
    assert len(search.run().evaluated) == 3
    assert len(search.run(budget={"candidates": 4}).evaluated) == 4
    front = search.run(budget=Budget(candidates=5))
    assert len(front.evaluated) == 5
    member = front.members[-1]
    assert front.pick(member.ask.id) is member
    out = search.export(member.ask.id, tmp_path / "out")
    assert (out / "config.json").is_file()
    assert "no mergekit.yaml: " in (out / "README.md").read_text() and not (out / "mergekit.yaml").exists()  # experts
    head, *lines = repr(front).splitlines()
    assert head.startswith(f"Pareto front: {len(front.members)} of 5 models, hypervolume {front.hypervolume:.4f}")
    assert lines == [repr(row) for row in front.members]
    tokens = f"{member.search.summary['tokens_mean']:.1f}"
    assert lines[-1].split()[:2] == [str(member.ask.id), member.ask.name] and lines[-1].endswith(f"tokens {tokens}")


def test_parents_that_have_moved(own_parents, tmp_path):
    def said(folder):
        return {**SAID, "parents": {name: folder / name for name in ("reasoner", "concise")}}

    search = Search(said(own_parents), tmp_path / "run")
    search.run()
    own_parents.rename(tmp_path / "there")
    with pytest.raises(ExportError, match=r"reasoner \(.*not there any more. If it was moved, change its path"):
        search.export("knee", tmp_path / "out")
    assert len(Search(said(tmp_path / "there"), tmp_path / "run").run().evaluated) == 3
    assert (search.export("knee", tmp_path / "out") / "config.json").is_file()


MISTAKES = {
    "knobs": ({"space": {"method": "ties", "knobs": {"density": [0.1, 7]}}}, r"^space.knobs.density: .*0 to 1, got 7"),
    "option": ({"optimizer": {"kind": "cma_es", "sigma": "wide"}}, r"^optimizer.sigma: .*, got 'wide'$"),
    "kinds": ({"engine": {"batch_size": "many"}}, r"^engine.batch_size: Input .*, got 'many'; or: Input"),
    "key": ({"optimizer": {"kind": "cma_es", "sgma": 1}}, r"^optimizer.sgma: unknown key .*did you mean 'sigma'\?$"),
    "file": ({"task": {"kind": "table", "path": "none.jsonl"}}, r"^task.path: no file at"),
    "memory": ({"engine": {"device": "cpu"}, "memory": {"residency": "pinned"}}, r"^memory.residency: 'pinned' is"),
    "infinite": (
        {"optimizer": {"kind": "cma_es", "sigma": float("inf")}},
        r"^optimizer.sigma: .*finite number, got inf",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_those_of_a_file(mistake, tmp_path):
    changes, said = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=said):
        Search({**SAID, **changes}, tmp_path / "run")
    config = Config.model_validate({**SAID, **changes})  # knows its own keys alone
    with pytest.raises(ConfigError, match=said):
        Search(config, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_what_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match=r"budgets: unknown key .* did you mean 'budget'"):
        Search({**SAID, "budgets": {}}, tmp_path)
    with pytest.raises(ConfigError, match=r"parents.reasoner: no checkpoint folder at"):
        Search({**SAID, "parents": {"reasoner": "nowhere", "concise": CHIMERA / "concise"}}, tmp_path)
    with pytest.raises(
        ConfigError, match=r"expected a Config, or keys .*, got str: a file is read by Search.from_yaml"
    ):
        Search("search.yaml", tmp_path)


BUDGETS = {
    3: r'^budget: expected a Budget or limits such as {"candidates": 400}, got 3$',
    "candidates=3": "got 'candidates=3'",
    (("candidates", 0),): "^budget.candidates: .*greater than or equal to 1, got 0",
    (("candidate", 3),): "^budget.candidate: unknown key 'candidate': .*did you mean 'candidates'",
    (("hours", float("inf")),): "^budget.hours: .*finite number, got inf",
    (): "^budget: expected at least one of candidates, tokens, hours",
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_that_are_none(budget, tmp_path):
    with pytest.raises(ConfigError, match=BUDGETS[budget]):
        Search(SAID, tmp_path / "run").run(budget=dict(budget) if isinstance(budget, tuple) else budget)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
def test_a_watcher_that_nothing_can_call(tmp_path):
    with pytest.raises(TypeError, match=r"watch: expected a function that takes an evo.loop.Progress, got 3"):
        Search(SAID, tmp_path / "run").run(watch=3)


def test_no_other_name():
    with pytest.raises(AttributeError, match="module 'evo' has no attribute 'Serach'"):
        _ = evo.Serach
