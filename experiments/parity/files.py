"""Files of mergekit's YAML that both sides merge, and recipes of ours that are exported as such files.

Models are called by the names of the parents; lora is an adapter.
"""

from search_spaces.layout import Role
from search_spaces.recipe import Rule

FILES = {
    "linear, weights that do not sum to 1": """
merge_method: linear
models:
  - {model: base, parameters: {weight: 2}}
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: [0.5, 2]}}
""",
    "linear, normalize: false": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1.25}}
  - {model: b, parameters: {weight: -0.25}}
parameters: {normalize: false}
""",
    "task_arithmetic, normalize and lambda": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 1.0}}
parameters: {normalize: true, lambda: 0.7}
""",
    "ties, the base among the models, filters": """
merge_method: ties
base_model: base
models:
  - {model: base}
  - {model: a, parameters: {weight: [{filter: self_attn, value: 1.0}, {value: 0.3}], density: [0.3, 0.9]}}
  - {model: b, parameters: {weight: 0.6, density: [{filter: q_proj, value: 0.2}, {filter: mlp, value: [0.4, 0.6]}]}}
parameters: {density: 0.5, int8_mask: true}
""",
    "slerp, the model cards' usual t": """
merge_method: slerp
base_model: base
slices:
  - sources:
      - {model: a, layer_range: [0, 3]}
      - {model: base, layer_range: [0, 3]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
""",
    "slices with models and parameters of their own": """
merge_method: linear
slices:
  - sources:
      - {model: base, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: a, layer_range: [0, 2], parameters: {weight: [0, 3]}}
  - parameters: {weight: 1}
    sources:
      - {model: c, layer_range: [2, 3]}
      - {model: b, layer_range: [2, 3]}
""",
    "passthrough, layers in their place, scaled": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]
""",
    "nuslerp, a base that is only named": """
merge_method: nuslerp
base_model: base
models:
  - {model: a, parameters: {weight: 0.2}}
  - {model: b, parameters: {weight: [0.2, 1]}}
""",
    "nuslerp, no base": """
merge_method: nuslerp
models:
  - {model: a, parameters: {weight: 0.2}}
  - {model: b, parameters: {weight: 0.6}}
""",
    "multislerp, no base": """
merge_method: multislerp
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 2}}
  - {model: c, parameters: {weight: [1, 3]}}
""",
    "breadcrumbs_ties, a gradient of lambda": """
merge_method: breadcrumbs_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.7, density: 0.4, gamma: 0.02}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {density: 0.8, lambda: [0.5, 1.5]}
""",
    "karcher, the base named": "{merge_method: karcher, base_model: base, models: [{model: a}, {model: b}]}",
    "sce, select_topk by filter": """
merge_method: sce
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {select_topk: [{filter: mlp, value: 0.3}]}
""",
    "model_stock": "{merge_method: model_stock, base_model: base, models: [{model: a}, {model: b}]}",
    "nearswap": """
merge_method: nearswap
base_model: base
models: [{model: base}, {model: a}]
parameters: {t: [0.01, 0.03]}
""",
    "task_arithmetic in a module, as mergekit writes it": """
merge_method: task_arithmetic
base_model: base
modules:
  default:
    parameters: {weight: 0.4, lambda: 0.9}
    slices:
      - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
      - sources: [{model: a, layer_range: [2, 3], parameters: {weight: 0.7}}, {model: base, layer_range: [2, 3]}]
parameters: {lambda: 0.1}
""",
    "ties, a donor with an adapter": """
merge_method: ties
base_model: base
models: [{model: a+lora, parameters: {weight: 0.6}}, {model: b, parameters: {weight: 0.5}}]
parameters: {density: 0.5}
""",
    "slerp, a base with an adapter": """
merge_method: slerp
base_model: a+lora
models: [{model: b}]
parameters: {t: [0.2, 0.6]}
""",
}
"""What it shows -> text."""

_BY_PLACE = {
    (0,): {"a": 0.2, "b": 0.5},
    (1,): {"a": 0.0, "b": 1.0},
    (2, -1): {"a": 0.35, "b": 0.25},
}
EXPORTS = {
    f"{method}, by block and role": (
        Rule(method, {"a": 0.7, "b": 0.1}, roles=(Role.NORM,), knobs=knobs),
        *(Rule(method, c, blocks=blocks, knobs=knobs) for blocks, c in _BY_PLACE.items()),
    )
    for method, knobs in {
        "linear": {},
        "task_arithmetic": {},
        "ties": {"density": 0.4, "density:b": 0.7, "lambda": 0.9},
        "breadcrumbs": {"density": 0.6, "gamma": 0.05},
        "multislerp": {},
    }.items()
} | {
    "slerp, by block; the rest untouched": tuple(
        Rule("slerp", {"a": t}, blocks=(i,)) for i, t in enumerate((0.2, 0.9))
    ),
    "ties, one tensor": (Rule("ties", {"a": 0.8}, tensors=("*.1.mlp.up_proj.weight",), knobs={"density": 0.5}),),
}
"""What it shows -> rules of a recipe of base, a and b."""
