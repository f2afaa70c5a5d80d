"""Base class of the parts of a checkpoint's state.json. ``weights.run_checkpoint`` reads and checks them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SavedState(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
