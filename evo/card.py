"""The model card of an export: parents, recipe, where each tensor is from, and scores on both splits."""

from __future__ import annotations

from collections.abc import Sequence

from evo.config import Config
from evo.front import Front, Row
from fitness.types import Split
from search_spaces.recipe import Recipe

_MAX_RULES = 40


def model_card(row: Row, recipe: Recipe, front: Front, config: Config, told: Sequence[str], caveat: str | None) -> str:
    """README.md of an exported checkpoint, in Markdown."""
    return f"""{_metadata(recipe)}
# {row.ask.name}: a merge of {" and ".join(config.parents)}

Found by [mergefront](https://pypi.org/project/mergefront/) with `{config.optimizer.kind}` over the space
`{config.space.kind}` (`{config.space.method}`), seed {config.seed}. It is one of {len(front.members)} members of a
Pareto front of accuracy against output tokens; `recipe.yaml` rebuilds it exactly.

## Scores

| model | split | n | accuracy | mean tokens | truncated |
|---|---|---|---|---|---|
{_scores([row, *front.parents])}

The front was chosen on the search split, which flatters its members; the held-out split was never selected on.
Task: `{config.task.kind}`, at most {config.engine.max_tokens} tokens an answer.
{f"{chr(10)}Note: {caveat}.{chr(10)}" if caveat else ""}
{recipe_sections(recipe, told)}"""


def merge_card(recipe: Recipe, name: str, told: Sequence[str]) -> str:
    """README.md of a checkpoint that was merged without a search."""
    return f"""{_metadata(recipe)}
# {name}: a merge of {" and ".join(recipe.sources)}

Written by [mergefront](https://pypi.org/project/mergefront/); `recipe.yaml` rebuilds it exactly.
It has not been scored.

{recipe_sections(recipe, told)}"""


def _metadata(recipe: Recipe) -> str:
    """What the Hub reads of a card: from its parents there it draws the model's family tree."""
    ids = [source.path for source in recipe.sources.values() if source.revision]
    parents = "".join(f"- {name}\n" for name in ids)
    family = f"base_model:\n{parents}base_model_relation: merge\n" if ids else ""
    return f"---\nlibrary_name: transformers\ntags: [merge, mergefront]\n{family}---\n"


def recipe_sections(recipe: Recipe, told: Sequence[str]) -> str:
    """Where the weights come from."""
    parents = "\n".join(
        f"| {name} | `{source.place}`{f', on {source.rests_on}' if source.rests_on else ''} "
        f"| `{(source.digest or 'unknown')[:16]}` |"
        for name, source in recipe.sources.items()
    )
    own_template = ", but for the chat template, which the recipe has" if recipe.chat_template is not None else ""
    return f"""## Sources

| name | checkpoint | content (SHA-256) |
|---|---|---|
{parents}

Tokenizer, chat template, stop tokens and generation config: **{recipe.interface}**{own_template}.

## Recipe

Parts that no rule names are copied from **{recipe.base}**.{f" Stored as {recipe.dtype}." if recipe.dtype else ""}

{_rules(recipe)}

## Tensors

{chr(10).join(f"- {line}" for line in told)}

`accounting.json` lists every tensor with its origin and the BLAKE3 hash of its bytes.
"""


def _scores(rows: list[Row]) -> str:
    lines = []
    for row in {r.ask.id: r for r in rows}.values():
        for split in (Split.SEARCH, Split.HELD_OUT):
            s = row.to_dict(split)
            if s["accuracy"] is not None:
                accuracy = f"{s['accuracy']:.3f} ± {s['accuracy_stderr']:.3f}"
                lines.append(
                    f"| {row.ask.name} | {split} | {s['n_problems']} | {accuracy} "
                    f"| {s['tokens_mean']:.1f} | {s['truncated']:.1%} |"
                )
    return "\n".join(lines)


def _rules(recipe: Recipe) -> str:
    if not recipe.rules:
        return f"None: every tensor is a copy of {recipe.base}."
    if len(recipe.rules) > _MAX_RULES:
        return f"{len(recipe.rules)} rules: see `recipe.yaml`."
    lines = ["| blocks | experts | roles or tensors | method | coefficients | knobs |", "|---|---|---|---|---|---|"]
    for rule in recipe.rules:
        blocks = "all" if rule.blocks is None else ", ".join("outside" if b == -1 else str(b) for b in rule.blocks)
        experts = "all" if rule.experts is None else ", ".join(map(str, rule.experts))
        roles = "all" if rule.roles is None else ", ".join(rule.roles)
        if rule.tensors is not None:
            roles = ", ".join(f"`{name}`" for name in rule.tensors)
        coefficients = ", ".join(f"{name} {value:.3f}" for name, value in rule.coefficients.items())
        knobs = ", ".join(f"{name} {value:g}" for name, value in rule.knobs.items())
        lines.append(f"| {blocks} | {experts} | {roles} | {rule.method} | {coefficients} | {knobs} |")
    return "\n".join(lines)
