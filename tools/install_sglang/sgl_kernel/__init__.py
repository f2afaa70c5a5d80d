"""Import-time stand-in for SGLang's CPU kernels, which no package index provides.

SGLang 0.5.23 imports some ``*_cpu`` names when it starts. The torch_native attention path calls none of
them. A kernel that is called raises NotImplementedError.
"""

from typing import Any

__version__ = "0.4.10+cpu"


def __getattr__(name: str) -> Any:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def kernel(*_: Any, **__: Any) -> Any:
        # Raise an error rather than guess the results of the GPU kernels.
        raise NotImplementedError(
            f"sgl_kernel.{name} is not part of the CPU installation: "
            "start the server with --attention-backend torch_native"
        )

    return kernel
