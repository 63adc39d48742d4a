"""The tokens of prompts and their responses, and the batches made of them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayfed.config.task import Data
from rayfed.errors import UserError, first_line
from rayfed.tasks.data.tokens import IGNORED, Tokens, check_limit, encode_whole, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayfed.tasks.data.dataset import Split

DAY = "26 Jul 2024"
"""What a chat template that writes the date gets: Llama 3's own default, where it cannot ask for the day of the run."""
PLAIN = "{prompt}\n"
"""The template of a prompt where neither the settings nor the tokenizer have one."""


@dataclass(frozen=True, eq=False)
class PromptTokens(Tokens):
    """Rows that are a prompt and its response: of the former, tokens are seen, but not learned."""

    _: KW_ONLY
    prompts: np.ndarray  # (n,) int64, at least 1: tokens of each prompt
    responses: np.ndarray  # (bytes,) uint8: the texts of all responses in UTF-8, uncut
    ends: np.ndarray  # (n + 1,) int64: text i is ``responses[ends[i]:ends[i + 1]]``

    def batch(self, rows: np.ndarray, padded: bool) -> dict[str, torch.Tensor]:
        """As `Tokens.batch`, with ``targets``, of the form of the ids: the next token where it is of the response."""
        batch = super().batch(rows, padded)
        lengths, prompts = self.lengths[rows][:, None], self.prompts[rows][:, None]
        place = np.arange(lengths.max(initial=0))
        counted = (place >= prompts - 1) & (place < lengths - 1)
        if not padded:
            counted = counted[place < lengths][None]
        ignored = torch.from_numpy(~counted)
        return {**batch, "targets": batch["input_ids"].roll(-1, 1).masked_fill(ignored, IGNORED)}

    def prompt_batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The prompts of the given b rows as ``input_ids`` and ``attention_mask`` (b, longest), padded on the left."""
        lengths = self.prompts[rows]
        mask = np.arange(lengths.max(initial=0))[::-1] < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = np.concatenate([self.ids[start : start + n] for start, n in zip(self.offsets[rows], lengths)])
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}

    def response(self, row: int) -> str:
        """The text of a row's response, as the data have it."""
        return self.responses[self.ends[row] : self.ends[row + 1]].tobytes().decode()


def tokenize_prompts(
    split: Split, tokenizer: PreTrainedTokenizerBase, settings: Data, vocabulary: int | None = None
) -> tuple[PromptTokens, np.ndarray]:
    """(rows, used): the split's conversations as tokens, cut to `data.max_tokens`, and which rows (n,) are used.

    A row is not used where its prompt alone, without a token of the response, has so many tokens, or none.

    With a chat template, the template makes the text of the prompt, up to where the response begins; the response is
    what the template adds to it for the whole conversation. Without one, or with `data.prompt_template`, prompts get
    the special tokens that the tokenizer puts before a text. A response ends with an end-of-text token. UserError where
    the template fails on a row, or changes the prompt for a response, or as in `tokenize_whole`.
    """
    check_limit(tokenizer, settings.max_tokens)
    chat = by_chat(tokenizer, settings)
    if settings.messages is not None and not chat:
        raise UserError(
            f"data.messages: got {settings.messages!r}, but the tokenizer of model.name has no chat template"
        )
    template, end = settings.prompt_template or PLAIN, tokenizer.eos_token_id
    if chat:
        texts = [_by_template(split, row, tokenizer) for row in range(len(split))]
    else:
        texts = [(template.replace("{prompt}", row[0]["content"]), row[1]["content"]) for row in split.texts]
    fields = ("data.messages",) * 2 if settings.messages else ("data.prompt", "data.response")
    prompts = encode_whole(split, [prompt for prompt, _ in texts], fields[0], tokenizer, add_special_tokens=not chat)
    answers = encode_whole(split, [answer for _, answer in texts], fields[1], tokenizer, add_special_tokens=False)
    if not chat:  # what follows is the response, not the end
        prompts = [ids[:-1] if ids and ids[-1] == end else ids for ids in prompts]
    answers = [ids if end is None or end in ids else [*ids, end] for ids in answers]
    lists = [[*prompt, *answer][: settings.max_tokens] for prompt, answer in zip(prompts, answers)]
    used = np.array([0 < len(prompt) < len(ids) for prompt, ids in zip(prompts, lists)], dtype=np.bool_)
    split = split.take(np.flatnonzero(used))
    tokens = join([ids for ids, own in zip(lists, used) if own], split, tokenizer, vocabulary)
    lengths = np.array([len(prompt) for prompt, own in zip(prompts, used) if own], dtype=np.int64)
    texts_of = [row[-1]["content"].encode() for row in split.texts]
    return PromptTokens(
        tokens.ids, tokens.offsets, tokens.labels, tokens.pad_id,
        prompts=lengths,
        responses=np.frombuffer(b"".join(texts_of), dtype=np.uint8),
        ends=np.cumsum([0, *map(len, texts_of)], dtype=np.int64),
    ), used  # fmt: skip


def by_chat(tokenizer: PreTrainedTokenizerBase, settings: Data) -> bool:
    """Whether prompts are written by the tokenizer's chat template."""
    return settings.prompt_template is None and getattr(tokenizer, "chat_template", None) is not None


def _by_template(split: Split, row: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The texts of a row's prompt and response by the tokenizer's chat template."""
    messages = list(split.texts[row])
    prompt: Any
    whole: Any
    try:
        write = partial(tokenizer.apply_chat_template, tokenize=False, date_string=DAY)
        prompt, whole = write(messages[:-1], add_generation_prompt=True), write(messages)
    except Exception as error:  # jinja2 and templates themselves raise many kinds
        what = f"the chat template of its tokenizer fails on {split.place(row)}: {first_line(error)}"
        raise UserError(f"model.name: {what}") from None
    if not whole.startswith(prompt):
        what = f"the chat template of its tokenizer changes the prompt of {split.place(row)} for its response"
        raise UserError(f"model.name: {what}; allowed is data.prompt_template")
    return prompt, whole[len(prompt) :]
