"""Make ``python -m megatron_gmpo NAME`` equivalent to ``megatron-gmpo NAME``."""

from .commands import main

if __name__ == "__main__":
    main()
