"""Tasks: where problems come from and how answers to them are graded. One a file; public ones are presets."""

from fitness.tasks.named import PRESETS

TASKS = {
    "arithmetic": "fitness.tasks.arithmetic:Arithmetic",
    "table": "fitness.tasks.table:Table",
    "mixture": "fitness.tasks.mixture:Mixture",
    "reasoning_gym": "fitness.tasks.reasoning_gym:ReasoningGym",
    **{name: f"fitness.tasks.named:{name}" for name in PRESETS},
}
"""Name -> class; the keyword arguments of its constructor are the config's keys."""
