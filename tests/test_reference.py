"""CONFIG.md and `mergefront options`: all that a config may say."""

import re
from pathlib import Path

import pytest

from evo.components import component_options
from evo.config import Config, OptimizerConfig
from evo.merge import METHODS, get_method
from evo.optimizers import OPTIMIZERS
from evo.reference import reference
from fitness.engines import ENGINES
from fitness.tasks import TASKS
from search_spaces import SPACES
from tests.commands import invoke

CONFIG = Path(__file__).parents[1] / "CONFIG.md"
ROWS = re.findall(r"^\| `(.+?)` \| (.*?) \|(.*)\|$", reference(), re.MULTILINE)


def test_the_file_is_what_the_command_prints():
    result = invoke("options")
    assert result.returncode == 0 and result.stdout == CONFIG.read_text(), "mergefront options > CONFIG.md"


def test_every_key_has_a_meaning():
    assert len(ROWS) > 100
    assert [name for name, _, meaning in ROWS if not meaning.strip() and name not in METHODS] == []


@pytest.mark.parametrize("table", [SPACES, OPTIMIZERS, ENGINES, TASKS])
def test_every_kind_is_there(table):
    kinds = {kind for text in re.findall(r"\{kind: (.+?)\}", reference()) for kind in text.split(" | ")}
    assert kinds >= set(table)


def test_every_section_and_method_is_there():
    text = reference()
    assert all(f"| `{name}` |" in text or f"## `{name}`" in text for name in Config.model_fields)
    for name in METHODS:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert all(f"`{knob}` {k.default:g}" in row for knob, k in get_method(name).knobs.items())


def test_defaults_are_those_that_a_component_gets():
    _, _, rest = reference().partition("{kind: nsga2}")
    shown = {name: default.strip("`") for name, default in re.findall(r"^\| `(\w+)` \| (.*?) \|", rest, re.M)[:4]}
    given = {name: float(value) for name, value in shown.items() if value}
    assert given == {"population": 24, "crossover": 0.9, "eta": 2.0}
    options = {**given, "population": 24}
    component_options(OptimizerConfig(kind="nsga2", **options))  # and they are taken
