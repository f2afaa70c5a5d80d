"""``weights/write_files.py``, which writes nothing before the file ``WRITE_AFTER`` exists."""

import os
import runpy
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "megatron_gmpo" / "weights" / "write_files.py"

if __name__ == "__main__":
    deadline = time.monotonic() + 200
    while not os.path.exists(os.environ["WRITE_AFTER"]) and time.monotonic() < deadline:
        time.sleep(0.01)  # interval at which it looks for the file
    runpy.run_path(str(SCRIPT), run_name="__main__")
