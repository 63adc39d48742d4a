"""Causal language models: loading, and the loss of the next token.

A row's outputs are three sums over its counted tokens: their losses in nats, their number, and how many of them have
the largest logit. All tokens of a row count but the first, which nothing predicts; with `targets` in the batch, only
those that are not `IGNORED` there. Padding never counts.

Without padding, logits are computed for a few tokens at a time, and with them the gradient of these tokens' states. So
no more than `LOGITS` logits are ever in memory. torch's linear_cross_entropy does the same with options=, but for one
loss a token it computes the logits again for the gradient, in smaller pieces: on one CPU thread, for 1024 tokens of
width 256 and a vocabulary of 50257, it takes 4.9 s and 51 MB. It is 1.0 s and 170 MB here, and 1.1 s and 564 MB with
all logits at once. A layer under an adapter gives its logits at once, and so does a padded batch.

Shape suffixes: T tokens of the batch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed import seeding
from rayfed.config.task import Model
from rayfed.errors import allowed, first_line
from rayfed.lora.packed.segments import Segment
from rayfed.lora.peft import output_layer
from rayfed.tasks.data.tokens import IGNORED
from rayfed.tasks.models.base import FrozenBase, check_model, from_pretrained, logits_of, model_path, quiet
from rayfed.tasks.models.folder import check_weights
from rayfed.tasks.models.unpadded import TOLERANCE, Padded, Unpadded, UnpaddedEncoder, encoder_of, random_texts
from rayfed.tasks.models.varlen_attention import PackedSequences

LOGITS = 2**24  # computed at once: 64 MiB in float32


def load_causal_base(settings: Model, seed: int) -> FrozenBase:
    """Loads a causal language model: float32, frozen, in evaluation mode, on the CPU, without a head to train.

    Raises UserError if it cannot be loaded, lacks weights, has weights that are not finite or a BatchNorm, or if its
    tokens see later ones. Pickled weights are never loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_pretrained(AutoConfig, settings)
    if (folder := Path(model_path(settings))).is_dir():
        with quiet():
            check_weights(settings, folder, config, AutoModelForCausalLM)
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "model.init"))
        model, report = from_pretrained(AutoModelForCausalLM, settings, config=config, **options)
    for name in sorted(map(str, report["missing_keys"])):
        raise allowed("model.name", settings.name, f"it is no causal language model: it lacks the weights {name}")
    check_model(model, settings.name)
    base = FrozenBase(model, (), task_type="CAUSAL_LM")
    with torch.no_grad(), quiet():  # it may warn of a missing mask
        logits = logits_of(model(input_ids=torch.tensor([[1, 1, 0], [1, 1, 1]])))[:, :-1]
    if not torch.allclose(logits[0], logits[1], rtol=TOLERANCE, atol=TOLERANCE * float(logits.abs().max())):
        raise allowed("model.name", settings.name, "it is no causal language model: its tokens see later ones")
    return base


class NextTokens(UnpaddedEncoder):
    """Runs a causal language model on batches without padding. Until `release`, the model takes no other batches."""

    def __init__(self, model: nn.Module, batching: Unpadded) -> None:
        super().__init__(model)
        self.head: Any = output_layer(model)
        self.first_position = batching.first_position

    def __call__(self, inputs: dict[str, Tensor], segments: Sequence[Segment]) -> Tensor:
        """(rows, 3): the sums of a batch's rows. ``segments`` give the length of each row."""
        ids_T = inputs["input_ids"][0]
        sequences = PackedSequences([s.lengths for s in segments if s.lengths is not None], ids_T.device)
        states_1TD = self.states(inputs, sequences)
        if "targets" in inputs:
            targets_T = inputs["targets"][0]
        else:
            ends = sequences.offsets()[1:] - 1
            targets_T = ids_T.roll(-1).index_fill_(0, ends.long(), IGNORED)
        if isinstance(self.head, nn.Linear):
            losses, right = _TokenLoss.apply(states_1TD[0], self.head.weight, self.head.bias, targets_T)
        else:
            losses, right = _token_loss(self.head(states_1TD)[0], targets_T)
        sums = _by_text(torch.stack([losses, right], 1), sequences)
        counts = _by_text((targets_T != IGNORED).float()[:, None], sequences)
        return torch.cat([sums[:, :1], counts, sums[:, 1:]], 1)

    def states(self, inputs: dict[str, Tensor], sequences: PackedSequences) -> Tensor:
        """(1, T, D): the states from which the output layer computes logits."""
        positions = inputs["position_ids"] + self.first_position
        with sequences.in_use():
            found = self.encoder(input_ids=inputs["input_ids"], position_ids=positions, attention_mask=None)
        states: Tensor = found.last_hidden_state
        return states

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the `with` block the model is as it was, and takes padded batches."""
        self.release()
        try:
            yield
        finally:
            self._install()


def _by_text(values_TD: Tensor, sequences: PackedSequences) -> Tensor:
    """(rows, D): the sums over each row's tokens."""
    texts = sequences.texts()
    return texts.pad(values_TD).view(texts.count, texts.longest, -1).sum(1)


def padded_next_tokens(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(rows, 3): the same sums of a padded batch, from the logits that the model gives."""
    logits = logits_of(model(**{name: value for name, value in inputs.items() if name != "targets"}))[:, :-1]
    if "targets" in inputs:
        targets = inputs["targets"][:, :-1]
    else:
        targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, IGNORED)
    losses, right = _token_loss(logits.flatten(0, 1), targets.flatten())
    counted = (targets != IGNORED).float()
    return torch.stack([losses.view_as(counted).sum(1), counted.sum(1), right.view_as(counted).sum(1)], 1)


@torch.no_grad()
def choose_batching(model: nn.Module, longest: int) -> Unpadded | Padded:
    """How to run the model without padding on texts of up to ``longest`` tokens, or why it needs padding.

    The answer depends on the model alone: a few random texts must give the same states with and without padding, and
    the output layer alone must give the model's logits. The model is left unchanged.
    """
    name = type(model).__name__
    try:
        encoder, head = encoder_of(model), output_layer(model)
        tokens, segments = random_texts(encoder.config, longest)
        rows = np.arange(len(tokens))
        padded, unpadded, short = (tokens.batch(*how) for how in ((rows, True), (rows, False), (rows[1:], True)))
        for batch in (padded, unpadded, short):
            del batch["labels"]
        logits = logits_of(model(**short))
        if head is None or not _close(head(encoder(**short).last_hidden_state), logits):
            return Padded(f"{name}: its logits are not those of its output layer alone")
        states = encoder(**padded).last_hidden_state[padded["attention_mask"].bool()]
    except Exception as error:  # any model may be configured; whatever fails here, it can be run with padding
        return Padded(f"{name}: {first_line(error)}")
    sequences = PackedSequences([s.lengths for s in segments if s.lengths is not None], states.device)
    reason = "its states differ without padding"
    for position in (0, (encoder.config.pad_token_id or 0) + 1):  # as in OPT, positions may start after the padding's
        batching = Unpadded("all", position)
        runner = NextTokens(model, batching)
        try:
            if _close(runner.states(unpadded, sequences)[0], states):
                return batching
        except Exception as error:
            reason = first_line(error)
        finally:
            runner.release()
    return Padded(f"{name}: {reason}")


def _close(found: Tensor, wanted: Tensor) -> bool:
    same = found.shape == wanted.shape
    return same and bool(((found - wanted).abs() <= TOLERANCE * float(wanted.abs().max())).all())


def _token_loss(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """((T,), (T,)) float32: each token's loss, and 1 where the target has the largest logit; 0 where it is ignored."""
    losses = nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="none", ignore_index=IGNORED)
    return losses, (logits_TV.argmax(-1) == targets_T).float()


class _TokenLoss(torch.autograd.Function):
    """`_token_loss` of a frozen linear layer's logits, a few tokens at a time, with the gradient for the states."""

    @staticmethod
    def forward(
        ctx: Any, states_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, right, gradients = [], [], []
        size = max(1, LOGITS // len(weight_VD))
        for states, targets in zip(states_TD.split(size), targets_T.split(size)):
            logits = nn.functional.linear(states, weight_VD, bias_V).float()
            ignored, known = targets == IGNORED, targets.clamp(min=0)
            total = logits.logsumexp(-1)
            losses.append((total - logits.gather(1, known[:, None])[:, 0]).masked_fill_(ignored, 0))
            right.append((logits.argmax(-1) == targets).float())
            if ctx.needs_input_grad[0]:  # softmax of the logits, minus 1 at the target, times the weights
                shares = logits.sub_(total[:, None]).exp_().to(weight_VD.dtype)
                gradient = torch.mm(shares, weight_VD).sub_(weight_VD.index_select(0, known))
                gradients.append(gradient.masked_fill_(ignored[:, None], 0))
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        rights = torch.cat(right)
        ctx.mark_non_differentiable(rights)
        return torch.cat(losses), rights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses_T: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        return (dlosses_T[:, None] * gradient_TD).to(gradient_TD.dtype), None, None, None
