"""Every mistake is one readable line that names its place in the file."""

import os
import subprocess
import sys

import pytest

from evo.components import component_options
from evo.config import ConfigError, changed_keys
from evo.config_file import load_config
from fitness.engines import ENGINES
from fitness.tasks import TASKS
from fitness.types import Decoding

GOOD = """\
parents:
  reasoner: r
  concise: c
space: {kind: block, roles: [[attention, norm], [ffn]]}
task: {kind: arithmetic, search: 32}
engine: {max_tokens: 64, dtype: float32}
optimizer: {kind: cma_es, sigma: 0.2}
budget: {candidates: 10}
"""


@pytest.fixture
def write(tmp_path):
    for name in ("r", "c", "b"):
        (tmp_path / name).mkdir()

    def write(text):
        (tmp_path / "search.yaml").write_text(text)
        return tmp_path / "search.yaml"

    return write


def test_a_good_file(write, tmp_path):
    config = load_config(write(GOOD))
    assert config.parents == {"reasoner": tmp_path / "r", "concise": tmp_path / "c"}  # relative to the file
    assert (config.space_base, config.space_donors, config.interface_parent) == ("concise", ("reasoner",), "reasoner")
    assert component_options(config.optimizer) == {"sigma": 0.2}


def test_task_arithmetic_starts_from_the_ancestor(write):
    config = load_config(write(GOOD.replace("{kind: block", "{kind: block, method: task_arithmetic") + "base: b\n"))
    assert (config.space_base, config.space_donors) == ("base", ("reasoner", "concise"))


MISTAKES = {  # what is changed -> what the message must hold
    ("budget: {candidates: 10}", "budgt: {candidates: 10}"): ["search.yaml:8", "budgt", "did you mean 'budget'?"],
    ("budget: {candidates: 10}", ""): ["the key 'budget' is missing"],
    ("float32}", "float32, device: cpu}\nmemory: {residency: pinned}"): [
        "search.yaml:7: memory.residency",
        "device, disk",
    ],
    ("sigma: 0.2", "population: .inf"): ["search.yaml:7: optimizer.population: expected a finite number, got inf"],
    ("kind: block,", "kind: block, bounds: [1, 0],"): ["search.yaml:4: space.bounds: expected [low, high] with low"],
    ("budget:", "objectives: [tokens, error]\nbudget:"): ["search.yaml:8: objectives: expected [error, tokens],"],
    ("budget:", "objectives: []\nbudget:"): ["search.yaml:8: objectives: expected [error, tokens], [error]"],
    ("budget:", "seed: 4294967296\nbudget:"): ["search.yaml:8: seed", "less than 4294967296"],
    ("search: 32", "seed: 4294967296"): ["search.yaml:5: task.seed", "less than 4294967296"],
    ("  reasoner: r", "  c4: r"): ["c4: candidates are called so"],
    ("  reasoner: r", "  average: r"): ["average: candidates are called so"],
    ("  reasoner: r", "  knee: r"): ["'knee' is a pick of the front; call this parent something else"],
    ("budget:", "memory: {deltas: int3}\nbudget:"): ["search.yaml:8: memory.deltas", "int8", "got 'int3'"],
    ("budget:", "memory: {deltas: low_rank(5000)}\nbudget:"): ["search.yaml:8: memory.deltas", "up to 2048"],
    ("candidates: 10", "candidates: many"): ["search.yaml:8: budget.candidates", "valid integer", "'many'"],
    ("float32}", "float32, batch_size: many}"): [
        "search.yaml:6: engine.batch_size: Input",
        "got 'many'; or: Input should be 'auto'",
    ],
    ("budget:", "interface: reasonr\nbudget:"): ["search.yaml:8: interface: no parent", "did you mean 'reasoner'?"],
    ("concise: c", "concise: search.yaml"): ["search.yaml:3: parents.concise: ", "search.yaml is a file: expected the"],
    ("concise: c", "concise: ~/no/such/folder"): ["search.yaml:3: parents.concise: no checkpoint folder at /"],
    ("candidates: 10", "candidates: 1.5e0"): ["budget.candidates", "valid integer"],
    ("candidates: 10", "tokens: .inf"): ["budget.tokens", "finite number"],
    ("candidates: 10", "candidates: 0"): ["budget.candidates", "greater than or equal to 1", "got 0"],
    ("{candidates: 10}", "{}"): ["at least one of candidates, tokens, hours"],
    ("kind: cma_es", "kind: cma_ess"): ["search.yaml:7", "line_sweep, got 'cma_ess'; did you mean 'cma_es'?"],
    ("kind: block", "kind: blocks"): ["search.yaml:4", "did you mean 'block'?"],
    ("kind: arithmetic", "kind: gsm9k"): ["search.yaml:5", "no task is called 'gsm9k'", "did you mean 'gsm8k'?"],
    ("sigma: 0.2", "sgma: 0.2"): ["search.yaml:7: optimizer.sgma", "did you mean 'sigma'?"],
    ("sigma: 0.2", "sigma: wide"): ["search.yaml:7: optimizer.sigma", "valid number", "'wide'"],
    ("dtype: float32", "dtipe: float32"): ["search.yaml:6: engine.dtipe", "did you mean 'dtype'?"],
    ("dtype: float32", "dtype: float33"): ["search.yaml:6: engine.dtype", "'float32', 'bfloat16'", "'float33'"],
    ("sigma: 0.2", "sigma: -1"): ["search.yaml:7: optimizer.sigma", "greater than 0", "got -1"],
    ("sigma: 0.2", "population: 1"): ["search.yaml:7: optimizer.population", "greater than or equal to 2"],
    ("search: 32", "search: 0"): ["search.yaml:5: task.search", "greater than or equal to 1", "got 0"],
    ("norm]", "nrm]"): ["search.yaml:4: space.roles", "'attention'", "'nrm'"],
    ("concise: c", "concise: nowhere"): ["search.yaml:3: parents.concise", "no checkpoint folder at"],
    ("concise: c", 'concise: "c\\0"'): ["search.yaml is not valid YAML: a text with a zero in it", "line 3"],
    ("concise: c", f"concise: {'c' * 999}"): [
        "search.yaml:3: parents.concise: no checkpoint folder can be called 'ccc"
    ],
    ("  concise: c\n", ""): ["search.yaml:1: parents: expected at least 2, got 1"],
    ("concise: c", "concise: ./r"): ["search.yaml:3: parents.concise: is 'reasoner' again"],
    ("kind: block,", "kind: block, base: concisse,"): ["no source is called 'concisse'", "did you mean 'concise'?"],
    ("kind: block,", "kind: block, donors: [concise],"): ["cannot be both the base and a donor"],
    ("kind: block,", "kind: block, donors: [reasoner, reasoner],"): [
        "expected each donor once, got reasoner, reasoner"
    ],
    ("roles: [[attention, norm], [ffn]]", "roles: [attention, ffn]"): [
        "search.yaml:4: space.roles.0: expected a list, got 'attention'"
    ],
    ("kind: block,", "kind: block, method: tie,"): ["no merge method is called 'tie'", "did you mean"],
    ("kind: block,", "kind: block, method: ties, knobs: {densty: 1},"): [
        "search.yaml:4: space.knobs.densty: no knob is called 'densty'",
        "did you mean 'density'?",
    ],
    ("kind: block,", "kind: block, method: ties, knobs: {density: [0.2, 1.5]},"): [
        "density",
        "expected 0 to 1, got 1.5",
    ],
    ("kind: block,", "kind: block, method: ties, knobs: {density: [1.0, 0.2]},"): ["density", "low < high"],
    ("kind: block,", "kind: block, method: ties, knobs: {'density:concise': 1},"): ["'concise' is no donor"],
    ("kind: block,", "kind: block, method: ties, knobs: {density: wide},"): ["a number, or [low, high]", "'wide'"],
    ("kind: block,", "kind: block, method: ties, knobs: {density: [1]},"): ["a number, or [low, high]", "[1]"],
    ("kind: block,", "kind: block, knobs: {density: 0.5},"): ["this method has none"],
    ("task: {kind: arithmetic, search: 32}", "task: {kind: table, path: x.jsonl}"): ["task.path", "no file at"],
    ("task: {kind: arithmetic, search: 32}", "task: {kind: mixture, tasks: 2}"): ["search.yaml:5: task.tasks", "got 2"],
    ("{kind: arithmetic, search: 32}", "\n  {kind: mixture, tasks: [\n  {kind: arithmetic, weigth: 2}]}"): [
        "search.yaml:7: task.tasks.0.weigth: unknown key 'weigth': expected one of kind, weight, seed; did you",
    ],
    ("{kind: arithmetic, search: 32}", "\n  {kind: mixture, tasks: [\n  {weight: 2},\n  {kind: table, path: 3}]}"): [
        "search.yaml:7: task.tasks.0.kind: the key 'kind' is missing",
        "search.yaml:8: task.tasks.1.path: Input should be a valid string, got 3",
    ],
    ("{kind: arithmetic, search: 32}", "{kind: mixture, tasks: [{kind: [gsm8k]}]}"): [
        "search.yaml:5: task.tasks.0.kind: Input should be a valid string",
    ],
    ("{kind: arithmetic, search: 32}", "{kind: mixture, tasks: [\n  {kind: arithmetic, weight: 0, search: 5}]}"): [
        "search.yaml:6: task.tasks.0.weight: expected weights above 0, got 0",
        "search.yaml:6: task.tasks.0.search: a mixture shares out its problems by weight: expected `search` beside",
    ],
    ("{kind: arithmetic, search: 32}", "{kind: mixture, tasks: [\n  {kind: arithmetic, weight: true}]}"): ["got True"],
    ("{kind: arithmetic, search: 32}", "{kind: mixture, tasks: [\n  {kind: table, path: x.jsonl}]}"): [
        "search.yaml:6: task.tasks.0.path: no file at ",
    ],
    ("{kind: arithmetic, search: 32}", "{kind: mixture, tasks: [\n  {kind: mixture, tasks: [{kind: gsm8k}]}]}"): [
        "search.yaml:6: task.tasks.0.kind: expected a task of its own",
    ],
    ("budget: {", "orderliness: {correction: {}}\nbudget: {"): [
        "search.yaml:8: orderliness.correction: unknown key 'correction': expected one of ngram, corrections; did you",
    ],
    ("dtype: float32", "decoding: {temprature: 1}"): [
        "search.yaml:6: engine.decoding.temprature: unknown key 'temprature': expected one of samples, greedy,",
        "did you mean 'temperature'?",
    ],
    ("task: {kind: arithmetic, search: 32}", "task: {kind: table}"): ["search.yaml:5: task", "'path' is missing"],
    ("optimizer: {kind: cma_es, sigma: 0.2}", "optimizer:"): ["search.yaml:7: optimizer: expected keys with values"],
    ("dtype: float32", "dtype:"): ["search.yaml:6: engine.dtype", "'float32', 'bfloat16'", "got None"],
    ("parents:", "parents: ["): ["not valid YAML"],
    (GOOD, "just words"): ["expected keys such as parents", "got 'just words'"],
    (GOOD, "# all is to come"): ["expected keys such as parents", "got an empty file"],
    (GOOD, "- parents"): ["expected keys such as parents", "got a list"],
    (GOOD, "a: &a [x]\nb: *c"): ["not valid YAML"],
    (GOOD, "[" * 3000): ["search.yaml is not valid YAML"],
    (GOOD, "!!python/object/apply:os.system ['true']"): ["not valid YAML"],
}


@pytest.mark.parametrize(("change", "expected"), MISTAKES.items(), ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes(write, change, expected):
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD.replace(*change)))
    for text in expected:
        assert text in str(error.value)


def test_several_mistakes_are_told_at_once(write):
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD.replace("sigma: 0.2", "sgma: 1, popultion: 3").replace("concise: c", "concise: gone")))
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def test_a_budget_may_be_said_in_powers_of_ten(write):
    config = load_config(write(GOOD.replace("candidates: 10", "candidates: 1e3, tokens: 2e9, hours: 5e-1")))
    assert config.budget.model_dump() == {"candidates": 1000, "tokens": 2_000_000_000, "hours": 0.5}


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "search.yaml").write_bytes(b"parents: \xff")
    with pytest.raises(ConfigError, match=r"cannot read .*search.yaml: expected text in UTF-8"):
        load_config(tmp_path / "search.yaml")


def test_yaml_is_utf_8_whatever_the_locale_says(write):
    file = write("")
    file.write_text(f"# å\n{GOOD}", encoding="utf-8")
    code = f"from pathlib import Path; from evo.places import read; read(Path({str(file)!r}))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command, env = [sys.executable, "-c", code], {**os.environ, **locale}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


def test_what_may_change_and_what_may_not(write):
    old = load_config(write(GOOD)).model_dump(mode="json")
    safe = GOOD.replace("candidates: 10", "candidates: 99").replace("max_tokens: 64", "max_tokens: 64, threads: 1")
    safe += "tracking: {enabled: false}\nmemory: {residency: disk}\n"
    assert changed_keys(old, load_config(write(safe)).model_dump(mode="json")) == []
    unsafe = GOOD.replace("search: 32", "search: 33").replace("sigma: 0.2", "sigma: 0.3")
    unsafe += "memory: {deltas: int8}\n"
    differences = changed_keys(old, load_config(write(unsafe)).model_dump(mode="json"))
    assert differences == [
        "memory.deltas: 'exact' when the run started, 'int8' now",
        "optimizer.sigma: 0.2 when the run started, 0.3 now",
        "task.search: 32 when the run started, 33 now",
    ]


def test_methods_on_task_vectors_start_from_the_ancestor_too(write):
    knobs = "knobs: {density: [0.2, 1.0], 'density:concise': 1}"
    text = GOOD.replace("{kind: block", f"{{kind: block, method: ties, {knobs}")
    config = load_config(write(text + "base: b\n"))
    assert (config.space_base, config.space.knobs) == ("base", {"density": (0.2, 1.0), "density:concise": 1.0})
    assert changed_keys(config.model_dump(mode="json"), config.model_dump(mode="json")) == []


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ("{samples: 0}", "engine.decoding: decoding.samples: expected 1 to 10000, got 0"),
        ("{temprature: 1}", "temprature"),
        ("{samples: 4, greedy: true}", "would all be the same"),
        ("{temperature: hot}", "'hot'"),
    ],
)
def test_decoding_is_checked(write, decoding, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD.replace("max_tokens: 64", f"max_tokens: 64, decoding: {decoding}")))
    assert message in str(error.value) and "search.yaml:6: engine.decoding" in str(error.value)


def test_decoding_and_orderliness(write):
    text = GOOD.replace("max_tokens: 64", "max_tokens: 64, decoding: {samples: 4, stop: [Q]}, batch_size: auto")
    config = load_config(write(text + "orderliness: {corrections: {mine: [oops]}}\n"))
    assert component_options(config.engine)["decoding"] == Decoding(samples=4, stop=("Q",))
    assert config.orderliness.n_corrections("oops wait") == 1
    assert changed_keys(config.model_dump(mode="json"), config.model_dump(mode="json")) == []


def test_the_likelihood_screen_names_the_engine_that_can(write):
    text = GOOD.replace("max_tokens: 64", "kind: vllm, max_tokens: 64") + "proxy: {enabled: true, likelihood: true}\n"
    with pytest.raises(ConfigError, match=r"proxy.likelihood: .* needs logprobs, .*'vllm' lacks; .*: transformers"):
        load_config(write(text))


def test_what_an_engine_lacks_is_told_when_the_config_is_read(write, monkeypatch):
    from fitness.tasks import TASKS
    from search_spaces import SPACES
    from search_spaces.block import block

    class Deaf:
        """An engine that generates and no more."""

        capabilities = frozenset({"generate"})

        def __init__(self, checkpoint, *, dtype: str = "float32"):
            pass

    class Router(Deaf):
        """An engine that records routing too."""

        capabilities = frozenset({"generate", "routing"})

    class Mute:
        """An engine that does not say what it can do."""

        def __init__(self, checkpoint, *, dtype: str = "float32"):
            pass

    def picky(layout, ingredients):
        """A space that looks at routing."""

    picky.needs = frozenset({"routing"})
    assert not hasattr(block, "needs")
    for name, found in {"deaf": Deaf, "router": Router, "mute": Mute, "picky": picky}.items():
        monkeypatch.setattr(f"tests.{name}", found, raising=False)
    monkeypatch.setitem(ENGINES, "deaf", "tests:deaf")
    monkeypatch.setitem(SPACES, "picky", "tests:picky")
    text = GOOD.replace("{kind: block, roles: [[attention, norm], [ffn]]}", "{kind: picky}")
    text = text.replace("max_tokens: 64", "kind: deaf, max_tokens: 64")
    with pytest.raises(
        ConfigError, match=r"search.yaml:4: space.kind: 'picky' needs routing, .*'deaf' lacks; .*none yet"
    ):
        load_config(write(text))
    monkeypatch.setitem(ENGINES, "router", "tests:router")
    monkeypatch.setitem(ENGINES, "mute", "tests:mute")
    with pytest.raises(ConfigError, match="engines that have it: router"):
        load_config(write(text))
    load_config(write(text.replace("kind: deaf", "kind: router")))
    monkeypatch.setitem(TASKS, "picky", "tests:picky")
    mixture = GOOD.replace("{kind: arithmetic, search: 32}", "{kind: mixture, tasks: [{kind: picky}]}")
    with pytest.raises(ConfigError, match=r"search.yaml:5: task.tasks.0.kind: 'picky' needs routing"):
        load_config(write(mixture))
    with pytest.raises(
        ConfigError, match=r"engine.kind: tests:mute does not say what it can do: expected a class attr"
    ):
        load_config(write(text.replace("kind: deaf", "kind: mute")))


def test_other_engines_are_not_looked_at_where_nothing_is_missing(write, monkeypatch):
    monkeypatch.setitem(ENGINES, "broken", "no.such.module:Engine")
    load_config(write(GOOD))


def test_an_engine_whose_package_is_missing_is_refused_when_the_config_is_read(write, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD.replace("max_tokens: 64", "max_tokens: 64, kind: vllm")))
    expected = "search.yaml:6: engine.kind: engine 'vllm' needs the package vllm: pip install 'mergefront[vllm]'"
    assert expected in str(error.value)


def test_arguments_with_which_vllm_would_score_another_model_are_refused_with_their_line(write):
    options = "kind: vllm, options: {quantization: fp8, max_model_len: 64, kv_offloading_size: 4, dtype: half}"
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD.replace("max_tokens: 64", f"max_tokens: 64, {options}")))
    told = [line for line in str(error.value).splitlines() if "engine.options." in line]
    assert len(told) == 3
    assert "search.yaml:6: engine.options.quantization: what is scored would not be what is exported" in told[0]
    assert "keys and values of the candidate before" in told[1] and "set engine.dtype" in told[2]


def test_an_option_without_a_type_hint_names_its_component(write, monkeypatch):
    class Sums:
        """A task whose author forgot a type."""

        def __init__(self, *, search: int = 5, terms=3):
            pass

    monkeypatch.setattr("tests.sums", Sums, raising=False)
    monkeypatch.setitem(TASKS, "sums", "tests:sums")
    with pytest.raises(ConfigError, match=r"'sums' \(tests:sums\): expected a type hint for the option 'terms'"):
        load_config(write(GOOD.replace("kind: arithmetic, search: 32", "kind: sums")))
