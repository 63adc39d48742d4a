"""The loss of the next token against transformers' own loss, row by row; which models are taken, and how they run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from language_models import COMMON, language_model, save_language_model
from torch import nn

from rayfed.config.task import Model
from rayfed.errors import UserError
from rayfed.lora.packed.segments import Segment
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models import next_token
from rayfed.tasks.models.next_token import NextTokens, choose_batching, load_causal_base, padded_next_tokens
from rayfed.tasks.models.unpadded import Padded, Unpadded

LENGTHS = (7, 2, 30, 5, 1)
SEGMENTS = [Segment(0, 2, lengths=LENGTHS[:2]), Segment(1, 3, lengths=LENGTHS[2:])]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    ids = np.random.default_rng(0).integers(3, 300, sum(LENGTHS)).astype(np.int32)
    return Tokens(ids, np.cumsum([0, *LENGTHS]), np.zeros(len(LENGTHS), np.int64), pad_id=0)


def inputs_of(tokens: Tokens, padded: bool) -> dict[str, torch.Tensor]:
    batch = tokens.batch(np.arange(len(tokens)), padded)
    del batch["labels"]
    return batch


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_have_the_losses_of_transformers_padded_or_not(
    kind: str, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model(kind)
    expected = []
    for first, last in pairwise(tokens.offsets):
        ids = torch.tensor(tokens.ids[first:last]).long()[None]
        count = ids.shape[1] - 1
        with torch.no_grad():
            found = model(input_ids=ids, labels=ids)
        right = int((found.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
        expected.append((float(found.loss) * count if count else 0.0, count, right))
    padded = padded_next_tokens(model, inputs_of(tokens, padded=True))
    torch.testing.assert_close(padded, torch.tensor(expected))
    assert choose_batching(model, 64) == Unpadded("all")
    monkeypatch.setattr(next_token, "LOGITS", 384 * 4)  # twelve pieces, the last one shorter
    unpadded = NextTokens(model, Unpadded("all"))(inputs_of(tokens, padded=False), SEGMENTS)
    torch.testing.assert_close(unpadded, torch.tensor(expected))


def test_padding_never_counts(tokens: Tokens) -> None:
    model = language_model("gpt2")
    batch = inputs_of(tokens, padded=True)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 77, batch["input_ids"])}
    found = padded_next_tokens(model, batch)
    assert found[:, 1].tolist() == [n - 1 for n in LENGTHS]
    torch.testing.assert_close(padded_next_tokens(model, other), found)


def test_the_gradient_in_pieces_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias, weights = (torch.randn(*shape, generator=g) for shape in ((50, 8), (50,), (11,)))
    targets = torch.randint(50, (11,), generator=g)
    targets[[3, 10]] = next_token.IGNORED
    states = torch.randn(11, 8, generator=g)
    states[3] = torch.nan  # of a client that diverged; its last token has no target
    gradients = []
    for piece in (2**24, 150):
        monkeypatch.setattr(next_token, "LOGITS", piece)
        x = states.clone().requires_grad_()
        losses, _ = next_token._TokenLoss.apply(x, weight, bias, targets)
        (losses * weights).sum().backward()
        gradients.append(x.grad)
    x = states.clone().requires_grad_()
    wanted = nn.functional.cross_entropy(nn.functional.linear(x, weight, bias), targets, reduction="none")
    (wanted * weights)[targets >= 0].sum().backward()
    others = torch.arange(11) != 3
    for gradient in gradients:
        torch.testing.assert_close(gradient[others], x.grad[others])
        assert not gradient[3].any()
    torch.testing.assert_close(losses[targets >= 0], wanted[targets >= 0])


class Scaled(transformers.GPT2LMHeadModel):
    """Its logits are not those of its output layer alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found


def test_a_model_that_changes_its_logits_runs_padded() -> None:
    config = transformers.GPT2Config(**COMMON, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    found = choose_batching(Scaled(config).eval(), 20)
    assert found == Padded("Scaled: its logits are not those of its output layer alone")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (transformers.BertLMHeadModel, "it is no causal language model: its tokens see later ones"),
        (transformers.BertModel, "it is no causal language model: it lacks the weights cls.predictions."),
    ],
)
def test_other_models_are_refused(tmp_path: Path, model: Any, line: str) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_causal_base(Model(name=str(tmp_path)), 0)
    assert str(error.value).startswith(f"model.name: got {str(tmp_path)!r}, but {line}")


def test_nothing_of_the_output_layer_trains(tmp_path: Path) -> None:
    base = load_causal_base(Model(name=str(save_language_model(tmp_path, "gpt2"))), 0)
    assert (base.heads, base.task_type) == ((), "CAUSAL_LM")
