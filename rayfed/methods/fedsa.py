"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A is shared; B and the head stay with each client for ever.

    A <- sum_k p_k A_k,   p_k ~ n_k        averaged and sent, r in entries a layer both ways
    B_k, head_k                            trained together with A; never sent, never averaged

A client starts a round from the global A and its own B_k and head_k, as its last round left them. Before its first
round they are those of the initial adapter, the same for all clients. The server optimizer moves only A. The simulator
stores B_k and head_k of every client that took part, in `state.clients`.

There is no single global model. The method's own metric is the mean over clients of what each client's own model
achieves. Evaluation and export of one model use a stand-in: the global A, with the plain mean of B and of the head over
the clients that took part so far (the initial ones before any did). No options.

Source: secondary; deviates: the stand-in is ours.
"""

from __future__ import annotations

from rayfed.methods._own_parts import OwnParts


class FedSA(OwnParts):
    """Average A only. The state's vector holds the global A, and the initial B and head, which never change."""

    own_parts = ("B", "head")
    paper = "arXiv 2410.01463"
    summary = "average A; B and the head stay with the client"
    traffic_down = traffic_up = "r in"
    source = "secondary"
    refuses_adapter = "B and the head are each client's own and never travel"
    secure_aggregation = True
    refuses_privacy = "the model that it exports has a mean of the clients' own B and heads, which gets no noise"
