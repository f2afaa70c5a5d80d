"""Supervise one attempt at a run: run lock, stop requests, heartbeats, node check, recorded outcome.

``Attempt`` combines them. Launcher, ranks and tools communicate through files of the run folder
(``records``).
"""
