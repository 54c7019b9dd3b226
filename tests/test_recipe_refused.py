"""Recipes that are refused, mergekit's and ours: the place in the file, and what can be done."""

import pytest

from evo.merge_file import RecipeError


@pytest.fixture
def error(merged):
    def run(text):
        with pytest.raises(RecipeError) as caught:
            merged(text)
        return str(caught.value).partition("recipe.yaml:")[2]

    return run


MODELS = "models: [{model: base, parameters: {weight: 1}}, {model: a, parameters: {weight: 1}}]"
STACK = "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [1, 3]}]}]"


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "line", "place", "words"),
        [
            ("merge_method: linaer", 1, "merge_method", "did you mean 'linear'"),
            ("merge_method: ramplus_tl", 1, "merge_method", "the nearest is ram"),
            ("merge_method: linear", 1, "mergekit", "expected one of models and slices, got neither"),
            (f"merge_method: passthrough\n{STACK}", 2, "slices.1.sources.0.layer_range", "stacking and reordering"),
            (
                "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
                2, "slices.0.sources.0.layer_range", "the slices end at layer 2, the models at 3",
            ),
            (
                "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 3]}\n"
                "  - {model: b, layer_range: [1, 4]}",
                5, "slices.0.sources.1.layer_range", "same layer of the others",
            ),
            (f"merge_method: linear\n{MODELS}\ntokenizer_source: a\ntokenizer: {{source: a}}", 4, "tokenizer",
             "got both"),
            (f"merge_method: linear\n{MODELS}\ntokenizer: base", 3, "tokenizer", "tokenizer_source: MODEL"),
            ("merge_method: TIES", 1, "merge_method", "did you mean 'ties'"),
            ("merge_method: [ties]", 1, "merge_method", "did you mean 'ties'"),
            ("merge_method: linear\nmodels: [a, b]", 2, "models", "- model: FOLDER"),
            ("merge_method: linear\nmodels:\n- {model: nowhere_at_all}", 3, "models.0.model", "no checkpoint folder"),
            ("merge_method: ties\nbase_model: ''", 2, "base_model", "expected a folder"),
            *((f"merge_method: linear\n{MODELS}\nparameters: {{weight: {bad}}}", 3, "parameters.weight", "a number")
              for bad in (".nan", ".inf", "1e39", "nan")),
            (f"merge_method: linear\n{MODELS}\nparameters: {{normalize: 0.5}}", 3, "parameters.normalize",
             "expected true or false"),
            (f"merge_method: linear\n{MODELS}\nparameters: {{int8_mask: maybe}}", 3, "parameters.int8_mask",
             "expected true or false"),
            (f"merge_method: linear\n{MODELS}\nparameters: {{weight: [{{filter: [mlp], value: 1}}]}}", 3,
             "parameters.weight.0.filter", "several entries"),
            ("merge_method: slerp\nbase_model: a\nmodels: [{model: b, parameters: {t: 0.3}}]", 1, "parameters",
             "models.0.parameters.t: ignored, as mergekit does: it belongs to all models"),
            (f"merge_method: linear\n{MODELS}\ndtype: float64", 3, "dtype", "expected one of float32, float16"),
            (f"merge_method: linear\n{MODELS}\nparameters:\n  normalize: false", 2, "models.0.parameters.weight",
             "sum to 2 with normalize: false"),
            (f"merge_method: ties\n{MODELS}", 1, "merge_method", "ties needs a base_model"),
            (f"merge_method: ties\nbase_model: b\n{MODELS}\nparameters: {{rescale: true}}", 4, "parameters.rescale",
             "rescaling is not here"),
            ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", 1, "parameters", "t is missing"),
            ("merge_method: linear\nmodels: [{model: a}, {model: b}]", 2, "models.0.parameters", "weight is missing"),
            (f"merge_method: slerp\nbase_model: b\n{MODELS}\nparameters: {{t: 0.5}}", 3, "models", "expected 2 models"),
            ("merge_method: linear\nmodels:\n- {model: a}\n- {model: a}", 4, "models.1", "a is named twice"),
            *((f"merge_method: linear\nmodels:\n- {{model: {model}}}", 3, "models.0.model", f"MODEL+ADAPTER, got {got}")
              for model, got in (("a+", "'a+'"), ("a+b+c", "'a+b+c'"), ("{model: a, lora: 3}", "{'model': 'a', 'l"))),
            (f"merge_method: linear\n{MODELS}\nmodules: {{default: {{{MODELS}}}}}", 1, "mergekit",
             "got modules and models"),
            (f"merge_method: linear\nmodules:\n  default: {{{MODELS}}}\n  vision: {{{MODELS}}}", 2, "modules",
             "merges of several modules are not here"),
            ("merge_method: linear\nmodules:\n  default:\n    models: []", 3, "modules.default", "got neither"),
            ("merge_method: linear\nmodules:\n  default:\n    models:\n    - {modle: a}", 5, "modules.default.models.0",
             "the key 'model' is missing"),
            ("merge_method: passthrough\nmodules:\n  default:\n    slices:\n"
             "    - sources: [{model: a, layer_range: [0, 2]}]", 5,
             "modules.default.slices.0.sources.0.layer_range", "the slices end at layer 2"),
            (f"merge_method: linear\n{MODELS}\nparameters:\n  weight: [1, {{value: 2}}]", 4, "parameters.weight.0",
             "expected {filter: TEXT, value: NUMBER}"),
            (f"merge_method: linear\n{MODELS}\nparameters: {{weight: much}}", 3, "parameters.weight", "got 'much'"),
            (f"merge_method: ties\nbase_model: b\n{MODELS}\nparameters: {{lambda: -1}}", 4, "parameters",
             "expected 0 to 10"),
            ("merge_method: task_arithmetic\nbase_model: b\nslices: [{sources: [{model: a, layer_range: [0, 3]}]}]",
             3, "slices.0", "the base_model among the sources"),
            ("merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
             "- {model: b, parameters: {weight: -1}}", 3, "models.0.parameters.weight", "sum to 0"),
            ("merge_method: multislerp\nmodels:\n- {model: a, parameters: {weight: 2}}\n"
             "- {model: b, parameters: {weight: -1}}", 3, "models.0.parameters.weight", "a negative weight"),
            ("merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 2}", 4, "parameters",
             "expected 0 to 1, got 2"),
            *((f"merge_method: linear\n{MODELS}\nchat_template: {said}", 3, "chat_template", words) for said, words in (
                ("mistral", "expected auto, chatml, llama3 or a template's text: 'mistral' is no text"),
                ("{text: x}", "is no text of a template (in Jinja)"),
                ('"{% for m in messages %}{{ m }}"', "Unexpected end of template"))),
        ],
    )  # fmt: skip
    def test_with_the_place_and_what_can_be_done(self, error, text, line, place, words):
        message = error(text)
        assert message.startswith(f"{line}: {place}: "), message
        assert words in message

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            *((text, "") for text in ("[]", "a: 1", "{", "version: 2", "version: 1\nsources: []")),
            ("name: one\nmerge_method: ties\n---\nmerge_method: linear", "as mergekit-multi reads them"),
            ("merge_method: linear\nmerge_method: ties", "the key 'merge_method' is there twice"),
            ("dtype: bfloat16\nexperts: [{source_model: a}]", ":2: experts: this is a file of mergekit-moe"),
            ("merge_method: linear\n1: 2", "expected text as a key, got 1"),
            ("merge_method: linear\nmodels: &m [*m]", "an anchor that is part of itself"),
        ],
    )
    def test_files_that_are_no_recipe(self, merged, text, words):
        with pytest.raises(RecipeError, match=rf"recipe\.yaml[\S\s]*{words}"):
            merged(text)

    @pytest.mark.parametrize(
        ("rest", "line", "place", "words"),
        [
            ("rule: []", 5, "rule", "unknown key 'rule': expected one of sources, base, interface, rules"),
            ("rules: {}", 5, "rules", "expected a list, got {}"),
            ("seed: x", 5, "seed", "a valid integer, got 'x'"),
            ("vocabulary: some", 1, "recipe", "expected 'same' or 'common', got 'some'"),
            ('chat_template: "{% else %}"', 5, "chat_template", "Jinja cannot read this template"),
            ("chat_template: chatml", 5, "chat_template", "'chatml' is no text of a template"),
            ("chat_template: [1]", 5, "chat_template", "a valid string"),
            ("rules:\n- {method: linear, coefficients: {c: 1}}", 1, "recipe", "no source is called 'c'"),
            *(
                (f"rules:\n- {{method: linear, coefficients: {{a: 1}}}}\n- {rule}", 7, f"rules.1{place}", words)
                for rule, place, words in (
                    ("linear", "", "expected keys with values, got 'linear'"),
                    ("{method: linear}", ".coefficients", "the key 'coefficients' is missing"),
                    ("{method: linear, coefficients: {a: 1}, role: [ffn]}", ".role", "did you mean 'roles'"),
                    ("{method: linear, coefficients: {a: 1}, roles: [mlp]}", ".roles.0", "'ffn', 'shared_expert'"),
                    ("{method: linear, coefficients: {a: .nan}}", "", "coefficient of a: expected a number"),
                    ('{method: linear, coefficients: {a: "0.5"}}', ".coefficients.a", "a valid number, got '0.5'"),
                    ("{method: linear, coefficients: [1]}", ".coefficients", "expected keys with values, got [1]"),
                    ("{method: [linear], coefficients: {}}", ".method", "a valid string"),
                    ('{method: linear, coefficients: {a: 1}, tensors: "*"}', ".tensors", "a list, got '*'"),
                    ('{method: linear, coefficients: {a: 1}, blocks: "12"}', ".blocks", "a list, got '12'"),
                    ("{method: linear, coefficients: {a: 1}, blocks: [1.5]}", ".blocks.0", "a valid integer"),
                    ("{method: tis, coefficients: {a: 1}}", "", "no merge method is called 'tis'"),
                    ("{method: ties, coefficients: {a: 1}, knobs: {densty: 1}}", "", "did you mean 'density'"),
                    ("{method: ties, coefficients: {a: 1}, knobs: {density: 2}}", "", "expected 0 to 1, got 2"),
                    ("{method: ties, coefficients: {a: 1}, knobs: {density: x}}", ".knobs.density", "got 'x'"),
                )
            ),
        ],
    )
    def test_recipes_of_ours(self, error, rest, line, place, words):
        message = error(
            f"version: 1\nbase: base\ninterface: a\nsources: {{base: {{path: base}}, a: {{path: a}}}}\n{rest}"
        )
        assert message.startswith(f"{line}: {place}: "), message
        assert words in message
