"""WHAT may vary: layouts of checkpoints, recipes for merging them, and spaces of recipes.

Pure data: numpy, yaml and pydantic, no torch, no files. Knows nothing of `fitness` or `evo`.
"""

SPACES = {
    "line": "search_spaces.line:line",
    "block": "search_spaces.block:block",
    "expert": "search_spaces.expert:expert",
}
"""Name -> factory(layout, ingredients, **options), keyword-only options being the config's keys."""
