"""What does not go with a graph is one line that names the setting, its value and what is allowed."""

from __future__ import annotations

import pytest
from small_runs import lowrank

from rayfed.api import prepare
from rayfed.api.plans import build_components
from rayfed.config.marks import settings_digest
from rayfed.errors import UserError
from rayfed.methods import METHODS, method_class
from rayfed.topologies import ALGORITHMS, OwnModels

GRAPH = ("topology.kind=graph", "method.name=ffa_lora", "server.cohort=6")
DEPOSITUM = (*GRAPH, "topology.algorithm=depositum")
TIERS = ("profiles.kind=tiers", "profiles.densities_up=[0.5,1.0]")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("topology.graph=torus",), "topology.graph: got 'torus', but that belongs to topology.kind=graph"),
        (("topology.order=mix_prox",), "topology.order: got 'mix_prox', but that belongs to topology.kind=graph"),
        ((*GRAPH, "topology.graph=line"), "topology.graph: got 'line', but it should be ring, torus, erdos_renyi or"),
        ((*GRAPH, "topology.graph=erdos_renyi"), "topology.edge_probability: got null, but topology.graph=erdos_renyi"),
        ((*GRAPH, "topology.edge_probability=0.5"), "topology.edge_probability: got 0.5, but topology.graph=ring, and"),
        ((*GRAPH, "topology.algorithm=dfedavgm"), "topology.algorithm: got 'dfedavgm', but did you mean dfedavg?"),
        ((*GRAPH, "topology.prox=l1"), "topology.prox: dfedavg has no such option"),
        ((*GRAPH, "method.name=fedhl"), "method.name: got 'fedhl', but on a graph clients average their entries"),
        ((*GRAPH, "server.optimizer=fedadam"), "server.optimizer: got 'fedadam', but there is no server"),
        ((*GRAPH, "server.weights=examples"), "server.weights: got 'examples', but the average counts all clients al"),
        ((*GRAPH, "server.empty_clients=true"), "server.empty_clients: got True, but a client without rows has no gr"),
        ((*GRAPH, "wire.up.density=0.5"), "wire.up.density: got 0.5, but an average of the largest entries"),
        ((*GRAPH, "wire.down.decay=0.9"), "wire.down.density: got 'below 1', but an average of the largest entries"),
        ((*GRAPH, *TIERS), "wire.up.density: got 'below 1', but an average of the largest entries"),
        ((*GRAPH, "wire.down.values=int8"), "wire.down.values: got 'int8', but there is no server, and wire.up.value"),
        ((*GRAPH, "profiles.kind=tiers", "profiles.ranks=[1,2]"), "profiles.kind: got 'tiers', but on a graph neighbo"),
        (
            (*GRAPH, "privacy.kind=local", "privacy.noise_multiplier=0", "client.on_divergence=drop"),
            "privacy.kind: got",
        ),
        ((*GRAPH, "eval.tiers=true"), "eval.tiers: got True, but every client has a model of its own"),
        ((*GRAPH, "eval.diagnostics=true"), "eval.diagnostics: got True, but the clients' models are no updates"),
        (("eval.own_models=2",), "eval.own_models: got 2, but with data.source=lowrank the metrics are those of"),
        (
            ("data.source=stdlib", "partition.kind=iid", "eval.own_models=2"),
            "eval.own_models: got 2, but with fedit on a star all clients have",
        ),
        ((*GRAPH, "objective.name=hidden"), "objective.name: got 'hidden', but"),
        (
            (*DEPOSITUM, "client.steps=null"),
            "client.steps: got None, but depositum needs T0, its number of local steps",
        ),
        ((*DEPOSITUM, "client.optimizer=adamw"), "client.optimizer: got 'adamw', but an adaptive step breaks the grad"),
        ((*DEPOSITUM, "client.weight_decay=0.1"), "client.weight_decay: got 0.1, but depositum has topology.prox for"),
        ((*DEPOSITUM, "client.on_divergence=drop"), "client.on_divergence: got 'drop', but depositum tracks the grad"),
        ((*DEPOSITUM, "objective.name=fedprox"), "objective.name: got 'fedprox', but topology.algorithm=depositum al"),
        (
            (*DEPOSITUM, "topology.prox=l1"),
            "topology.prox_weight: got 0.0, but topology.prox is l1; allowed is above 0",
        ),
        ((*DEPOSITUM, "topology.prox_weight=0.1"), "topology.prox_weight: got 0.1, but topology.prox is none; allowed"),
        (
            (*DEPOSITUM, "topology.prox_weight=-1.0"),
            "topology.prox_weight: got -1.0, but it should be a number of at least 0",
        ),
        (
            (*DEPOSITUM, "topology.prox=mcp", "topology.prox_weight=0.1", "topology.mcp_theta=0.05"),
            "topology.mcp_theta: got 0.05, but it must be above client.lr=0.05",
        ),
        ((*DEPOSITUM, "topology.order=mix"), "topology.order: got 'mix', but it should be prox_mix or mix_prox"),
    ],
)
def test_one_line_says_what_does_not_fit(settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError) as refused:
        build_components(lowrank(*settings))
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_a_graph_that_does_not_fit_the_data_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^topology\.edge_probability: got 0.01, but the graph that seed=0 draws is not"
    ):
        prepare(lowrank(*GRAPH, "topology.graph=erdos_renyi", "topology.edge_probability=0.01"))


def test_methods_whose_entries_mean_the_same_everywhere_are_allowed() -> None:
    assert {name: mixing for name in METHODS if (mixing := method_class(name).mixing)} == {
        "fed_sb": "exact",
        "fedit": "biased",
        "ffa_lora": "exact",
    }


def test_a_star_has_no_graph_and_the_digest_that_it_had() -> None:
    star = lowrank()
    plan = prepare(star)
    assert plan.topology is None
    assert not isinstance(plan.method, OwnModels)
    settings = star.model_dump(mode="json")
    assert settings["topology"]["kind"] == "star"
    assert settings_digest({key: value for key, value in settings.items() if key != "topology"}) == star.digest()
    digests = {lowrank(*GRAPH, f"topology.algorithm={name}").digest() for name in ALGORITHMS}
    assert len(digests | {star.digest()}) == 1 + len(ALGORITHMS)
