"""Run torchrun so that an error is the last line, and a rank that was killed is named.

Usage, with all options of torchrun::

    megatron-gmpo torchrun --nproc-per-node N -m megatron_gmpo.train CONFIG.toml --section.key value ...
"""

from __future__ import annotations

USAGE = """usage: megatron-gmpo torchrun [OPTIONS] -m megatron_gmpo.train CONFIG.toml [--key VALUE ...]

Run torchrun so that an error is the last line, and a rank that was killed is named. The options are those of
torchrun, which torchrun --help lists."""


def main(argv: list[str]) -> None:
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return

    from ..supervision import torchrun

    torchrun.main(argv)
