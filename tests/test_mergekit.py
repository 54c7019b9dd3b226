"""mergekit's YAML: hand-computed values on tiny checkpoints; mergekit itself is run in experiments/parity."""

import re

import pytest
import torch
import yaml

from evo.merge_file import merge
from evo.mergekit.settings import evaluate
from search_spaces.recipe import Recipe
from tests.adapters import make_adapter
from tests.encoding import files_of

N_LAYERS = 3
ONE_AND_THREE = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 3}}
"""


def expect(merged, models, value_of):
    """Every tensor is what value_of(name, block or None, base, a, b) says."""
    base, a, b = (files_of(models / name) for name in ("base", "a", "b"))
    for name, tensor in merged.items():
        match = re.search(r"layers\.(\d+)\.", name)
        wanted = value_of(name, int(match[1]) if match else None, base[name], a[name], b[name])
        assert torch.allclose(tensor, wanted, rtol=1e-6, atol=1e-7), name


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "t", "expected"),
        [
            (0.3, 0.7, 0.3),
            ("1e-5", 0.7, 1e-5),  # YAML takes it for a text
            ([0.0, 1.0], 0.25, 0.25),
            ([0.0, 0.5, 0.3], 0.75, 0.4),
            ([0.2, 0.8], 1.0, 0.8),
            ([{"filter": "attn", "value": [0, 1]}, {"value": 0.9}], 0.5, 0.5),
            ([{"filter": "mlp", "value": 0.1}, {"value": 0.9}], 0.5, 0.9),
            ([{"filter": "*", "value": 0.1}, {"filter": "attn", "value": 0.9}], 0.5, 0.1),
            ([{"filter": "mlp", "value": 0.1}], 0.5, None),
            ({"filter": "attn", "value": [0, 1]}, 0.25, 0.25),
        ],
    )
    def test_value_at_a_depth(self, setting, t, expected):
        assert evaluate(setting, "layers.1.self_attn.q_proj.weight", t) == pytest.approx(expected)

    @pytest.mark.parametrize("points", [[True, False, True], [1, 0, 1], ["true", "false", "True"], [1.0, 0.0, "1"]])
    def test_truth_values_are_those_of_the_point_before(self, points):
        assert [evaluate(points, "x", t, truth=True) for t in (0.0, 0.4, 0.6, 1.0)] == [1.0, 1.0, 0.0, 1.0]
        assert evaluate([True, 0.5], "x", 0.5) == 0.75  # a number, however it is written


class TestReader:
    def test_linear_normalises_its_weights(self, merged, models):
        out = merged("""
merge_method: linear
models:
  - {model: base, parameters: {weight: 2}}
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
""")
        expect(out, models, lambda n, i, base, a, b: 0.5 * base + 0.25 * a + 0.25 * b)

    def test_task_arithmetic_does_not(self, merged, models):
        out = merged("""
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 1.0}}
parameters: {lambda: 0.5}
""")
        expect(out, models, lambda n, i, base, a, b: base + 0.25 * (a - base) + 0.5 * (b - base))

    def test_normalize_divides_by_the_sum_of_the_weights(self, merged, models):
        out = merged(ONE_AND_THREE + "parameters: {normalize: true}")
        expect(out, models, lambda n, i, base, a, b: base + 0.25 * (a - base) + 0.75 * (b - base))

    def test_slerp_runs_from_the_base_to_the_other(self, merged, models):
        out = merged("""
merge_method: slerp
base_model: b
models: [{model: b}, {model: a}]
parameters: {t: 0.25}
""")

        def slerp(n, i, base, a, b):
            cosine = (a * b).sum() / (a.norm() * b.norm())
            theta = torch.acos(cosine)
            if abs(cosine) > 0.9995:
                return 0.75 * b + 0.25 * a
            return (torch.sin(0.75 * theta) * b + torch.sin(0.25 * theta) * a) / torch.sin(theta)

        expect(out, models, slerp)

    def test_gradients_run_over_the_layers_and_filters_over_names(self, merged, models):
        out = merged("""
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters:
      weight:
        - {filter: q_proj, value: [0.0, 1.0]}
        - {filter: self_attn, value: 0.25}
        - {value: [1.0, 0.0]}
""")

        def value(n, i, base, a, b):
            t = None if i is None else i / (N_LAYERS - 1)
            weight = t if "q_proj" in n else 0.25 if "self_attn" in n else 1.0 if i is None else 1.0 - t
            return base + weight * (a - base)

        expect(out, models, value)

    def test_slices_have_parameters_and_models_of_their_own(self, merged, models):
        out = merged("""
merge_method: linear
slices:
  - sources:
      - {model: base, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: a, layer_range: [0, 2], parameters: {weight: [0, 3]}}
  - parameters: {weight: 1}
    sources:
      - {model: a, layer_range: [2, 3]}
      - {model: b, layer_range: [2, 3]}
""")

        def value(n, i, base, a, b):
            if n == "model.embed_tokens.weight" or i == 0:
                return base
            return 0.25 * base + 0.75 * a if i == 1 else 0.5 * (a + b)

        expect(out, models, value)

    def test_layers_that_keep_their_place_are_no_stack(self, merged, models):
        out = merged("""
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]
""")

        def value(n, i, base, a, b):
            first = i == 0 or "embed" in n
            return a if first else 0.5 * b if "o_proj" in n else b

        expect(out, models, value)

    def test_knobs_of_one_model(self, models, tmp_path):
        (models / "recipe.yaml").write_text("""
merge_method: breadcrumbs_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.5, gamma: 0.02}}
  - {model: b, parameters: {weight: 1.0, density: 1.7, gamma: 0.02}}
parameters: {lambda: 0.9, normalize: true, int8_mask: true, wieght: 3}
out_dtype: float32
tokenizer_source: a
""")
        told = merge(models / "recipe.yaml", tmp_path / "out")
        recipe = Recipe.from_yaml((tmp_path / "out" / "recipe.yaml").read_text())
        assert (recipe.base, recipe.interface) == ("base", "a")
        (rule,) = recipe.rules
        assert (rule.roles, rule.blocks, rule.tensors) == (None, None, None)
        assert rule.method == "breadcrumbs_ties" and rule.coefficients == {"a": 0.5, "b": 1.0}
        assert rule.knobs == {
            "lambda": 0.9, "normalize": 1.0, "density:a": 0.5, "density:b": 1.0, "gamma": 0.02,
        }  # fmt: skip
        assert any("int8_mask: ignored" in line for line in told.lines)
        assert any("wieght: ignored" in line and "did you mean 'weight'" in line for line in told.lines)

    @pytest.mark.parametrize(
        ("source", "interface"), [("a", "a"), ("model:a", "a"), ("base", "base"), ("union", "base")]
    )
    def test_the_tokenizer_of_a_model(self, models, tmp_path, source, interface):
        """ "model:" is how mergekit said it first."""
        head = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 0.5}}]\n"
        (models / "recipe.yaml").write_text(f"{head}tokenizer_source: {source}\n")
        merge(models / "recipe.yaml", tmp_path / "out")
        recipe = Recipe.from_yaml((tmp_path / "out" / "recipe.yaml").read_text())
        assert recipe.interface == ("a" if source[-1] == "a" else "base")

    def test_truth_values_over_the_layers(self, merged, models):
        out = merged(ONE_AND_THREE + "parameters: {normalize: [1, 0]}")

        def value(n, i, base, a, b):
            factor = 1.0 if i == N_LAYERS - 1 else 0.25
            return base + factor * (a - base) + 3 * factor * (b - base)

        expect(out, models, value)

    def test_a_base_that_all_slices_name_is_the_files(self, merged, models):
        out = merged("""
merge_method: task_arithmetic
slices:
  - {base_model: b, sources: [{model: b, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]}
  - {base_model: b, sources: [{model: b, layer_range: [2, 3]}, {model: a, layer_range: [2, 3]}]}
parameters: {weight: 0.25}
""")
        expect(out, models, lambda n, i, base, a, b: b + 0.25 * (a - b))

    @pytest.mark.parametrize(
        ("text", "note"),
        [
            ("models: [{model: a, weight: 0.3}]", "models.0.weight: ignored, as mergekit does: it belongs under param"),
            ("models: [{model: a, layer_range: [0, 1]}]", "models.0.layer_range: ignored"),
            ("models: [{model: a}]\nlambda: 2", "lambda: ignored, as mergekit does: it belongs under parameters"),
            ("models: [{model: base, parameters: {weight: 3}}, {model: a}]", "the base_model has none"),
            ("models: [{model: a, parameters: {weight: [{filter: self_atn, value: 0.1}, {value: 0.5}]}}]",
             "models.0.parameters.weight.0: no tensor's name has 'self_atn' in it"),
            ("models: [{model: a, parameters: {weight: [{value: 0.5}, {filter: mlp, value: 0.1}]}}]",
             "models.0.parameters.weight.1: never asked"),
            ("models: [{model: a}]\ntokenizer_source: union", "union is read as base"),
            ("models: [{model: a}]\nchat_template: auto", "chat_template: auto is that of base"),
        ],
    )  # fmt: skip
    def test_what_is_not_used_is_said(self, models, tmp_path, text, note):
        head = "merge_method: task_arithmetic\nbase_model: base\nx-mine: 3\nparameters: {weight: 0.5}\n"
        (models / "recipe.yaml").write_text(head + text)
        lines = merge(models / "recipe.yaml", tmp_path / "out").lines
        assert any(note in line for line in lines) and not any("x-mine" in line for line in lines)

    @pytest.mark.parametrize(
        ("method", "knobs"),
        [
            ("breadcrumbs", {"gamma": 0.01, "normalize": 0.0}),
            ("breadcrumbs_ties", {"gamma": 0.01, "normalize": 0.0}),
            ("della", {"epsilon": 0.15, "normalize": 1.0, "rescale": 1.0}),
            ("della_linear", {"epsilon": 0.15, "normalize": 0.0, "rescale": 1.0}),
        ],
    )
    def test_mergekits_defaults(self, models, tmp_path, method, knobs):
        text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a, parameters: {{weight: 0.5}}}}]"
        (models / "recipe.yaml").write_text(text)
        merge(models / "recipe.yaml", tmp_path / "out")
        (rule,) = Recipe.from_yaml((tmp_path / "out" / "recipe.yaml").read_text()).rules
        assert rule.knobs == {"lambda": 1.0, "density": 1.0, **knobs}

    def test_a_filter_for_some_tensors_is_not_idle(self, models, tmp_path):
        text = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\n"
        (models / "recipe.yaml").write_text(f"{text}parameters: {{t: [{{filter: mlp, value: 0.1}}, {{value: 0.5}}]}}\n")
        assert not any("no tensor's name" in line for line in merge(models / "recipe.yaml", tmp_path / "out").lines)

    def test_adapters_rest_on_the_base_model(self, models, merged):
        """Also where another model is called "base"."""
        make_adapter(models / "lora", models / "b", 5, target_modules=["q_proj"])
        text = "merge_method: task_arithmetic\nbase_model: b\nparameters: {weight: 1.0}\nmodels:\n- {model: lora}\n"
        alone = merged(text)
        beside = merged(text + "- {model: base, parameters: {weight: 0.0}}\n")
        b = files_of(models / "b")
        assert not torch.equal(
            alone["model.layers.0.self_attn.q_proj.weight"], b["model.layers.0.self_attn.q_proj.weight"]
        )
        assert torch.equal(alone["model.norm.weight"], b["model.norm.weight"])
        assert all(torch.allclose(alone[name], beside[name], atol=1e-7) for name in b)

    def test_a_module_as_mergekit_writes_it(self, models, merged):
        """Its parameters come before the file's."""
        out = merged("""
merge_method: task_arithmetic
modules:
  default:
    parameters: {weight: 0.5, lambda: 0.5}
    slices:
      - {base_model: base, sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]}
      - base_model: base
        parameters: {weight: 1}
        sources: [{model: base, layer_range: [2, 3]}, {model: b, layer_range: [2, 3]}]
parameters: {lambda: 3, normalize: false}
tokenizer: {}
""")

        def value(n, i, base, a, b):
            first = i in (0, 1) or "embed" in n
            return base + 0.25 * (a - base) if first else base + 0.5 * (b - base)

        expect(out, models, value)
        flat = merged(f"{ONE_AND_THREE}parameters: {{lambda: 0.5}}")
        data = yaml.safe_load(ONE_AND_THREE)
        data["modules"] = {"default": {"models": data.pop("models"), "parameters": {"lambda": 0.5}}}
        nested = merged(yaml.safe_dump(data))
        assert all(torch.equal(flat[name], tensor) for name, tensor in nested.items())

    def test_a_mean_closer_than_ours_gets(self, models, merged):
        """Model cards ask for 1200 steps and 1e-10; YAML takes 1e-10 for a text."""
        text = "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: "
        one, two = merged(text + "{max_iter: 1200, tol: 1e-10}"), merged(text + "{max_iter: 1000, tol: 1.0e-9}")
        assert all(torch.equal(one[name], tensor) for name, tensor in two.items())

    def test_few_rules_say_it(self, models, tmp_path):
        (models / "recipe.yaml").write_text("""
merge_method: slerp
base_model: base
models: [{model: base}, {model: a}]
parameters:
  t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: 0.75}, {value: 0.25}]
""")
        merge(models / "recipe.yaml", tmp_path / "out")
        rules = Recipe.from_yaml((tmp_path / "out" / "recipe.yaml").read_text()).rules
        assert {(rule.roles, rule.blocks): rule.coefficients["a"] for rule in rules} == {
            (("attention",), (0,)): 0.0,
            (("attention",), (1,)): 0.5,
            (("attention",), (2,)): 1.0,
            (("ffn",), None): 0.75,
            (("norm",), (0, 1, 2)): 0.25,
            (None, (-1,)): 0.25,
        }
