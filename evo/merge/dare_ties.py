"""DARE (arXiv 2311.03099) with the sign election of TIES (arXiv 2306.01708)."""

from dataclasses import replace
from functools import partial

from evo.merge.dare_linear import DARE_LINEAR, dare

DARE_TIES = replace(DARE_LINEAR, merge=partial(dare, elect=True))
"""Per element only the donors whose sign has the larger weighted mass are summed."""
