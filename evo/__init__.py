"""THE SEARCH: checkpoints, merging, optimizers, the ledger, the loop, export, tracking and the command.

Joins `search_spaces` (what may vary) and `fitness` (how good it is).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evo.config import Budget
    from evo.search import Search

__all__ = ["Budget", "Search"]


def __getattr__(name: str) -> Any:
    """Load the search only when it is asked for: `import evo.merge` should not pay for it."""
    if name == "Search":
        from evo.search import Search

        return Search
    if name == "Budget":
        from evo.config import Budget

        return Budget
    raise AttributeError(f"module 'evo' has no attribute {name!r}")
