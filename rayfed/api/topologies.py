"""From the section `topology` to the graph of a run: what goes together is checked here."""

from __future__ import annotations

from collections.abc import Iterator

from rayfed import methods, topologies
from rayfed.config import Experiment
from rayfed.errors import allowed
from rayfed.lora.adapter import scale_of
from rayfed.methods import METHODS, Method
from rayfed.profiles.client_profiles import ClientProfiles
from rayfed.profiles.profile import Profile
from rayfed.tasks.data.federation import Federation
from rayfed.topologies import Algorithm, Gossip, OwnModels, make_graph

FORMATS = ("fp32", "bf16", "fp16", "int8")
"""Number formats whose rounding is a function of the values alone."""

MOST_EXAMINED = 1000  # clients of a graph whose spectral gap is computed


def build_algorithm(experiment: Experiment, method: Method, profiles: ClientProfiles) -> Algorithm | None:
    """The algorithm of a topology without a server; None for a star. UserError where settings do not go with it."""
    settings, name = experiment.topology, experiment.method.name
    if settings.kind == "star":
        if experiment.eval.own_models is not None and not method.personal:
            what = f"with {name} on a star all clients have one model; null is allowed"
            raise allowed("eval.own_models", experiment.eval.own_models, what)
        return None
    algorithm = topologies.build(settings.algorithm, **settings.options)
    algorithm.check(settings.algorithm, experiment.client)
    if method.mixing is None:
        others = ", ".join(other for other in METHODS if methods.method_class(other).mixing)
        what = (
            "on a graph clients average their entries with neighbours, and here these mean something else at each of "
            f"them; allowed with topology.kind=graph are {others}"
        )
        raise allowed("method.name", name, what)
    if experiment.objective.name not in algorithm.objectives:
        what = f"topology.algorithm={settings.algorithm} allows {', '.join(algorithm.objectives)}"
        raise allowed("objective.name", experiment.objective.name, what)
    if profiles.mixed_ranks:
        what = "on a graph neighbours average entry by entry, so all clients have one rank; same is allowed"
        raise allowed("profiles.kind", experiment.profiles.kind, what)
    for field, value, wanted, why in _meaningless(experiment, profiles):
        if value not in wanted:
            choices = " or ".join(map(str, wanted)).lower()
            raise allowed(field, value, f"{why}; with topology.kind=graph {choices} is allowed")
    return algorithm


def on_graph(
    experiment: Experiment, algorithm: Algorithm, method: Method, federation: Federation
) -> tuple[Gossip, OwnModels, list[str]]:
    """The graph over the clients that hold data, the method with a model for each of them, and lines for the log.

    UserError where the graph does not fit the number of clients, or is not connected.
    """
    settings, lora, clients = experiment.topology, experiment.lora, federation.holders.tolist()
    graph = make_graph(settings.graph, clients, settings.edge_probability, experiment.seed)
    profile = Profile(-1, lora.rank, scale_of(lora.rank, lora.alpha, lora.rslora))
    gap = f", spectral gap {graph.spectral_gap():.3g}" if len(clients) <= MOST_EXAMINED else ""
    notes = [
        f"topology.graph={settings.graph}: {len(clients)} clients, {graph.edges} directed edges{gap}; "
        f"{experiment.server.cohort} clients are active in a round"
    ]
    if method.mixing == "biased" and lora.train == "all":
        notes.append(
            f"method.name={experiment.method.name}: neighbours average B and A one by one, and the product of means is "
            "not the mean of products, so the average is biased; ffa_lora and fed_sb average exactly"
        )
    return Gossip(graph, algorithm), OwnModels(method, profile, clients, algorithm.vectors), notes


def _meaningless(
    experiment: Experiment, profiles: ClientProfiles
) -> Iterator[tuple[str, object, tuple[object, ...], str]]:
    """(setting, its value, what is allowed, why) of the settings that say nothing, or something wrong, on a graph."""
    server, wire, rounds = experiment.server, experiment.wire, experiment.server.rounds
    no_server = "there is no server"
    yield "server.optimizer", server.optimizer, ("auto", "fedavg"), no_server
    yield "server.weights", server.weights, ("auto", "uniform"), "the average counts all clients alike"
    yield "server.empty_clients", server.empty_clients, (False,), "a client without rows has no gradient"
    yield "channel.kind", experiment.channel.kind, ("lossless",), "each client hears its neighbours alone"
    sequence = experiment.partition.sequence
    what = "clients without rows of an experience would have no gradient"
    yield "partition.sequence", None if sequence is None else "a section", (None,), what
    yield "privacy.kind", experiment.privacy.kind, ("none",), "no guarantee is known here for what neighbours see"
    for way in ("down", "up"):
        own = getattr(wire, way).density
        sparse = own if own < 1 or not profiles.may_be_sparse(way, rounds) else "below 1"
        why = "an average of the largest entries of each neighbour does not come to a consensus"
        yield f"wire.{way}.density", sparse, (1.0,), why
    yield "wire.down.values", wire.down.values, ("fp32",), f"{no_server}, and wire.up.values is the format of messages"
    yield "wire.up.values", wire.up.values, FORMATS, "messages between clients have no key for random rounding"
    yield "eval.tiers", experiment.eval.tiers, (False,), "every client has a model of its own"
    yield "eval.diagnostics", experiment.eval.diagnostics, (False,), "the clients' models are no updates of one model"
    prox = experiment.topology.options.get("prox", "none") if experiment.lora.train == "head" else "none"
    yield "topology.prox", prox, ("none",), "lora.train=head has no adapters, on which it acts"
