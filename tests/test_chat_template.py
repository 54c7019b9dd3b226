"""Chat templates that a recipe brings, rendered by transformers' tokenizer of the result."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from evo.chat_template import put_template
from evo.merge_file import merge
from tests.conftest import tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 1+1 "},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
]
HEAD = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def rendered(folder, **how):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, tokenize=False, **how)


@pytest.mark.parametrize(
    ("said", "text", "asking"),
    [
        (  # https://qwen.readthedocs.io/en/latest/getting_started/concepts.html
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 1+1 <|im_end|>\n"
            "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
        (  # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n1+1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (json.dumps(ROLES), "system: Be brief.\nuser:  1+1 \nassistant: 2\nuser: 2+2\n", ""),
    ],
)
def test_a_merge_has_the_template_that_its_file_says(models, tmp_path, said, text, asking):
    (models / "recipe.yaml").write_text(f"{HEAD}chat_template: {said}\n")
    merge(models / "recipe.yaml", tmp_path / "one")
    assert rendered(tmp_path / "one") == text
    assert rendered(tmp_path / "one", add_generation_prompt=True) == text + asking
    for again in ("recipe.yaml", "mergekit.yaml"):
        merge(tmp_path / "one" / again, tmp_path / again)
        assert rendered(tmp_path / again) == text
    assert "but for the chat template, which the recipe has" in (tmp_path / "one" / "README.md").read_text()


def test_no_other_template_is_left(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text('{"chat_template": "another"}')
    settings = json.loads((said := tmp_path / "tokenizer_config.json").read_text())
    said.write_text(json.dumps({**settings, "chat_template": [{"name": "default", "template": "another"}]}))
    put_template(ROLES, tmp_path)
    assert rendered(tmp_path).startswith("system: Be brief.")
    assert json.loads(said.read_text()) == settings
    assert not (tmp_path / "chat_template.json").exists()


@pytest.mark.parametrize("text", ["{{ raise_exception('roles must alternate') }}", "{{ tools[0].name }}", "{{ 1 / 0 }}",
                                  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                                  "{% generation %}{{ messages[0].content }}{% endgeneration %}"])  # fmt: skip
def test_a_template_is_read_and_not_run(models, tmp_path, text):
    (models / "recipe.yaml").write_text(f"{HEAD}chat_template: {json.dumps(text)}\n")
    merge(models / "recipe.yaml", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text


@pytest.mark.parametrize(
    ("templates", "owner"),
    [
        ({"base": None, "a": ROLES, "b": f"\n{ROLES}\n"}, "a"),  # the ancestor of a base_model has none, as a rule
        ({"base": "{{ 1 }}", "a": ROLES, "b": ROLES}, "a"),
        ({"base": "{{ 1 }}", "a": "{{ 2 }}", "b": "{{ 3 }}"}, "base"),
        ({"base": None, "a": None, "b": "{{ 3 }}"}, "b"),
        ({"base": ROLES, "a": "{{ 2 }}", "b": [{"name": "tool_use", "template": "?"},
                                               {"name": "default", "template": ROLES}]}, "base"),
        ({"base": None, "a": None, "b": None}, "base"),
        ({"base": [3, {"name": "rag"}, {"name": "default", "template": 3}], "a": ROLES, "b": None}, "a"),
    ],
)  # fmt: skip
def test_auto_is_what_most_models_have(models, tmp_path, templates, owner):
    for name, template in templates.items():
        shutil.copytree(models / name, folder := tmp_path / name)
        (folder / "chat_template.jinja").unlink()
        if isinstance(template, list):
            settings = json.loads((said := folder / "tokenizer_config.json").read_text())
            said.write_text(json.dumps({**settings, "chat_template": template}))
        elif template:
            (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.5}\nchat_template: auto\n"
    )
    told = merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert f"chat_template: auto is that of {owner}" in told.lines
    found, wanted = (AutoTokenizer.from_pretrained(tmp_path / name).chat_template for name in ("out", owner))
    assert (found and found.strip()) == (wanted and wanted.strip())
