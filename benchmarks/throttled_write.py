"""``weights/write_files.py`` on a disk that takes ``BYTES_PER_SECOND``."""

import os
import runpy
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "megatron_gmpo" / "weights" / "write_files.py"

if __name__ == "__main__":
    read, rate = os.preadv, float(os.environ["BYTES_PER_SECOND"])

    def throttled(*arguments: object) -> int:
        count: int = read(*arguments)  # pyright: ignore[reportArgumentType]
        time.sleep(count / rate)  # the time that a disk of this speed needs
        return count

    os.preadv = throttled  # pyright: ignore[reportAttributeAccessIssue]
    runpy.run_path(str(SCRIPT), run_name="__main__")
