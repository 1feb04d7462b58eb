"""What every section of the configuration shares: strict types, bounds, no unknown keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Beta", "Count", "Fraction", "NonNegative", "NonNegativeInt", "Positive", "Section"]

Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A section: immutable, without conversions between types, without infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
