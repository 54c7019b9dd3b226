"""Imports go one way, heavy libraries have one home, and tables point at things that exist."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from evo.merge import METHODS
from evo.optimizers import OPTIMIZERS
from fitness.engines import ENGINES
from fitness.graders import GRADERS
from fitness.proxy import ESTIMATORS
from fitness.tasks import TASKS
from search_spaces import SPACES

ROOT = Path(__file__).parent.parent
PACKAGES = ("search_spaces", "fitness", "evo")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
MAY_IMPORT = {
    "search_spaces": {"search_spaces"},
    "fitness": {"fitness"},
    "evo": {"evo", "fitness", "search_spaces"},
}
HOMES = {  # third-party library -> where alone it may be imported
    "cma": "evo/optimizers/",
    "optuna": "evo/optimizers/",
    "moocore": "evo/pareto.py",
    "mlflow": "evo/tracking/mlflow_store.py",
    "matplotlib": "evo/picture.py",
    "rich": ("evo/terminal.py", "evo/cli.py"),
    "typer": "evo/cli.py",
    "pydantic": (
        *("evo/config.py", "evo/config_file.py", "evo/components.py", "evo/reference.py", "evo/cli.py"),
        *("search_spaces/recipe.py", "evo/merge_file.py"),
    ),
    "transformers": "fitness/engines/",
    "vllm": ("fitness/engines/vllm.py", "fitness/engines/vllm_worker.py"),
    "datasets": "fitness/tasks/",
    "lm_eval": "evo/scoring.py",
    "math_verify": "fitness/math_verify.py",
    "reasoning_gym": "fitness/tasks/reasoning_gym.py",
    "sqlite3": "evo/ledger.py",
    "huggingface_hub": "evo/hub.py",
    "docstring_parser": "evo/reference.py",
}


def imports_of(file: Path) -> set[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_layers_and_homes(file):
    imported = imports_of(file)
    package = file.relative_to(ROOT).parts[0]
    assert imported & set(PACKAGES) <= MAY_IMPORT[package]
    place = file.relative_to(ROOT).as_posix()
    for library, home in HOMES.items():
        assert library not in imported or place.startswith(home), f"{library} is imported in {place}"


def test_search_spaces_are_pure_data():
    allowed = set(sys.stdlib_module_names) | {"numpy", "yaml", "pydantic", "annotated_types", "search_spaces"}
    for file in (ROOT / "search_spaces").rglob("*.py"):
        assert imports_of(file) <= allowed, file


@pytest.mark.parametrize("table", [SPACES, TASKS, GRADERS, ENGINES, METHODS, OPTIMIZERS, ESTIMATORS])
def test_tables_name_what_exists_and_say_what_it_is(table):
    for name, target in table.items():
        found = pkgutil.resolve_name(target)
        assert inspect.getdoc(found), f"{name} has no docstring"


def test_help_needs_no_heavy_library():
    code = (
        "import sys, evo.cli\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'optuna', 'cma', 'datasets', 'matplotlib'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
