"""Base class of the parts of a checkpoint's state.json."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import InputError


class SavedState(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    @classmethod
    def read(cls, name: str, state: Any) -> Self:
        """Check the part ``name`` of the state and return it.

        Raises:
            InputError: a field is missing or has a wrong type or value.
        """
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join([name, *map(str, first["loc"])])
            raise InputError(
                f"the checkpoint's state is damaged: {field}: {first['msg'].removeprefix('Value error, ')}: "
                "resume from an older checkpoint"
            ) from None
