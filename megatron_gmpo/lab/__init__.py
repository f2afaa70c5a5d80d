"""Run studies, which are grids of training runs over several seeds, and report on them.

All runs of a study have equal prompts and budgets.
"""
