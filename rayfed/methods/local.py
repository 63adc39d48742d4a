"""Local training: every client trains by itself for ever. The baseline that any federation has to beat.

    A_k, B_k, head_k       trained from where the last round of client k left them; never sent, never averaged

Before its first round a client has the initial adapter, the same for all clients. No entry travels: a message each way
is the header alone, which says that the client takes part. With `objective.name: fedhpl` clients learn from each
other's logits.

There is no single global model. The method's own metrics are `eval.clients` and `eval.own_models`. Evaluation and
export of one model use a stand-in, the plain mean of each factor and of the head over the clients that took part, and
nothing promises that this model is any good. No options.

Source: ours; deviates: there is no paper.
"""

from __future__ import annotations

from rayfed.methods._own_parts import OwnParts


class Local(OwnParts):
    """Average nothing. The state's vector holds the initial adapter, which never changes."""

    own_parts = ("A", "B", "head")
    summary = "no federation: every client trains by itself"
    traffic_down = traffic_up = "0"
    source = "ours"
    optimizers = ("fedavg",)
    secure_aggregation = True
    ignores_weights = "nothing is averaged"
    refuses_adapter = "all of it is each client's own and never travels"
    refuses_privacy = "the model that it exports is a mean of the clients' own, which gets no noise"
