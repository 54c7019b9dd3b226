"""Model Breadcrumbs (arXiv 2312.06795) with the sign election of TIES (arXiv 2306.01708)."""

from dataclasses import replace
from functools import partial

from evo.merge.breadcrumbs import BREADCRUMBS, breadcrumbs

BREADCRUMBS_TIES = replace(BREADCRUMBS, merge=partial(breadcrumbs, elect=True))
"""Per element only the donors whose sign has the larger weighted mass are summed."""
