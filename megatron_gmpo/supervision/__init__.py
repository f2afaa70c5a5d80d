"""Supervision of one attempt at a run: the run lock, stop requests, heartbeats, the node check and the recorded outcome.

``Attempt`` combines them. Launcher, ranks and tools communicate through files in the run folder (``records.py``).
"""
