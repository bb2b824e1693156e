"""What a group of recipe settings is: a small, typed, immutable model that lives beside the code that reads it."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every settings group: unknown keys are errors, values are checked, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
