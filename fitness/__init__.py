"""HOW GOOD a model is: problems, engines that generate, graders, scores, objectives.

Knows prompts and text. Knows nothing of genomes, recipes or `evo`.
"""
