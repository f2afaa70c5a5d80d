"""``python -m megatron_gmpo NAME`` is ``megatron-gmpo NAME``."""

from .commands import main

if __name__ == "__main__":
    main()
