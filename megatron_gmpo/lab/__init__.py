"""Studies: grids of training runs with equal prompts and budgets, repeated over seeds, and a report on
them."""
