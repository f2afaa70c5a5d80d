"""The lab: a study is a grid of whole training runs on equal prompts and budgets, repeated over seeds, and a report on them."""
