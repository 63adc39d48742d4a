"""The base class of all sections, the types of their fields, and the marks that say what a setting decides.

A setting decides some of: `data` (the rows, and which client holds them), `model` (the base model, and what is adapted
in it), `result` (the trained state and its metrics). What decides the data or the model also decides the result.
`Section.decides` marks all fields of a section. A field that differs from its section has a mark of its own:
`DecidesData[...]`, `DecidesModel[...]` or `DecidesNothing[...]`. `rayfed.config.marks` reads the marks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Density = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Aspect = Literal["data", "model", "result"]
T = TypeVar("T")


@dataclass(frozen=True)
class Decides:
    """The mark of one field: the aspects of a run that the field decides."""

    aspects: tuple[Aspect, ...] = ()


DecidesData = Annotated[T, Decides(("data",))]
DecidesModel = Annotated[T, Decides(("model",))]
DecidesNothing = Annotated[T, Decides()]
Live = Annotated[T, "live"]  # may change between two rounds of a run: the tensors of a checkpoint stay valid
Searched = Annotated[T, "searched"]  # `sweep.search.kind: flasc` sets the field


class Section(BaseModel):
    """The base class of all sections. Unknown keys are refused. Values are not converted: "3" is not a number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    decides: ClassVar[tuple[Aspect, ...]] = ("result",)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, settings: Any) -> Any:
        """In YAML, a section with nothing under its name is null. Such a section gets its defaults."""
        if not isinstance(settings, dict):
            return settings
        sections = {name for name, field in cls.model_fields.items() if field.default_factory is not None}
        return {name: value for name, value in settings.items() if value is not None or name not in sections}


def section(kind: type[Section]) -> Any:
    """A field that holds a section. Its default is the section with all its defaults."""
    return Field(default_factory=kind, description=kind.__doc__)
