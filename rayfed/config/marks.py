"""The marks of the schema, read: what each setting decides, and the digests that follow from that.

All functions that take ``settings`` take the plain values of a whole Experiment: `model_dump(mode="json")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayfed.config.describe import digest, format_value, iter_fields, section_of
from rayfed.config.schema import Experiment
from rayfed.config.types import Aspect, Decides, Section

NEUTRAL: tuple[tuple[str, Any], ...] = (
    *(("fingerprint", None), ("adapter_digest", None), ("compute", "auto"), ("sampling", "fixed"), ("name", "plain")),
    *(("image", "image"), ("crop", 0), ("flip", False), ("pretrain_share", 0.0), ("weighting", {}), ("sequence", None)),
    *(("label_smoothing", 0.0), ("class_weights", None), ("max_mb", None), ("own_models", None)),
    ("load_in_4bit", False),
    ("text_pair", None),
    ("of", "classes"),
)
"""Names and values: there is no object or adapter to hash; adapters compute in the base's format; cohorts have one
size; the objective is plain; there are no images, no rows are kept from the clients, weights have no options, classes
come all at once, clients train with the plain loss, traffic has no limit, no clients' own models are measured, the base
has no 4-bit weights, texts come alone, and a sequence is one of classes.
"""
OFF = (("privacy", "none"), ("channel", "lossless"), ("topology", "star"))
"""Sections and their kinds in which none of their settings decides anything."""


def decides(name: str) -> tuple[Aspect, ...]:
    """The aspects of a run (data, model, result) that a setting decides; empty where the setting decides nothing.

    ``name`` is dotted. A name that the schema lacks, such as an option of a method, has the mark of its section.
    """
    section: type[Any] = Experiment
    for part in name.split("."):
        field = section.model_fields.get(part)
        inner = section_of(field) if field else None
        if inner is None:
            own = (mark.aspects for mark in field.metadata if isinstance(mark, Decides)) if field else ()
            return next(iter(own), section.decides)
        section = inner
    return section.decides


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 (first 16 hex digits) of all settings that decide anything: equal digests, equal results."""
    return digest(_select(settings, {"data", "model", "result"}))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 3) -> str:
    """The first ``most`` settings that decide anything and differ: `server.rounds was 20 and is 30, and 2 more`."""
    changed = changes(before, now)
    shown = [f"{key} was {old} and is {new}" for key, (old, new) in list(changed.items())[:most]]
    return ", ".join([*shown, *([f"and {len(changed) - most} more"] if len(changed) > most else [])])


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings that decide anything and differ: dotted name -> (old value, new value), as text."""
    old, new = (dict(flat(_select(settings, {"data", "model", "result"}))) for settings in (before, now))

    def text(settings: Mapping[str, Any], key: str) -> str:
        return format_value(settings[key]) if key in settings else "not given"

    changed = [key for key in {**old, **new} if (key in old, old.get(key)) != (key in new, new.get(key))]
    return {key: (text(old, key), text(new, key)) for key in changed}


def data_key(settings: Mapping[str, Any]) -> str:
    """Names the data of a run and who holds them (16 hex digits): equal keys, equal federations and equal refusals.

    Three more settings are in the key because the data are checked against them: `server.cohort`,
    `server.empty_clients`, and whether `eval.early_stop` is given.
    """
    checked = {name: settings["server"][name] for name in ("cohort", "empty_clients")}
    checked["early_stop"] = settings["eval"]["early_stop"] is not None
    return digest(_select(settings, {"data"}) | checked)


def model_key(settings: Mapping[str, Any]) -> str:
    """Names the base model of a run and what is adapted in it (16 hex digits): equal keys, equal refusals.

    `seed` is not in the key: the seed decides the values of a new head, but not whether the model fits.
    `engine.gradient_checkpointing` is in the key because the model is checked against it.
    """
    checked = {"gradient_checkpointing": settings["engine"]["gradient_checkpointing"]}
    return digest(_select(settings, {"model"}) | checked)


def depends_on_rounds(settings: Section, before: int, after: int) -> str | None:
    """A setting by which runs of ``before`` and of ``after`` rounds differ in a round of both: its dotted name.

    ``settings`` is an Experiment or a section. None where there is none: then a run of the one number can go on as one
    of the other.
    """
    if (own := settings.depends_on_rounds(before, after)) is not None:
        return own
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Section) and (found := depends_on_rounds(value, before, after)):
            return f"{name}.{found}"
    return None


def live() -> tuple[str, ...]:
    """Dotted names of the settings that may change between two rounds of one run."""
    return tuple(name for name, field in iter_fields(Experiment) if "live" in field.metadata)


def searched() -> tuple[str, ...]:
    """Dotted names of the settings that FLASC's search of rank and density sets."""
    return tuple(name for name, field in iter_fields(Experiment) if "searched" in field.metadata)


def _select(settings: Mapping[str, Any], aspects: set[Aspect], prefix: str = "") -> dict[str, Any]:
    """The settings that decide one of the aspects. A section of which nothing is left is left out.

    So are settings at values that change nothing, see `NEUTRAL`, and sections that are off, see `OFF`: digests of most
    runs do not depend on these settings.
    """
    selected = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            if (prefix + name, value.get("kind")) not in OFF and (part := _select(value, aspects, f"{prefix}{name}.")):
                selected[name] = part
        elif aspects & set(decides(f"{prefix}{name}")) and (name, value) not in NEUTRAL:
            selected[name] = value
    return selected


def flat(
    settings: Mapping[str, Any], prefix: str = "", leaf: Callable[[Any], bool] = lambda value: not value
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting. A mapping that is a ``leaf`` is a value."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and not leaf(value):
            yield from flat(value, f"{prefix}{name}.", leaf)
        else:
            yield f"{prefix}{name}", value
