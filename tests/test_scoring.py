"""`mergefront eval`: any checkpoint folder on any task."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evo.scoring import describe, harness, score_checkpoint
from fitness.tasks.arithmetic import Arithmetic
from fitness.types import Split
from tests.commands import invoke
from tests.conftest import CHIMERA, make_checkpoint
from tests.encoding import to_fp8, values_in
from tests.searching import generate_with_transformers

ENGINE = "dtype=float32,device=cpu,batch_size=16"


def run(*arguments):
    return invoke("eval", *arguments)


def test_figures_are_those_of_plain_transformers():
    result = run(
        CHIMERA / "concise", "--task", "arithmetic:held_out=30", "--engine", ENGINE, "--max-tokens", 110, "--json"
    )
    assert result.returncode == 0, result.stderr
    (figures,) = json.loads(result.stdout)
    questions = [p.question for p in Arithmetic(held_out=30).problems(Split.HELD_OUT)]
    correct, n_tokens = generate_with_transformers(CHIMERA / "concise", questions)
    assert figures["accuracy"] == pytest.approx(correct.mean())
    assert figures["tokens_mean"] == pytest.approx(n_tokens.mean())
    assert figures["accuracy_stderr"] == pytest.approx(correct.std(ddof=1) / 30**0.5)
    assert figures["n_problems"] == 30 and figures["well_formed"] > 0.9 and figures["corrections_per_100"] == 0


def test_a_quantised_checkpoint_scores_as_what_its_numbers_are(tmp_path):
    quantised = to_fp8(CHIMERA / "concise", tmp_path / "fp8")
    plain = Path(shutil.copytree(CHIMERA / "concise", tmp_path / "plain"))
    for file in plain.glob("*.safetensors*"):
        file.unlink()
    tensors = {name: torch.from_numpy(values) for name, values in values_in(quantised).items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    task, engine = [{"kind": "arithmetic", "held_out": 20}], {"dtype": "float32", "device": "cpu", "max_tokens": 110}
    scores = [score_checkpoint(path, task, engine)[0] for path in (quantised, plain)]
    assert scores[0]["accuracy"] > 0.2 and scores[0] == scores[1]


def test_the_verbose_parent_repeats_itself_more(tmp_path):
    task = [{"kind": "arithmetic", "held_out": 20}]
    engine = {"dtype": "float32", "device": "cpu", "max_tokens": 128}
    shares = [score_checkpoint(CHIMERA / p, task, engine)[0]["repeated_ngrams"] for p in ("concise", "reasoner")]
    assert shares[0] < 0.2 < shares[1]


def test_samples_differ_and_a_table_is_printed(tmp_path):
    path = make_checkpoint(tmp_path / "m", "llama", 0)
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**config, "do_sample": True}))
    asked = (path, "--task", "arithmetic:held_out=5", "--engine", ENGINE, "--max-tokens", 20, "--samples", 3)
    result = run(*asked)
    assert result.returncode == 0, result.stderr
    greedy, drawn = run(*asked, "--greedy"), run(CHIMERA / "concise", *asked[1:], "--no-greedy")
    assert greedy.returncode == 1 and "would all be the same" in greedy.stderr
    assert drawn.returncode == 0 and "n = 5 x 3 samples" in drawn.stdout
    for text in ("n = 5 x 3 samples", "accuracy", "median", "p90", "well-formed", "repeated n-grams", "truncated"):
        assert text in result.stdout


def test_splits_and_seeds_are_those_asked_for(tmp_path):
    path = make_checkpoint(tmp_path / "m", "llama", 0)
    task = [{"kind": "arithmetic", "search": 4, "held_out": 6}]
    engine = {"dtype": "float32", "device": "cpu", "max_tokens": 20, "decoding": {"samples": 2, "greedy": False}}
    first, again, other = (score_checkpoint(path, task, engine, split=Split.SEARCH, seed=seed)[0] for seed in (1, 1, 2))
    assert (first["split"], first["n_problems"], first["n_samples"]) == ("search", 4, 2)
    assert first == again != other
    assert score_checkpoint(path, task, engine)[0]["n_problems"] == 6


def test_figures_as_a_table():
    figures = {
        "task": "gsm8k", "split": "held_out", "n_problems": 40, "n_samples": 2, "accuracy": 0.625,
        "accuracy_stderr": 0.0625, "tokens_mean": 80.25, "tokens_mean_stderr": 3.5, "tokens_median": 71.0,
        "tokens_p90": 144.0, "think_tokens_mean": 60.5, "well_formed": 0.95, "repeated_ngrams": 0.125,
        "corrections_per_100": 1.25, "truncated": 0.05, "unparsable": 0.075, "grader_timeouts": 0.025,
    }  # fmt: skip
    assert describe(figures) == (
        "gsm8k (held_out, n = 40 x 2 samples)\n"
        "  accuracy      62.5 ± 6.2 %\n"
        "  tokens        mean 80.2 ± 3.5, median 71, p90 144\n"
        "  thinking      60.5 tokens, 95.0 % well-formed\n"
        "  orderliness   12.5 % repeated n-grams, 1.25 self-corrections per 100 tokens\n"
        "  truncated     5.0 %, without an answer 7.5 %, grader out of time 2.5 %"
    )
    assert describe({**figures, "n_samples": 1}).startswith("gsm8k (held_out, n = 40)\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "expected --task NAME"),
        (["{model}", "--task", "gsm9k"], "did you mean 'gsm8k'?"),
        (["{model}", "--task", "arithmetic:sead=1"], "sead: unknown key 'sead': expected one of kind, search, "),
        (["{model}", "--task", "arithmetic:seed"], "expected key=value"),
        (["{model}", "--task", "arithmetic", "--split", "test"], "expected one of search, reserve, held_out"),
        (["{model}", "--task", "arithmetic", "--engine", "dtype=float33"], "dtype"),
        (["{model}", "--task", "arithmetic", "--samples", "2", "--greedy"], "would all be the same"),
        (["nowhere", "--task", "arithmetic"], "no checkpoint in nowhere"),
        (["{model}", "--task", "aime25:test_path=none.jsonl"], "no such file"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    result = run(*[argument.format(model=CHIMERA / "concise") for argument in arguments])
    assert result.returncode == 1
    assert message in result.stderr


def test_the_harness_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run(CHIMERA / "concise", "--harness", "gsm8k")
    assert result.returncode == 1 and "pip install 'mergefront[harness]'" in result.stderr


def test_the_harness_is_asked_for_the_folder(monkeypatch, tmp_path):
    asked = {}

    def simple_evaluate(**arguments):
        asked.update(arguments)
        if arguments["tasks"] == ["none"]:
            raise KeyError("none")
        return {"results": {"gsm8k": {"exact_match": 0.5}}, "config": object()}

    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate))
    result = run(tmp_path, "--harness", "gsm8k", "--engine", "dtype=float32", "--limit", 3, "--json")
    assert json.loads(result.stdout) == [{"task": "gsm8k", "harness": {"gsm8k": {"exact_match": 0.5}}}]
    assert asked["model_args"] == {"pretrained": str(tmp_path), "dtype": "float32"} and asked["limit"] == 3
    assert "device" not in asked  # automatic, which is the harness's own choice
    run(tmp_path, "--harness", "gsm8k", "--engine", "device=cpu")
    assert (asked["device"], asked["limit"]) == ("cpu", None)
    with pytest.raises(ValueError, match="knows no task 'none'"):
        harness(tmp_path, "none", dtype="float32", device="cpu", limit=None)


def test_the_harness_scores_what_transformers_writes(tmp_path):
    """The real one, on a few problems, against transformers' own generate. Skipped without the extra."""
    pytest.importorskip("lm_eval")
    task = Arithmetic(search=8)
    questions = {task.prompt(problem): problem.answer for problem in task.problems(Split.SEARCH)}
    lines = [json.dumps({"question": q, "answer": a}) for q, a in questions.items()]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    (tmp_path / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "<|begin_of_sentence|><|User|>{{{{question}}}}<|Assistant|>"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 128, do_sample: false}}
filter_list:
- {{name: answer, filter: [{{function: regex, regex_pattern: "</think>([0-9-]+)"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match}}]
""")
    tokenizer = AutoTokenizer.from_pretrained(CHIMERA / "reasoner")
    model = AutoModelForCausalLM.from_pretrained(CHIMERA / "reasoner", dtype="float32")
    right = 0
    for question, answer in questions.items():
        ids = tokenizer(f"<|begin_of_sentence|><|User|>{question}<|Assistant|>", return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(ids, max_new_tokens=128, do_sample=False)[0, ids.shape[1] :])
        right += text.partition("</think>")[2].startswith(f"{answer}<")
    found = harness(CHIMERA / "reasoner", str(tmp_path / "sums.yaml"), dtype="float32", device="cpu", limit=None)
    assert found["sums"]["exact_match,answer"] == right / 8 > 0
