"""Decides with few problems what does not need all of them: chosen problems, estimators, racing, a collapse screen.

Knows losses on problems; nothing of genomes, recipes or optimizers. Shapes, in all of its files: P problems of
the split, n of them seen so far, R reference models (parents and a few points between them), M objectives.
"""

ESTIMATORS = {
    "kriging": "fitness.proxy.kriging:Kriging",
    "irt": "fitness.proxy.irt:ItemResponse",
}
"""Name -> class(references, n_parents, objectives): estimates mean losses over the split from some of its problems."""
