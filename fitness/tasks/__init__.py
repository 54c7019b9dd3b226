"""Tasks: where problems come from and how answers to them are graded. One a file."""

TASKS = {
    "arithmetic": "fitness.tasks.arithmetic:Arithmetic",
    "table": "fitness.tasks.table:Table",
}
"""Name -> class; the keyword arguments of its constructor are the config's keys."""
