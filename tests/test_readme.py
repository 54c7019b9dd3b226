"""What the README says is so."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from evo.cli import app
from evo.config import ConfigError
from evo.config_file import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_worked_configs_are_valid(tmp_path):
    text, task_vectors = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    for path in re.findall(r"/models/[\w.-]+", text):
        (tmp_path / path.lstrip("/")).mkdir(parents=True)
    (tmp_path / "search.yaml").write_text(text.replace("/models/", f"{tmp_path}/models/"))
    config = load_config(tmp_path / "search.yaml")
    assert config.space_base == "concise" and config.task.options["search"] == 200
    (tmp_path / "ancestor").mkdir()
    changed = yaml.safe_load(text.replace("/models/", f"{tmp_path}/models/")) | yaml.safe_load(task_vectors)
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({**changed, "base": "ancestor"}))
    config = load_config(tmp_path / "search.yaml")
    assert config.space_base == "base" and set(config.space_donors) == {"reasoner", "concise"}


def test_the_mistake_that_is_shown_is_told_so(tmp_path):
    text, _ = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    for path in re.findall(r"/models/[\w.-]+", text):
        (tmp_path / path.lstrip("/")).mkdir(parents=True)
    text = text.replace("/models/", f"{tmp_path}/models/").replace("kind: cma_es,", "kind: cma_es, sgma: 1,")
    (tmp_path / "search.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "search.yaml")
    said = str(error.value).replace(f"{tmp_path}/", "")
    assert f"`{said}`" in " ".join(README.split())


def test_every_command_is_described_and_no_other():
    commands = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"`mergefront (\w+)", README)) == commands


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "experiments/chimera_mini/README.md", "experiments/proxy/README.md"]
)
def test_files_that_are_named_exist(document):
    folder = (ROOT / document).parent
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (folder / target).exists(), target
    for target in re.findall(r"`((?!\S*NAME)(?:evo|fitness|search_spaces|experiments|tests)/[\w./]+)`", text):
        assert (ROOT / target).exists(), target


def test_the_annotated_tree_names_what_exists():
    (tree,) = re.findall(r"```\n(search_spaces/ .*?)```", README, re.DOTALL)
    folder = ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.split("/")[0]
            continue
        for name in re.findall(r"[\w]+(?:\.py|/)(?=[\s;]|$)", line):
            assert list((ROOT / folder).rglob(name.rstrip("/"))), f"{folder}/{name}"
    patterns = ("search_spaces/*.py", "fitness/*.py", "fitness/*/*.py", "evo/*.py")  # evo's folders are named whole
    files = {file.name for pattern in patterns for file in ROOT.glob(pattern)} - {"__init__.py"}
    assert [name for name in files if not re.search(rf"\b{name}\b", tree)] == []
