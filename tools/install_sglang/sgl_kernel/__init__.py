"""Import-time stand-in for SGLang's CPU kernels, which are on no package index.

SGLang 0.5.23 imports some ``*_cpu`` names when it starts; the torch_native attention path calls none of them. One that is called says so.
"""

from typing import Any

__version__ = "0.4.10+cpu"


def __getattr__(name: str) -> Any:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def kernel(*_: Any, **__: Any) -> Any:
        # loud: what a GPU's kernels would compute must never be guessed
        raise NotImplementedError(
            f"sgl_kernel.{name} is not part of the CPU installation: start the server with --attention-backend torch_native"
        )

    return kernel
