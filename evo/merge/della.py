"""DELLA (arXiv 2406.11617) as the paper has it: MAGPRUNE, then the sign election and the mean of TIES."""

from dataclasses import replace
from functools import partial

from evo.merge.della_linear import DELLA_LINEAR, della
from evo.merge.task_vectors import switch

DELLA = replace(DELLA_LINEAR, merge=partial(della, elect=True), knobs={**DELLA_LINEAR.knobs, "normalize": switch(True)})
"""Per element only the donors whose sign has the larger weighted mass are averaged."""
