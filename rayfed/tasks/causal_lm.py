"""Causal language modelling: the next token of texts, any causal language model of transformers.

Rows come from the sources of `data.source`: a column of texts, and with partition.kind=natural a column of clients. A
row is a text, cut to `data.max_tokens`, or with `data.packing` a block of that many tokens of a client's joined texts.
The loss of a row is the sum over its tokens but the first, in nats; a client's loss is the mean over the tokens of its
batch. So a text of 100 tokens counts 99 times as much as one of 2. The metrics are next-token accuracy and perplexity,
the exponential of the mean loss per token. The output layer does not train, unless `lora.target_modules` names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from rayfed.errors import UserError, allowed
from rayfed.keywords import suggest_keywords
from rayfed.tasks._texts import TextTask
from rayfed.tasks.base import Forward, Metric
from rayfed.tasks.data.federation import Federation, only_training
from rayfed.tasks.data.table import Source, listed
from rayfed.tasks.models.base import FrozenBase, longest_input, vocabulary
from rayfed.tasks.models.cache import shared_base
from rayfed.tasks.models.new import write_language_model
from rayfed.tasks.models.next_token import NextTokens, choose_batching, load_causal_base, padded_next_tokens
from rayfed.tasks.models.unpadded import Padded, Unpadded
from rayfed.tasks.models.usage import Usage, causal_lm_usage

if TYPE_CHECKING:
    from rayfed.config.execution import Engine
    from rayfed.config.method import Lora
    from rayfed.config.pretrain import Pretrain
    from rayfed.config.training import Eval, Server
    from rayfed.tasks.data.dataset import Split
    from rayfed.tasks.data.tokens import Tokens


@suggest_keywords
@dataclass(frozen=True)
class CausalLM(TextTask):
    """Texts without labels: `data.task: causal_lm`, or from Python

        rayfed.run(config, task=rayfed.CausalLM(train=rows, test=more, client="speaker"))

    What is not given comes from the settings; the first four fields always do.
    """

    name = "causal_lm"
    has_classes = False

    def check(self, *, lora: Lora, server: Server, eval: Eval, engine: Engine) -> None:
        self._refuse(
            ("model.pooling", self.model_settings.pooling, "stock", "every token has an output"),
            ("model.head", self.model_settings.head, "trained", "there is no new head"),
            ("lora.train", lora.train, "all", "there is no new head"),
            ("eval.controls", eval.controls, False, "there is no new head"),
            ("eval.clients", eval.clients, False, "there are no classes"),
        )
        if self.data.max_tokens < 2:
            raise allowed("data.max_tokens", self.data.max_tokens, f"with data.task={self.name} at least 2 are needed")
        super().check(lora=lora, server=server, eval=eval, engine=engine)

    def load_data(self) -> Federation:
        from rayfed.tasks.data.dataset import load_data, read_source
        from rayfed.tasks.data.partition import client_names, partition

        source = self._source(self.data) or read_source(self.data)
        self._check_labels(source)
        data = load_data(self.data, self.seed, source, ("train",) if self.partition.by_label else ())
        parts = partition(data.train.labels, data.train.owners, self.partition, self.seed)
        train, rows, starts = self._rows(data.train, parts)
        validation, test = (self._rows(split, [np.arange(len(split))])[0] for split in (data.validation, data.test))
        self._check_length((train, validation, test), longest_input(self.model_settings))
        for split, found in ((data.train, train), (data.test, test)):
            if not len(found):
                raise UserError(f"data.text: got no text of 2 or more tokens in {split.origin}, but one is needed")
        names = client_names(data.train.owners, self.partition)
        return Federation(train, validation, test, (), rows, starts, names=names)

    def _check_labels(self, source: Source) -> None:
        table, label, kind = source.tables["train"], self.data.label, self.partition.kind
        if self.partition.by_label and label not in table.columns:
            what = (
                f"it divides rows by label, and data.label={label} is none of the columns {listed(table.columns)} of "
                f"{table.origin}; allowed without labels are iid, quantity, domain, natural"
            )
            raise allowed("partition.kind", kind, what)

    def _rows(self, split: Split, parts: list[np.ndarray]) -> tuple[Tokens, np.ndarray, np.ndarray]:
        """The rows of a split, and who of ``parts`` has them."""
        from rayfed.tasks.data.blocks import blocks, whole_texts
        from rayfed.tasks.data.tokens import check_limit, tokenize, tokenize_whole

        tokenizer, words, most = self._tokenizer(), vocabulary(self.model_settings), self.data.max_tokens
        if not self.data.packing:
            return whole_texts(tokenize(split, tokenizer, most, words), parts)
        check_limit(tokenizer, most)
        return blocks(tokenize_whole(split, tokenizer, words), parts, most)

    def write_new_base(self, settings: Pretrain, folder: Path) -> None:
        write_language_model(settings, folder, self.seed)

    def load_pretraining(self) -> tuple[Federation, str]:
        from rayfed.tasks.data.dataset import load_pretraining, split_digest

        split, _ = load_pretraining(self.data, self._source(self.data), ())
        rows = self._rows(split, [np.arange(len(split))])[0]
        self._check_length((rows,), longest_input(self.model_settings))
        return only_training(rows, ()), split_digest(split)

    def load_base(self, federation: Federation) -> FrozenBase:
        settings, seed = self.model_settings, self.seed
        return shared_base(self._base_key("causal_lm"), lambda: load_causal_base(settings, seed))

    def choose_batching(self, model: nn.Module, longest: int) -> Unpadded | Padded:
        return choose_batching(model, longest)

    def make_forward(self, model: nn.Module, batching: Unpadded | Padded) -> Forward:
        if isinstance(batching, Unpadded):
            return NextTokens(model, batching)
        cast(Any, model.config).use_cache = False  # a decoder would copy all keys and values for a next token
        return lambda inputs, segments: padded_next_tokens(model, inputs)

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return outputs[:, 0], outputs[:, 1]

    def metrics(self, predictions: Tensor, labels: Tensor, federation: Federation) -> Mapping[str, Metric]:
        loss, count, right = predictions.double().sum(0).tolist()
        try:
            perplexity = math.exp(loss / count)
        except OverflowError:  # above 709 nats
            perplexity = math.inf
        return {"accuracy": right / count, "perplexity": perplexity}

    def metric_names(self) -> tuple[str, ...]:
        return "accuracy", "perplexity"

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        return (*super().metric_keys(eval), *(("test/accuracy_unseen",) if eval.unseen else ()))

    def usage(self) -> Usage | None:
        return causal_lm_usage(self.model_settings, self.data.max_tokens, self.data.packing)
