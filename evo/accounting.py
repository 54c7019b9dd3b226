"""Exact accounting: how each tensor of a merged checkpoint came about, and the hash of its bytes.

What no rule selects is passed through, a copy of the base; what a rule gives to one parent alone is copied, bit
for bit (or as what its bits stand for, where those cannot be written, MXFP4 and LoRA, or a recipe has another dtype);
what text does not use is the interface parent's; everything else is merged. Written into an export as accounting.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from evo.checkpoint import Checkpoint
from evo.copies import tied_heads, unscored_copies
from evo.job import Job
from evo.vocabulary import common_rows
from search_spaces.layout import Part
from search_spaces.recipe import Recipe, Rule

ACCOUNTING_FILE = "accounting.json"


class How(StrEnum):
    """How a tensor came about."""

    MERGED = "merged"
    COPIED = "copied"
    """A rule gives it to one source, or its method does once it has measured the sources: its bits."""
    PASSED_THROUGH = "passed through"
    """No rule selects it: the base's bits."""
    UNSCORED = "unscored"
    """Generating text does not use it: the interface parent's bits."""


@dataclass(frozen=True)
class Account:
    """Of one tensor; of several accounts where experts of a packed tensor have rules of their own."""

    how: How
    sources: tuple[str, ...]
    """Whose bits it depends on."""
    methods: tuple[str, ...] = ()
    rules: tuple[int, ...] = ()
    """Positions of its rules in the recipe, from 0."""

    @classmethod
    def joined(cls, accounts: list[Account]) -> Account:
        """Of a tensor, from those of its rows."""
        hows = {account.how for account in accounts}
        sources = tuple(dict.fromkeys(s for a in accounts for s in a.sources))
        methods = tuple(dict.fromkeys(m for a in accounts for m in a.methods))
        rules = tuple(sorted({rule for a in accounts for rule in a.rules}))
        mixed = How.MERGED if How.MERGED in hows or len(sources) > 1 else How.COPIED
        return cls(hows.pop() if len(hows) == 1 and len(sources) == 1 else mixed, sources, methods, rules)


def account(
    recipe: Recipe, sources: Mapping[str, Checkpoint], copied: Mapping[Part, str] | None = None
) -> dict[str, Account]:
    """Tensor of the merged checkpoint's files -> its account.

    They are those of the interface parent; a tensor that is stored as several (FP8) has one account for each.

    Args:
        recipe: what was built.
        sources: name -> checkpoint.
        copied: parts of which a look at their numbers made copies -> whose (see Method.copy_once_measured).
    """
    interface = sources[recipe.interface]
    position = {id(rule): i for i, rule in enumerate(recipe.rules)}
    by_rule = {i: _account(recipe, rule, i) for i, rule in enumerate(recipe.rules)}
    passed = Account(How.PASSED_THROUGH, (recipe.base,))
    found: dict[str, list[Account]] = {}
    for part, rule in recipe.assign(interface.layout).items():
        of = passed if rule is None else by_rule[position[id(rule)]]
        if copied and part in copied:
            of = replace(of, how=How.COPIED, sources=(copied[part],))
        found.setdefault(part.tensor, []).append(of)
    accounts = {name: Account.joined(of) for name, of in found.items()}
    for name in common_rows(sources):
        accounts[name] = _completed(accounts[name], recipe.interface)
    same_as = {**tied_heads(interface), **unscored_copies(interface)}
    unscored = Account(How.UNSCORED, (recipe.interface,))
    return {
        name + suffix: accounts.get(same_as.get(name, name), unscored)
        for name, entry in interface.entries.items()
        for suffix in entry.encoding.output.suffixes
    }


def _completed(account: Account, interface: str) -> Account:
    """Of a tensor that gets rows of the interface parent besides."""
    if interface in account.sources and account.how is not How.MERGED:
        return account
    return replace(account, how=How.MERGED, sources=tuple(dict.fromkeys((*account.sources, interface))))


def _account(recipe: Recipe, rule: Rule, i: int) -> Account:
    job = Job.of(recipe, rule)
    if job.method is None:
        return Account(How.COPIED, job.sources, (), (i,))
    return Account(How.MERGED, tuple(dict.fromkeys(job.sources)), (rule.method,), (i,))


def to_json(accounts: Mapping[str, Account], hashes: Mapping[str, str]) -> str:
    """The text of accounting.json, a line a tensor: how it was made, sources, methods, rules, BLAKE3 of its bytes."""
    tensors = [
        f"  {json.dumps(name)}: {json.dumps({**vars(account), 'blake3': hashes[name]})}"
        for name, account in accounts.items()
    ]
    lines = ",\n".join(tensors)
    return f'{{\n "summary": {json.dumps(summary(accounts))},\n "tensors": {{\n{lines}\n }}\n}}\n'


def summary(accounts: Mapping[str, Account]) -> str:
    """One line, e.g. "30 tensors: 20 merged (linear), 8 copied from a, 2 passed through from base"."""
    counts: Counter[str] = Counter()
    for account in accounts.values():
        if account.how is How.MERGED:
            counts[f"merged ({', '.join(account.methods) or 'rows of several'})"] += 1
        else:
            counts[f"{account.how} from {', '.join(account.sources)}"] += 1
    return f"{len(accounts)} tensors: " + ", ".join(f"{n} {what}" for what, n in counts.most_common())
