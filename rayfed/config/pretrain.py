"""The section `pretrain`: the small base model that `rayfed pretrain` makes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayfed.config.types import Batch, NonNegative, Positive, Section, Share, Text

Value = bool | Annotated[int, Field(ge=-(2**40), le=2**40)] | Annotated[float, Field(ge=-1e30, le=1e30)] | Text | None


class Pretrain(Section):
    """A small base model, which `rayfed pretrain` trains centrally on rows that no client has (`data.pretrain_share`).

    A run does not read this section. It loads what lies in the folder `model.name`.
    """

    decides = ()

    model: Annotated[dict[str, Value], Field(max_length=100)] | None = None
    """transformers' config of the model: its `model_type`, such as gpt2, llama or vit, and its sizes. The vocabulary is
    the tokenizer's.
    """
    tokenizer: Text = "bytes"
    """For texts: `bytes`, where every byte is a token (that of ByT5, without files); else a local folder or a hub name.
    """
    steps: Annotated[int, Field(ge=1, le=100_000_000)] = 2000
    """Steps of AdamW, each on one batch."""
    batch_size: Batch = 64
    """Rows of a batch."""
    lr: Positive = 1e-3
    """The largest learning rate: it rises linearly in the share `warmup` of the steps, and falls to 0 as a cosine."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: NonNegative = 0.05
    """Weight decay of AdamW."""
    validation: Share = 0.05
    """Share of the rows that are not trained on. The loss on them is measured at the end."""
