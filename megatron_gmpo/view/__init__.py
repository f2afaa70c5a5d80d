"""The page for a run: curves, samples, tokens and the machine, from the files of run folders alone.

``folder.RunFolder`` answers the page's questions, ``server`` serves them, and ``page`` makes the page with or
without the answers in it. Nothing here writes to a run folder.
"""
