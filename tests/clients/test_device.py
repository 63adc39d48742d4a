"""What training asks of a GPU, without one: nothing waits, nothing is mixed, and neighbours start no kernels.

See `device_watch`: these tests compute nothing. That the numbers are right, the same code shows on a CPU.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from device_watch import DEVICE, Watch
from small_runs import CLASSIFICATION

from rayfed.api import prepare
from rayfed.clients.local_training import PackMember, TrainingContext, train_pack
from rayfed.clients.messages import EvalJob
from rayfed.clients.trainer import Trainer
from rayfed.config.training import Client
from rayfed.lora.adapter import fresh_adapter
from rayfed.lora.packed.stack import Stack
from rayfed.lora.peft import layer_shape
from rayfed.objectives import ClassStatistics, ClientRound, Message, Plain, Stateful
from rayfed.objectives.fedbc import FedBC
from rayfed.objectives.fedga import FedGA
from rayfed.objectives.fedglomo import FedGlomo
from rayfed.objectives.fedhpl import FedHPL
from rayfed.objectives.fedimpro import FedImpro
from rayfed.objectives.fedlc import FedLC
from rayfed.objectives.fedprox import FedProx
from rayfed.objectives.scaffold import Scaffold
from rayfed.tasks.data.tokens import Tokens
from rayfed.tasks.models.unpadded import Unpadded, UnpaddedModel

CLASSES, ROWS, BATCH = 4, 32, 4
OBJECTIVES = [FedProx(), FedLC(), FedLC(1.0, "others"), FedGA(), FedBC(), Scaffold(), FedGlomo(), FedImpro(), FedHPL()]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"num_labels": CLASSES, "vocab_size": 60, "pad_token_id": 0}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **SIZE))


def gpt2():
    config = transformers.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    return transformers.GPT2ForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(**TEXT, **SIZE, num_key_value_heads=1, use_cache=False)
    return transformers.LlamaForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(**SIZE, num_labels=CLASSES, image_size=32, patch_size=16)
    return transformers.ViTForImageClassification(config)


def minilm():
    """Of MiniLM's size, without values."""
    with DEVICE:
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                num_labels=CLASSES, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
            )
        )


def numbers_of(objective):
    """The numbers of a message of the objective; None if it has none."""
    width = {"features": SIZE["hidden_size"], "outputs": CLASSES}.get(objective.measures)
    if width is None:
        return None
    return ClassStatistics(torch.ones(CLASSES), *torch.ones(2, CLASSES, width)).numbers(objective.variances)


KINDS = {  # how it runs (None: rows of one length), its head, the layers that get adapters
    bert: (Unpadded("first"), "classifier", ("query", "value", "intermediate.dense")),
    gpt2: (Unpadded("last"), "score", ("c_attn", "c_fc")),
    llama: (Unpadded("last"), "score", ("q_proj", "v_proj")),
    vit: (None, "classifier", ("q_proj", "v_proj")),
}
SIZES = {**KINDS, minilm: (Unpadded("first"), "classifier", ("query", "value"))}


class Images:
    """Random pictures, all of one size."""

    def __init__(self, count):
        self.count, self.lengths = count, np.full(count, 5)

    def batch(self, rows, padded):
        g = torch.Generator().manual_seed(int(rows[0]))
        return {
            "pixel_values": torch.randn(len(rows), 3, 32, 32, generator=g),
            "labels": torch.arange(len(rows)) % CLASSES,
        }


def texts(count, longest=12):
    """Texts of 2 to 12 tokens, or ``longest``: no two clients have equally many."""
    draw = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(draw.integers(2, longest + 1, count))])
    return Tokens(draw.integers(1, 60, offsets[-1]).astype(np.int32), offsets, draw.integers(0, 4, count))


def watched(
    build, clients, *, ranks=(4,), steps=(2,), dropout=0.0, support=1.0, optimizer="adamw", dtype=None,
    compute=torch.float32, batch=BATCH, longest=12, objective=None,
):  # fmt: skip
    """Trains so many clients on the stand-in, with the ranks and steps in turn, and returns what the watch saw."""
    torch.manual_seed(0)
    how, head, targets = SIZES[build]
    model = build().eval()
    model = (model.to(dtype) if dtype else model).to(DEVICE)
    layers = {name: layer_shape(module) for name, module in model.named_modules() if name.endswith(targets)}
    values = {f"{head}.{name}": torch.zeros(t.shape) for name, t in model.get_submodule(head).named_parameters()}
    stack = Stack(model, layers, [head], dropout, compute)
    flat = UnpaddedModel(model, how) if how else None

    def forward(inputs):
        if flat is not None:
            return flat(inputs, stack.batch.segments)
        return model(**{name: t.to(dtype) if dtype else t for name, t in inputs.items()}).logits

    members = []
    for client in range(clients):
        adapter = fresh_adapter(layers, values, ranks[client % len(ranks)], 1.0, seed=client)
        trains = torch.rand(adapter.layout.size, generator=torch.Generator().manual_seed(client)) < support
        rows = np.arange(client * ROWS, client * ROWS + batch * steps[client % len(steps)])
        vector, context = adapter.flatten(), None
        if isinstance(objective, Stateful):
            received = Message(vector * trains, numbers_of(objective))
            context = ClientRound(vector, trains, torch.full_like(vector, 0.1), received)
        members.append(PackMember(client, adapter.layout, vector, trains, rows, context=context))
    settings = Client(batch_size=batch, clip_norm=1.0, optimizer=optimizer, weight_decay=0.1)
    watch = Watch()
    data = Images(clients * ROWS) if build is vit else texts(clients * ROWS, longest)
    context = TrainingContext(
        stack, forward, CLASSIFICATION, data, flat is None, settings, 0, DEVICE, objective=objective or Plain()
    )
    with watch:
        train_pack(context, members, lr=0.1, t=0)
    return watch, len(stack.parameters)


@pytest.mark.parametrize("case", [{}, {"dropout": 0.1, "dtype": torch.bfloat16}], ids=["plain", "dropout, bf16"])
@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
def test_more_clients_start_no_more_kernels(build, case):
    few, _ = watched(build, 3, ranks=(4, 2), steps=(1,), **case)
    many, _ = watched(build, 11, ranks=(4, 2), steps=(1,), **case)
    assert sum(few.kernels.values()) > 100
    assert few.kernels == many.kernels


@pytest.mark.parametrize(
    "case", [{}, {"steps": (1, 3, 2), "support": 0.5, "optimizer": "sgd"}], ids=["plain", "ragged"]
)
@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
def test_nothing_waits_for_the_device_but_the_results_at_the_end(build, case):
    for clients in (2, 5):
        watch, tensors = watched(build, clients, ranks=(4, 1), **case)
        assert watch.waits == {"_to_copy": tensors + 1}  # and the losses
        assert not watch.mixed


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_objective_waits_for_nothing_and_costs_kernels_by_the_step(objective):
    (few, tensors), (many, _) = (watched(bert, clients, steps=(1, 2), objective=objective) for clients in (4, 8))
    assert few.kernels == many.kernels != watched(bert, 4, steps=(1, 2))[0].kernels
    assert few.waits == {"_to_copy": tensors + 1}  # values and losses, at the end
    assert not few.mixed


def test_clients_that_end_at_different_steps_cost_kernels_by_the_step_not_by_the_client():
    few, _ = watched(bert, 6, steps=(1, 2, 3))
    many, _ = watched(bert, 12, steps=(1, 2, 3))
    assert few.kernels == many.kernels


def test_an_evaluation_waits_only_at_its_end_however_many_its_batches(tiny):
    from rayfed import wire
    from rayfed.lora.adapter import Adapter, LowRank

    plan = prepare(tiny("eval.batch_size=4"))
    trainer = Trainer(replace(plan, engine=plan.engine.model_copy(update={"device": "meta"})))
    layers = {n: LowRank(torch.ones(o, 2), torch.ones(2, i), 1.0) for n, (o, i) in plan.model.shapes.items()}
    adapter = Adapter(layers, plan.model.head)
    payload, found = wire.encode(adapter.flatten()), []
    for rows in (8, 40):
        with Watch() as watch:
            trainer.execute(EvalJob("test", 0, rows, adapter.layout), [payload])
        found.append(watch.waits)
        assert not watch.mixed
    assert found[0] == found[1]
    assert sum(found[0].values()) == 4  # loss, count, predictions, labels


def step_of_minilm(clients):
    """Kernels and GB of a step of so many clients in bfloat16, 16 texts of 2 to 40 tokens each: those of the second."""
    form = {"ranks": (16,), "dtype": torch.bfloat16, "compute": torch.bfloat16, "batch": 16, "longest": 40}
    one, two = (watched(minilm, clients, steps=(steps,), **form)[0] for steps in (1, 2))
    return sum(two.kernels.values()) - sum(one.kernels.values()), (two.bytes - one.bytes) / 1e9


def test_a_step_of_minilm_starts_few_kernels():
    """docs/performance.md has these figures; `pytest -s` prints them."""
    found = {clients: step_of_minilm(clients) for clients in (1, 8, 32)}
    print({clients: f"{kernels} kernels, {gb:.2f} GB" for clients, (kernels, gb) in found.items()})
    kernels, gb = zip(*found.values())
    assert kernels[0] <= kernels[1] == kernels[2] <= 325
    assert gb[2] < 32 * gb[0]  # the weights are read once
