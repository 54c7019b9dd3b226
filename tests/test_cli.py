"""The command as a user types it, its output and its exit codes: in processes, and where none is needed in this one."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from types import SimpleNamespace

import pytest
from rich.console import Console

from evo import Search, terminal
from evo.history import History
from evo.ledger import Ledger
from tests.commands import invoke, mergefront
from tests.conftest import CHIMERA, PARENTS
from tests.searching import write_config


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """One run from start to end."""
    folder = tmp_path_factory.mktemp("cli")
    result = mergefront("run", write_config(folder, candidates=8), "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


def test_run_shows_each_evaluation_and_what_to_do_next(session):
    folder, output = session
    lines = output.splitlines()
    assert sum("accuracy" in line and "held out" not in line and "hypervolume" in line for line in lines) >= 3
    next_time = "the same command with --budget candidates=N, N larger than 8"
    for text in ("reasoner", "concise", "average", "c7", "(held out)", "hypervolume", f"mergefront export {folder}"):
        assert text in output
    assert next_time in output
    assert (folder / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "\x1b" not in output  # no escape codes where nobody looks


def test_front_as_json(session):
    folder, _ = session
    for arguments, split, n in (((), "search", 24), (("--held-out",), "held_out", 40)):
        result = mergefront("front", folder, "--json", *arguments)
        data = json.loads(result.stdout)
        assert [row["name"] for row in data["parents"]] == ["reasoner", "concise"]
        assert [row["name"] for row in data["baselines"]] == ["average"]
        for row in (*data["front"], *data["parents"], *data["baselines"]):
            assert {"id", "name", "accuracy", "accuracy_stderr", "n_problems", "tokens_mean", "truncated"} <= row.keys()
            assert row["split"] == split and row["n_problems"] == n
            assert 0 <= row["accuracy"] <= 1 and 0 <= row["truncated"] <= 1


def test_front_as_table(session):
    result = mergefront("front", session[0], "--held-out", env={"COLUMNS": "80"})
    assert result.returncode == 0, result.stderr
    assert "held-out %" in result.stdout and "reasoner" in result.stdout
    table = [line for line in result.stdout.splitlines() if not line.startswith("hypervolume")]
    assert max(map(len, table)) <= 80


def test_a_narrow_terminal_loses_no_column(session):
    wide, narrow = (mergefront("front", session[0], env={"COLUMNS": columns}).stdout for columns in ("80", "40"))
    assert narrow == wide and "reasoner" in narrow


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_live_table_goes_when_the_last_is_printed(session, monkeypatch, interrupted):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "Console", lambda **_: Console(file=shown, force_terminal=True, width=100))
    with closing(Ledger.open(session[0], read_only=True)) as ledger:
        history = History(ledger)
        event = SimpleNamespace(history=history, entry=history.latest(0))
        with suppress(KeyboardInterrupt), terminal.watching(Search.open(session[0])) as watch:
            watch(event)
            if interrupted:
                raise KeyboardInterrupt
    assert "Pareto front" in shown.getvalue()
    assert shown.getvalue().endswith("\x1b[1A\x1b[2K") is not interrupted  # up a line, and erased


def test_status(session):
    result = mergefront("status", session[0])
    for text in ("finished", "candidates 8 of 8", "evaluated 8, failed 0", "transformers 5"):
        assert text in result.stdout


def test_folders_are_printed_as_they_are_called(session, tmp_path):
    """On one line however long, and with brackets that rich would take for markup."""
    run, out = tmp_path / "runs[v2]", tmp_path / "a[v2]" / ("long" * 30) / "model"
    shutil.copytree(session[0], run)
    assert f"{run}: finished" in invoke("status", run).stdout
    assert f" is in {out}: weights" in invoke("export", run, "--pick", "knee", "--out", out).stdout
    config = session[0].parent / "search.yaml"
    assert f"picture   {run}/front.png" in invoke("run", config, "--out", run).stdout


def test_export(session, tmp_path):
    folder, _ = session
    out = tmp_path / "model"
    result = mergefront("export", folder, "--pick", "max-accuracy", "--out", out)
    assert result.returncode == 0 and (out / "config.json").is_file()
    assert "tensors: " in result.stdout
    again = invoke("export", folder, "--pick", "max-accuracy", "--out", out)
    assert again.returncode == 1 and "--force" in again.stderr


MERGEKIT = """\
merge_method: slerp
base_model: concise
models: [{model: concise}, {model: reasoner}]
parameters:
  t: [{filter: self_attn, value: [0, 1]}, {value: 0.5}]
  int8_mask: true
dtype: bfloat16
"""


def test_merge_reads_mergekits_yaml(tmp_path):
    for name in ("concise", "reasoner"):
        (tmp_path / name).symlink_to(CHIMERA / name)
    (tmp_path / "theirs.yaml").write_text(MERGEKIT)
    result = invoke("merge", tmp_path / "theirs.yaml", "--out", tmp_path / "model")
    assert result.returncode == 0, result.stderr
    for words in ("the merge is in", "parameters.int8_mask: ignored", "merged (slerp)", "no mergekit.yaml: "):
        assert words in result.stdout.replace("\n", " ")
    again = invoke("merge", tmp_path / "model" / "recipe.yaml", "--out", tmp_path / "model")
    assert again.returncode == 1 and "--force" in again.stderr
    (tmp_path / "theirs.yaml").write_text(MERGEKIT.replace("slerp", "slurp"))
    wrong = invoke("merge", tmp_path / "theirs.yaml", "--out", tmp_path / "other")
    assert wrong.returncode == 1 and f"{tmp_path}/theirs.yaml:1: merge_method: 'slurp' is not here" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_stop_ends_a_running_search_and_run_goes_on(tmp_path):
    path, folder = write_config(tmp_path, candidates=5000), tmp_path / "run"
    command = [sys.executable, "-m", "evo.cli", "run", str(path), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    assert "running" in invoke("status", folder).stdout
    busy = invoke("run", path, "--out", folder)
    assert busy.returncode == 1 and f"process {process.pid}" in busy.stderr
    result = mergefront("stop", folder)
    assert result.returncode == 0 and "stopped" in result.stdout
    assert process.wait(timeout=60) == 0
    assert "go on     the same command goes on where this one was stopped" in process.stdout.read()
    assert "stopped" in invoke("status", folder).stdout
    n = json.loads(invoke("front", folder, "--json").stdout)["parents"]
    assert len(n) == 2
    assert "nothing is running" in invoke("stop", folder).stdout


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_interrupts_end_cleanly(tmp_path, sent):
    path, folder = write_config(tmp_path, candidates=5000), tmp_path / "run"
    command = [sys.executable, "-m", "evo.cli", "run", str(path), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    start = time.monotonic()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - start < 30
    assert "goes on" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "{config}", "--out", "{run}", "--budget", "cats=3"], "--budget: expected candidates=N"),
        (["front", "{missing}"], "no run in"),
        (["status", "{missing}"], "no run in"),
        (["stop", "{missing}"], "no run in"),
        (["stop", "{config}"], "no run in"),
        (["export", "{missing}", "--pick", "knee", "--out", "{run}"], "no run in"),
        (["run", "{config}", "--out", "{config}"], "is not a folder: expected a new one"),
        (["run", "{config}", "--out", "{run}", "--budget", "candidates=2,candidates=3"], "each once, above 0"),
        (["plan", "{config}", "--tokens", "inf"], "--tokens: expected at most engine.max_tokens (110), got inf"),
        (["eval", "{run}", "--task", "gsm8k", "--engine", "max_tokens=5"], "say it as --max-tokens"),
        (["eval", "{run}", "--task", "gsm8k", "--limit", "5"], "--limit is for --harness"),
        (["eval", "{parent}", "--task", "arithmetic:helt_out=9"], "did you mean 'held_out'?"),
        (["eval", "{parent}", "--task", "arithmetic", "--engine", "dtyp=float32"], "dtyp: unknown key 'dtyp'"),
        (["eval", "{parent}", "--task", "arithmetic", "--max-tokens", "0"], "max_tokens: Input should be greater"),
        (["eval", "{run}", "--task", 'table:path="x'], "path: expected a number, a word"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(arguments, expected, tmp_path):
    names = {"config": write_config(tmp_path), "run": tmp_path / "run", "missing": tmp_path / "missing"}
    names["parent"] = PARENTS / "concise"
    result = invoke(*(argument.format(**names) for argument in arguments))
    assert result.returncode == 1 and expected in result.stderr


def test_a_bad_config_is_told_before_any_work(tmp_path):
    path = write_config(tmp_path, optimizer="{kind: nsga3}")
    result = mergefront("run", path, "--out", tmp_path / "run")
    assert result.returncode == 1
    assert f"{path}:5: optimizer.kind: no optimizer is called 'nsga3'" in result.stderr
    assert "did you mean 'nsga2'?" in result.stderr
    assert not (tmp_path / "run").exists()


def without_heavy_libraries(*arguments):
    heavy = ("torch", "transformers", "mlflow", "optuna")
    code = "import atexit, sys; from evo.cli import app; "
    code += f"atexit.register(lambda: print([name for name in {heavy} if name in sys.modules])); app(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "[]"
    return result


@pytest.mark.parametrize("command", ["status", "front"])
def test_a_look_at_a_run_imports_nothing_that_takes_a_second(session, command):
    result = without_heavy_libraries(command, session[0])
    assert result.returncode == 0 and "hypervolume" in result.stdout


@pytest.mark.parametrize("command", ["run", "plan", "merge"])
def test_a_file_that_is_not_there_is_told_at_once(command, tmp_path):
    result = without_heavy_libraries(command, tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr == f"error: cannot read {tmp_path}/none.yaml: there is no such file\n"


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["plan"], ["front"], ["export"], ["merge"], ["eval"], ["status"], ["stop"], ["sync"], ["options"]],
)
def test_help_is_worth_reading(command):
    result = invoke(*command, "--help")
    assert result.returncode == 0 and len(result.stdout) > 300


def test_paragraphs_of_help_fill_their_lines():
    result = mergefront("merge", "--help", env={"COLUMNS": "80"})
    assert "over depth or filters, base_model, tokenizer_source. What it cannot do is" in result.stdout


def test_the_live_table_fits_a_terminal_and_shows_orderliness(session):
    result = mergefront("front", session[0], env={"COLUMNS": "80"})
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if not line.startswith("hypervolume")]
    assert max(map(len, table)) <= 80 and "…" not in result.stdout
    assert "rep %" in result.stdout and "waits" in result.stdout
