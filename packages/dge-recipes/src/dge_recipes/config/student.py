"""The section of a student that learns from the dense model that it was made from."""

from typing import Literal

from pydantic import Field

from dge_recipes.sections import Count, Section

__all__ = ["StudentConfig"]


class StudentConfig(Section):
    """The routed copy of a pretrained model (task=distillation)."""

    train: Literal["norms", "all"] = Field(
        default="norms",
        description="which weights learn (distillation): norms, biases and layer scales, which few pictures cannot "
        "lead far astray; or all. Routers learn where budget.kind is not set",
    )
    pictures: Count = Field(
        default=64,
        description="training pictures, evenly spaced, that routers are fitted and their budget is set on "
        "(distillation); of fewer ones crops are fitted on too",
    )
