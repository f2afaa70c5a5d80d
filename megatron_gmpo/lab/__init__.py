"""Run studies, grids of training runs with equal prompts and budgets over several seeds, and report on them."""
