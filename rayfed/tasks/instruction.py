"""Instruction tuning: the response to a prompt, any causal language model of transformers.

Rows come from the sources of `data.source`: columns with a prompt and its response, or one with chats. A row is the
prompt and the response as the tokenizer's chat template writes them (`rayfed.tasks.data.prompt_tokens`), cut to
`data.max_tokens`. The loss of a row is the sum over the tokens of its response, in nats; a client's loss is the mean
over these tokens of its batch. Tokens of prompts never count. The metrics are those of `rayfed.tasks.causal_lm` on the
tokens of responses. With `eval.generate_rows` the model also writes responses, and `rayfed.tasks.metrics.responses` has
their metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from rayfed.errors import UserError
from rayfed.keywords import suggest_keywords
from rayfed.tasks.base import Forward, Metric
from rayfed.tasks.causal_lm import CausalLM
from rayfed.tasks.data.blocks import used_rows
from rayfed.tasks.data.federation import Rows
from rayfed.tasks.data.prompt_tokens import PromptTokens, by_chat, tokenize_prompts
from rayfed.tasks.metrics import responses
from rayfed.tasks.models.base import vocabulary
from rayfed.tasks.models.generation import generate
from rayfed.tasks.models.usage import Usage, instruction_usage

if TYPE_CHECKING:
    from rayfed.config.training import Eval
    from rayfed.tasks.data.dataset import Split
    from rayfed.tasks.data.tokens import Tokens

log = logging.getLogger(__name__)


@suggest_keywords
@dataclass(frozen=True)
class InstructionTuning(CausalLM):
    """Prompts and responses: `data.task: instruction`, or from Python

        rayfed.run(config, task=rayfed.InstructionTuning(train=rows, test=more, prompt="question", response="answer"))

    What is not given comes from the settings; the first four fields always do.
    """

    name = "instruction"
    columns = ("prompt", "response", "messages", "label", "client")
    generates = True

    _: KW_ONLY
    prompt: str | None = None
    """The column with the prompt; None: `data.prompt`."""
    response: str | None = None
    """The column with the response; None: `data.response`."""
    messages: str | None = None
    """The column with chats, in place of both; None: `data.messages`."""

    def _rows(self, split: Split, parts: list[np.ndarray]) -> tuple[Tokens, np.ndarray, np.ndarray]:
        found, used = tokenize_prompts(split, self._tokenizer(), self.data, vocabulary(self.model_settings))
        if count := int((~used).sum()):
            what = "%d of %d prompts in %s leave no room for a response, so these rows are left out"
            log.warning(f"data.max_tokens: {what}", count, len(used), split.origin)
        if not len(found) and len(split):
            what = f"every prompt in {split.origin} alone has so many tokens"
            raise UserError(f"data.max_tokens: got {self.data.max_tokens}, but {what}")
        return found, *used_rows(used, parts)

    def generate(self, model: nn.Module, forward: Forward, prompts: dict[str, Tensor], most: int) -> Tensor:
        return generate(model, forward, prompts, self._tokenizer(), most)

    def response_metrics(self, generated: Sequence[np.ndarray], rows: Rows, chosen: np.ndarray) -> dict[str, Metric]:
        tokenizer, own = self._tokenizer(), cast(PromptTokens, rows)
        texts: Any = tokenizer.batch_decode([ids.tolist() for ids in generated], skip_special_tokens=True)
        return {**responses.metrics(texts, [own.response(row) for row in chosen.tolist()])}

    def metric_keys(self, eval: Eval) -> tuple[str, ...]:
        names = responses.NAMES if eval.generate_rows else ()
        return *super().metric_keys(eval), *(f"{split}/{name}" for split in ("eval", "test") for name in names)

    def usage(self) -> Usage | None:
        return instruction_usage(self.model_settings, self.data, by_chat(self._tokenizer(), self.data))
