"""Labelled texts from the Hugging Face hub, or from a local folder that `datasets.load_dataset` can load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayfed.config.task import Data
from rayfed.errors import UserError, allowed, first_line
from rayfed.tasks.data.table import SPLITS, Source, Table

if TYPE_CHECKING:
    from datasets import Dataset


def read_hub(settings: Data) -> Source:
    """The splits of the data set ``data.name`` (configuration ``data.subset``), found by their names.

    A ClassLabel column gives the class names. A validation or test split without any label (-1 in all rows, as in
    GLUE's test splits) counts as missing. Code that comes with a data set is never run. Raises UserError, with the
    library's reason, if the data set cannot be loaded, for example for lack of a network.
    """
    from datasets import ClassLabel, DatasetDict, load_dataset

    assert settings.name is not None  # checked by the settings
    name = settings.name if settings.subset is None else f"{settings.name} ({settings.subset})"
    try:
        loaded = load_dataset(settings.name, settings.subset)
    except Exception as error:  # datasets and the hub client raise many kinds
        raise UserError(f"data.name: {name} cannot be loaded: {first_line(error)}") from error
    assert isinstance(loaded, DatasetDict)  # because neither a split nor streaming was requested
    found = {split: own for split, names in SPLITS.items() if (own := [n for n in names if n in loaded])}
    for split, own in found.items():
        if len(own) > 1:
            what = f"its splits {' and '.join(map(repr, own))} both stand for the {split} split"
            raise allowed("data.name", name, what)
    if "train" not in found:
        raise allowed("data.name", name, f"it needs a split 'train'; it has {', '.join(map(repr, loaded))}")
    feature = loaded[found["train"][0]].features.get(settings.label)
    feature = getattr(feature, "feature", feature)  # of the items, where a row has a list of labels
    class_names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    tables = {}
    for split, (own_name, *_) in found.items():
        columns = _columns(loaded[own_name], settings)
        labels = columns.get(settings.label, [])
        if split == "train" or class_names is None or not labels or any(label not in (-1, None) for label in labels):
            tables[split] = Table(f"{name}, split {own_name!r}", columns)
    return Source(tables, class_names)


def _columns(dataset: Dataset, settings: Data) -> dict[str, list[Any]]:
    """The columns that the settings name. The other columns are empty: error messages list their names."""
    from datasets import Image

    for name in settings.columns:
        if isinstance(dataset.features.get(name), Image):
            dataset = dataset.cast_column(name, Image(decode=False))  # the bytes of its file
    return {name: dataset[name][:] if name in settings.columns else [] for name in dataset.column_names}
