"""Base class of all sections, and types of their fields."""

from __future__ import annotations

import os
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


def _not_empty(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty", "Input should not be empty")
    return text


def expanded_path(path: str) -> str:
    """Return ``path`` with a leading ``~`` replaced by the home folder; an empty path is invalid."""
    return os.path.expanduser(_not_empty(path))


def _file_name(name: str) -> str:
    if "/" in _not_empty(name):
        raise PydanticCustomError(
            "file_name", "Input should not contain '/', because files are named after it"
        )
    return name


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=2e6)]
"""Time limit; poll(2) counts milliseconds in 32 bits, which are 25 days."""
Text = Annotated[str, AfterValidator(_not_empty)]
FileName = Annotated[str, AfterValidator(_file_name)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""Path, in which a leading ``~`` is the home folder."""
RequiredPath = Annotated[str, AfterValidator(expanded_path)]


class Section(BaseModel):
    """Base class of all sections. Numbers must be finite; true and false are no numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _bools_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false in fields of other types, because pydantic reads them as 1 and 0."""
        kind = cls.model_fields[info.field_name or ""].annotation
        values = value if isinstance(value, list | tuple) else [value]
        if bool not in (kind, *get_args(kind)) and any(isinstance(element, bool) for element in values):
            raise PydanticCustomError("no_bool", "Input should not be true or false")
        return value
