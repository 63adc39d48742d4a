"""The gradients of a pack: those of the first step of plain SGD, and the same in any pack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import lowrank

from rayfed.api import prepare
from rayfed.clients.gradients import pack_gradients
from rayfed.clients.local_training import PackMember, train_pack
from rayfed.clients.trainer import Trainer

LR = 0.5


@pytest.mark.parametrize("clip", ["null", "0.1"])
def test_a_gradient_is_what_a_step_of_sgd_takes_in_any_pack(clip: str) -> None:
    plan = prepare(lowrank("client.steps=2", "client.batch_size=3", f"client.clip_norm={clip}"))
    context, start = Trainer(plan).context, plan.start()
    draw = torch.Generator().manual_seed(0)
    vector, support = torch.randn(start.layout.size, generator=draw), start.layout.mask("B")
    members = [
        PackMember(client, start.layout, vector, support, plan.federation.rows_of(client)) for client in range(3)
    ]
    together = pack_gradients(context, members, t=4, step=0)
    one_step = replace(context, settings=context.settings.model_copy(update={"steps": 1}))
    for member, own in zip(members, together, strict=True):
        (alone,) = pack_gradients(context, [member], t=4, step=0)
        (later,) = pack_gradients(context, [member], t=4, step=1)
        (moved,) = train_pack(one_step, [member], lr=LR, t=4)
        torch.testing.assert_close(own.vector, (vector - moved.vector) / LR, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own.vector, alone.vector, atol=1e-6, rtol=1e-6)
        assert not torch.equal(alone.vector, later.vector)  # another batch
        assert not own.vector[~support].any()
        assert own.loss == pytest.approx(moved.loss)
        assert (own.examples, own.steps) == (3, 1)
