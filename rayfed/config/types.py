"""What all sections of the settings are made of: their common rules, and the types of their fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Density = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Indices = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Ranks = Annotated[tuple[PositiveInt, ...], Field(strict=False)]
Densities = Annotated[tuple[Density, ...], Field(strict=False)]
Weights = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]
ValueFormat = Literal["fp32", "bf16", "fp16", "int8"]


class Section(BaseModel):
    """What all sections share: unknown keys are refused, and nothing is converted: "3" is no number, 1 no `true`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, settings: Any) -> Any:
        """A section with nothing under its name is null in YAML and means its defaults."""
        if not isinstance(settings, dict):
            return settings
        sections = {name for name, field in cls.model_fields.items() if field.default_factory is not None}
        return {name: value for name, value in settings.items() if value is not None or name not in sections}


def section(kind: type[Section], description: str) -> Any:
    """A field that holds a section, with its defaults unless settings are given."""
    return Field(default_factory=kind, description=description)
