"""Train with each rank on an emulated node: ``python -m tests.support.on_nodes NODES CONFIG.toml ...``.

NODES has one letter for each rank, the name of its node: ``abab`` are two nodes.
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_gmpo.supervision.signals import listen

    listen()

import os
import sys

from megatron_gmpo import train
from megatron_gmpo.run import start_command

if __name__ == "__main__":
    os.environ["SLURMD_NODENAME"] = sys.argv.pop(1)[int(os.environ.get("RANK", "0"))]
    start_command(train.main)
