"""Labelled texts of the Hugging Face hub, or of a local folder in one of its layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayfed.config.task import Data
from rayfed.errors import UserError, allowed
from rayfed.tasks.data.dataset import SPLITS, Source, Table

if TYPE_CHECKING:
    from datasets import Dataset


def read_hub(settings: Data) -> Source:
    """The splits of the data set ``data.name`` (configuration ``data.subset``), found by their names.

    A label column that is a ClassLabel brings its class names. A validation or test split in which no row is labelled
    (-1 throughout, as in GLUE's tests) counts as one that the data set lacks. Code that comes with a data set is never
    run. Raises UserError with the library's reason where the data set cannot be loaded: unknown, or no network.
    """
    from datasets import ClassLabel, DatasetDict, load_dataset

    assert settings.name is not None  # the schema demands it
    name = settings.name if settings.subset is None else f"{settings.name} ({settings.subset})"
    try:
        loaded = load_dataset(settings.name, settings.subset)
    except Exception as error:  # whatever went wrong between here and the hub: its reason, in one line
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.name: {name} cannot be loaded: {reason}") from error
    assert isinstance(loaded, DatasetDict)  # no split and no streaming were asked for
    found = {split: here for split, names in SPLITS.items() if (here := [n for n in names if n in loaded])}
    for split, here in found.items():
        if len(here) > 1:
            what = f"its splits {' and '.join(map(repr, here))} both stand for the {split} split"
            raise allowed("data.name", name, what)
    if "train" not in found:
        raise allowed("data.name", name, f"it needs a split 'train'; it has {', '.join(map(repr, loaded))}")
    feature = loaded[found["train"][0]].features.get(settings.label)
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    tables = {}
    for split, (own, *_) in found.items():
        columns = _columns(loaded[own], settings)
        labels = columns.get(settings.label, [])
        if split == "train" or names is None or not labels or any(label not in (-1, None) for label in labels):
            tables[split] = Table(f"{name}, split {own!r}", columns)
    return Source(tables, names)


def _columns(dataset: Dataset, settings: Data) -> dict[str, list[Any]]:
    """The columns that the settings ask for; the others as names only, for a refusal to tell what is there."""
    asked = (settings.text, settings.label, settings.client)
    return {name: dataset[name][:] if name in asked else [] for name in dataset.column_names}
