"""The declaration of a column of a ``TrainBatch``, and ways to select its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError

Alignment = Literal["predicted", "input", "sequence", "unit", "image"]
"""Whether a row describes a token as a target, a token as an input, a sequence, a unit, or an image.

A unit is a sequence of the loss, which is a whole sequence, or one turn of it (``algorithm.unit``)."""


@dataclass(frozen=True)
class Column:
    """The type and layout of one column.

    A ``TrainBatch`` of S sequences and L tokens stores an "input" or a "predicted" column with L rows, where
    row t describes token t. In a ``Microbatch`` each slot holds an input token and the token it predicts:
    "input" columns follow the former, "predicted" columns the latter.

    Attributes:
        dtype: dtype of the values.
        aligned_to: what one row describes.
        padding: value of a packed slot without such a token, and of the only sequence of a dummy microbatch.
        dims: names of the dimensions after the first; () for one value per row.
        narrow: a second dtype that the values of a ``TrainBatch`` may have, which ``dtype`` includes.
    """

    dtype: torch.dtype
    aligned_to: Alignment
    padding: float = 0
    dims: tuple[str, ...] = ()
    narrow: torch.dtype | None = None

    @property
    def per_layer(self) -> bool:
        """Return whether a row has values for every decoder layer.

        ``pack`` leaves such a column out: ``Routing.cut`` reads the slots and the layers of a rank only.
        """
        return "layers" in self.dims

    def check(self, name: str, values: Tensor, rows: int) -> None:
        """Check dtype, number of rows and number of dimensions of the column called ``name``.

        Raises:
            InputError: one of them differs from this declaration.
        """
        expected = (rows, *self.dims)
        if (
            values.dtype not in (self.dtype, self.narrow)
            or values.shape[:1] != (rows,)
            or values.dim() != len(expected)
        ):
            kind = "token" if self.aligned_to in ("input", "predicted") else self.aligned_to
            raise InputError(
                f"column {name!r} has dtype {values.dtype} and shape {tuple(values.shape)}, "
                f"not {self.dtype} and ({', '.join(map(str, expected))}): give it one row per {kind}"
            )


def column(dtype: torch.dtype, aligned_to: Alignment, **others: Any) -> dict[str, Column]:
    """Return the metadata of a field that is a column; see ``Column`` for the arguments."""
    return {"column": Column(dtype, aligned_to, **others)}


def ranges(first: Tensor, sizes: Tensor) -> Tensor:
    """Return the concatenation of the ranges ``first[i]`` to ``first[i] + sizes[i] - 1``, int64."""
    shift = torch.repeat_interleave(first - (sizes.cumsum(0) - sizes), sizes)
    return shift + torch.arange(len(shift), device=shift.device)


def take(values: Tensor, index: Tensor, padding: float = 0) -> Tensor:
    """Return ``values`` at ``index``, and ``padding`` where the index is -1."""
    if not len(values):  # a replica without sequences
        return values.new_full((len(index), *values.shape[1:]), padding)
    absent = (index < 0).view(-1, *[1] * (values.dim() - 1))
    return values[index.clamp(min=0)].masked_fill(absent, padding)
