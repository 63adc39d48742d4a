"""The base class of all sections, the types of their fields, and the marks that say what a setting decides.

A setting decides some of: `data` (the rows, and which client holds them), `model` (the base model, and what is adapted
in it), `result` (the trained state and its metrics). What decides the data or the model also decides the result.
`Section.decides` marks all fields of a section. A field that differs from its section has a mark of its own:
`DecidesData[...]`, `DecidesModel[...]` or `DecidesNothing[...]`. `rayfed.config.marks` reads the marks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class TextMistake(ValueError):
    """What is wrong with the text of one field. (Other validators raise a whole line, which names the field.)"""


@dataclass(frozen=True)
class Printable:
    """A validator of strings: at most ``most`` bytes in UTF-8, and no control characters but those in ``but``.

    Settings are shown on terminals and become names of files. Control characters are those of the Unicode categories
    Cc, Cf and Cs, and the line ends of Unicode.
    """

    most: int
    but: str = ""

    def __call__(self, text: str) -> str:
        if (size := len(text.encode(errors="replace"))) > self.most:
            raise TextMistake(f"it has {size} bytes, and at most {self.most} are allowed")
        if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text if c not in self.but):
            raise TextMistake("control characters are not allowed")
        return text


class ClassPath:
    """A validator of strings: the import path `package.module:Class` of a class of the user's own."""

    def __call__(self, text: str) -> str:
        module, colon, name = text.partition(":")
        if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
            raise TextMistake("it is no import path package.module:Class")
        return text


UNSIGNED = AfterValidator(lambda x: x + 0.0)  # -0.0 is 0.0, and has its digest

# Every number has limits that the code below can hold. Many allowed values are merely useless.
Positive = Annotated[float, Field(ge=1e-30, le=1e30)]
"""A positive number that float32 holds, with room for products."""
NonNegative = Annotated[float, Field(ge=0, le=1e30), UNSIGNED]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""A timeout of at most 30 years."""
Density = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1), UNSIGNED]
Fraction = Annotated[float, Field(ge=0, le=1), UNSIGNED]
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
Rounds = Annotated[int, Field(ge=1, le=999_999)]
"""Files are named by the round, in six digits."""
Clients = Annotated[int, Field(ge=1, le=10_000_000)]
"""The driver has a few numbers in memory for every client of the population."""
Rank = Annotated[int, Field(ge=1, le=100_000)]
"""No model has a layer whose smaller side is larger."""
Batch = Annotated[int, Field(ge=1, le=100_000)]
"""Rows of one batch."""
Workers = Annotated[int, Field(ge=1, le=10_000)]
MOST_TRIALS = 5000  # of a sweep: all are checked before the first starts, which takes about a millisecond each
Trials = Annotated[int, Field(ge=1, le=MOST_TRIALS)]
MOST_NAME = 120
Name = Annotated[str, AfterValidator(Printable(MOST_NAME))]
"""With the time behind it, a name is a folder's name (255 bytes on most file systems)."""
Text = Annotated[str, AfterValidator(Printable(1000))]
OwnClass = Annotated[str, AfterValidator(ClassPath()), AfterValidator(Printable(1000))]
"""The import path of a class of the user's own."""
Tag = Annotated[str, AfterValidator(Printable(64))]
Names = Annotated[tuple[Name, ...], Field(strict=False, max_length=200)]
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

    def depends_on_rounds(self, before: int, after: int) -> str | None:
        """The field that makes runs of ``before`` and of ``after`` rounds (`server.rounds`) differ in a round of both.

        None where there is none. A dotted name where the field is in a section of this one.
        """
        return None

    def mistakes(self) -> Iterator[str]:
        """The values that do not go together: a line `field: got VALUE, but ...` for each mistake."""
        yield from ()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if mistakes := [*self.mistakes()]:
            raise ValueError("\n".join(mistakes))
        return self

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
