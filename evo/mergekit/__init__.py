"""mergekit's YAML, read into recipes and written from them: people bring the recipes they have, and take them along.

What is said here of mergekit is of version 0.1.5, and compared with it in experiments/parity.
"""
