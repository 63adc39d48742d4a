"""What all tasks on rows of a source have in common (`SourceTask`), and those of them on texts (`TextTask`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from rayfed.config.describe import format_value
from rayfed.config.task import Data, Model, Partition, Problem
from rayfed.errors import UserError, allowed
from rayfed.tasks.base import Task, fingerprint
from rayfed.tasks.data.objects import content_digest, read_objects
from rayfed.tasks.data.table import SPLITS, Source
from rayfed.tasks.models.base import FrozenBase, load_tokenizer, model_path, positions
from rayfed.tasks.models.unpadded import Padded, Unpadded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.pretrain import Pretrain
    from rayfed.config.training import Eval, Server
    from rayfed.tasks.data.federation import Federation
    from rayfed.tasks.data.tokens import Tokens


@dataclass(frozen=True)
class SourceTask(Task):
    """A task on rows of `data.source`: where they come from, who has them, which base model is loaded.

    What is not given as an object comes from the settings; the first four fields always do.
    """

    name: ClassVar[str]
    """The task's name, by which `data.task` knows it."""
    columns: ClassVar[tuple[str, ...]] = ("label", "client")
    """The fields that name a column of the data, each in place of the setting `data.NAME`."""

    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model_settings: Model = field(default_factory=Model)
    seed: int = 0
    _: KW_ONLY
    train: Any = None
    """The training rows, in place of `data.source`: a datasets.Dataset, a pandas DataFrame, a list of mappings, or a
    torch data set of mappings or of tuples: (text, label) or (text, label, client), with the image in place of the text
    for a task on images, and two texts where `data.text_pair` names a second one.
    """
    validation: Any = None
    """The validation rows; None: `data.validation` says how many training rows are drawn."""
    test: Any = None
    """The test rows; None: `data.test` says how many training rows are drawn."""
    label: str | None = None
    """The column with the label; None: `data.label`."""
    client: str | None = None
    """The column with the client, for partition.kind=natural; None: `data.client`."""

    @classmethod
    def from_settings(cls, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        return cls(data, partition, model, seed)

    def configure(self, *, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Self:
        return replace(self, data=data, partition=partition, model_settings=model, seed=seed)

    def described(self, data: Data, model: Model) -> tuple[Data, Model]:
        names = {key: name for key in self.columns if (name := getattr(self, key)) is not None}
        data = data.model_copy(update={"task": self.name, **names})
        digest = hashlib.sha256()
        if (source := self._source(data)) is not None:
            digest.update(content_digest(source).encode())
            data = data.model_copy(update={"source": "object", "path": None, "name": None, "subset": None})
        elif data.source == "object":
            what = f"the rows were Python objects: give them again, {type(self).__name__}(train=...)"
            raise allowed("data.source", "object", what)
        digest.update(self._functions_digest())
        return data.model_copy(update={"fingerprint": fingerprint(self, digest.hexdigest())}), model

    def _functions_digest(self) -> bytes:
        """What names the user's functions in the task, for `data.fingerprint`."""
        return b""

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: workers have the federation."""
        return {**vars(self), "train": None, "validation": None, "test": None}

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        clients = self.partition.clients
        if self.partition.kind != "natural" and server.cohort > clients:
            what = f"the population has only {clients} clients (partition.clients)"
            raise allowed("server.cohort", server.cohort, what)
        if self.partition.column and self.data.client is None:
            needed = f"partition.kind={self.partition.kind} needs the column that names the {self.partition.column}"
            raise UserError(f"data.client: got null, but {needed}")
        if (sequence := self.partition.sequence) and sequence.of == "domains" and self.data.client is None:
            raise UserError("data.client: got null, but partition.sequence.of=domains needs the column of domains")
        if eval.early_stop and self.data.source == "stdlib" and self.data.validation == 0:
            raise UserError("data.validation: got 0, but eval.early_stop needs a validation split")

    def _refuse(self, *fields: tuple[str, object, object, str]) -> None:
        """UserError for the first field, with its value, the one that is allowed, and why, whose value is another."""
        for name, value, wanted, why in fields:
            if value != wanted:
                what = f"with data.task={self.name} {why}; allowed is {format_value(wanted, quotes=False)}"
                raise UserError(f"{name}: got {format_value(value)}, but {what}")

    def write_new_base(self, settings: Pretrain, folder: Path) -> None:
        """Writes the model that `rayfed pretrain` trains, with random weights, and all that it needs.

        UserError where there can be no such model.
        """
        what = "rayfed pretrain makes models for causal_lm, instruction, image_classification, image_multi_label"
        raise allowed("data.task", self.name, what)

    def load_pretraining(self) -> tuple[Federation, str]:
        """A federation whose training rows are those of `data.pretrain_share`, and the digest of these rows."""
        raise NotImplementedError

    def pretrained(self, model: nn.Module) -> nn.Module:
        """What of a pretrained model is kept: all of it."""
        return model

    def _source(self, data: Data) -> Source | None:
        """The rows that are objects; None where the settings name the rows."""
        splits = {name: rows for name in SPLITS if (rows := getattr(self, name)) is not None}
        if splits and "train" not in splits:
            raise UserError("train: got None, but validation or test rows come with training rows")
        return read_objects(splits, data) if splits else None

    @property
    def base_name(self) -> str:
        return model_path(self.model_settings)

    def _base_key(self, head: str) -> str:
        """Equal keys, equal base models in float32. ``head``: the kind of the model, with the number of its outputs."""
        key: list[Any] = [head, self.seed, self.model_settings.model_dump(mode="json", exclude={"dtype"})]
        folder = Path(self.base_name)
        if folder.is_dir():  # other files may come under its name
            key += sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in folder.iterdir())
        return json.dumps(key)


@dataclass(frozen=True)
class TextTask(SourceTask):
    """A task on texts."""

    columns: ClassVar[tuple[str, ...]] = ("text", "label", "client")

    _: KW_ONLY
    text: str | None = None
    """The column with the text; None: `data.text`."""

    def _check_length(self, splits: tuple[Tokens, ...], limit: int | None) -> None:
        """UserError where a row has more tokens than the model takes: ``limit``, None where that is not known."""
        longest = max(int(split.lengths.max(initial=0)) for split in splits)
        if limit is not None and longest > limit:
            what = f"some texts have {longest} tokens and the model takes at most {limit}"
            raise allowed("data.max_tokens", self.data.max_tokens, what)

    def batching(self, base: FrozenBase, padding: str) -> Unpadded | Padded:
        if padding == "batch":
            return Padded("engine.padding=batch")
        most = self.data.max_tokens
        found = self.choose_batching(base.model, min(most, positions(getattr(base.model, "config", None)) or most))
        if padding == "never" and isinstance(found, Padded):
            what = f"this model needs padding ({found.reason}); allowed are auto and batch"
            raise allowed("engine.padding", padding, what)
        return found

    def choose_batching(self, model: nn.Module, longest: int) -> Unpadded | Padded:
        """How to run the model without padding on texts of up to ``longest`` tokens, or why it needs padding."""
        raise NotImplementedError

    def save_tokenizer(self, folder: Path) -> None:
        tokenizer = self._tokenizer()
        tokenizer.padding_side = "right"  # as in every batch of a run
        tokenizer.save_pretrained(folder)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model_settings)
