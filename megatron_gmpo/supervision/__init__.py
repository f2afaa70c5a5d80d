"""From the start of an attempt at a run to its end: who may start, when to stop, what every rank does meanwhile, why it ended.

``Attempt`` puts it together. Launcher, ranks and tools tell each other what happens through files of the run folder (``records.py``).
"""
