"""What every objective with state promises and refuses."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from small_runs import LOWRANK, lowrank

from rayfed.api.plans import build_components
from rayfed.config import validate
from rayfed.errors import UserError
from rayfed.objectives import OBJECTIVES, ClientRound, Message, Received, Stateful, build
from rayfed.objectives.fedbc import FedBC
from rayfed.objectives.fedglomo import FedGlomo
from rayfed.objectives.scaffold import Scaffold

STATEFUL = ["fedbc", "fedglomo", "scaffold"]  # they add up entries of adapters
BY_CLASS = ["fedhpl", "fedimpro"]  # statistics by class travel
every_one = pytest.mark.parametrize("name", STATEFUL)
N = 8
UPLOADED = torch.arange(N) < 6


def client(stored: torch.Tensor | None = None, received: Message | None = None) -> ClientRound:
    start = torch.randn(N, generator=torch.Generator().manual_seed(1))
    return ClientRound(start, UPLOADED, torch.full((N,), 0.5), received or Message(), stored)


def test_these_are_all() -> None:
    needed = {"tail_penalty": {"weight": 0.1, "start": 1}}
    assert [name for name in OBJECTIVES if isinstance(build(name, **needed.get(name, {})), Stateful)] == sorted(
        [*STATEFUL, *BY_CLASS]
    )
    assert not any(build(name).entrywise for name in BY_CLASS)  # type: ignore[attr-defined]


@every_one
def test_the_first_participation_is_plain_training(name: str) -> None:
    objective, new = build(name), client()
    assert isinstance(objective, Stateful)
    assert objective.send({}) == Message()
    assert objective.twin(new) is None
    if terms := objective.terms(new):
        shaped = {key: value[None] if value.ndim else value.view(1, 1) for key, value in terms.items()}
        assert not objective.correction(new.start[None] + 1, new.start[None], shaped).any()


@every_one
def test_a_client_without_steps_has_nothing_to_say(name: str) -> None:
    objective, new = build(name), client(received=Message(torch.ones(N) * UPLOADED))
    message = objective.message(new, new.start, 0)
    assert message.vector is None or not message.vector.any()
    assert message.numbers is None or not message.numbers.any()


def test_equal_control_variates_correct_nothing() -> None:
    c = torch.randn(N) * UPLOADED
    (variates,) = Scaffold().terms(client(c, Message(c))).values()
    assert not variates.any()


def test_a_pull_that_is_fixed_keeps_gamma() -> None:
    known = torch.tensor([2.0, 0.5])
    for grows, gamma in ((True, 0.7), (False, 0.5)):
        stored = FedBC(rate=0.1, gamma_grows=grows).store(client(known), Message(numbers=torch.tensor([3.0])))
        torch.testing.assert_close(stored, torch.tensor([3.0, gamma]))


def test_the_dual_variable_of_fedbc_counts_what_is_uploaded() -> None:
    known = client(torch.tensor([0.5, 1.0]))
    sent = FedBC(rate=0.1).message(known, known.start + 1, 3)
    assert sent.numbers is not None
    assert sent.numbers.item() == pytest.approx(0.5 + 0.1 * (6 - 1.0))
    assert FedBC(rate=0.1).message(client(torch.tensor([0.5, 99.0])), known.start, 3).numbers == 0


def test_fedbc_weighs_by_the_dual_variables() -> None:
    assert FedBC().weights([torch.tensor([2.0]), torch.tensor([0.0])]) == [2.0, 0.0]
    assert FedBC().weights([torch.zeros(1)] * 3) == [1.0] * 3


@pytest.mark.parametrize("vectors", ["one", "two"])
def test_a_twin_that_is_not_finite_makes_the_client_diverge(vectors: Literal["one", "two"]) -> None:
    known = client(received=Message(torch.ones(N)))
    twin = known.start.clone()
    assert FedGlomo(vectors=vectors).combined(known, known.start, twin).isfinite().all()
    twin[2] = torch.inf
    assert not FedGlomo(vectors=vectors).combined(known, known.start, twin).isfinite().all()


def test_the_server_half_changes_no_tensor_in_place() -> None:
    sums = Received(2, torch.ones(N, dtype=torch.float64), [])
    c = torch.ones(N)
    assert Scaffold().absorb({"c": c}, sums, torch.zeros(N), 4)["c"].tolist() == [1.25] * N
    assert c.tolist() == [1.0] * N
    u = torch.ones(3)
    state = {"u.W": u}
    assert FedGlomo(0.2).advance(state, "W", torch.zeros(3), torch.ones(3)).tolist() == pytest.approx([1.8] * 3)
    assert u.tolist() == [1.0] * 3


OWN = "objective.name: got '{name}', but"
GAUGE = "entry i of the adapter does not mean the same in every round and for every client of"
TIERS = ("profiles.kind=tiers", "profiles.ranks=[1,2]")
PRIVATE = ("privacy.kind=local", "client.on_divergence=drop", "privacy.noise_multiplier=1.0")
SGD, ADDS = ["fedglomo", "scaffold"], ["fedbc", "fedglomo"]
REFUSED = [
    (("method.name={moving}",), f"{OWN} {GAUGE}", STATEFUL),
    (("method.name=padded_changes", *TIERS), f"{OWN} all clients must have one rank", STATEFUL),
    (PRIVATE, f"{OWN} what it sends beside", STATEFUL),
    (("server.weights=examples",), "server.weights: got 'examples', but {name} allows auto and uniform", STATEFUL),
    (("server.optimizer=sgd",), "server.optimizer: got 'sgd', but {name} allows auto and fedavg", ADDS),
    (("client.optimizer=adamw",), "client.optimizer: got 'adamw', but {name}", SGD),
    (("client.momentum=0.9",), "client.momentum: got 0.9, but {name}", SGD),
    (("client.clip_norm=1.0",), "client.clip_norm: got 1.0, but {name}", SGD),
    (("wire.down.density=0.5",), OWN, SGD),
    (("profiles.kind=tiers", "profiles.densities_down=[0.5,1.0]"), OWN, SGD),
    (("wire.up.density=0.5",), f"{OWN} its momentum needs", ["fedglomo"]),
]
CASES = [(name, settings, says) for settings, says, names in REFUSED for name in names]
MOVING = ["rac_lora", "rolora", "fedsa", "slora"]
BY_PRODUCTS = ["fedex_lora", "fedhl", "flexlora", "flora", "hetlora"]  # fedbc works in the space of products, too


def refusal(name: str, *settings: str) -> str:
    with pytest.raises(UserError) as refused:
        build_components(lowrank(f"objective.name={name}", *settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("name", "settings", "says"), CASES, ids=lambda case: str(case)[:40])
def test_what_does_not_go_together_is_one_line(name: str, settings: tuple[str, ...], says: str) -> None:
    methods = MOVING if name == "fedbc" else [*MOVING, *BY_PRODUCTS]
    for moving in methods if "{moving}" in settings[0] else [""]:
        found = refusal(name, *(setting.format(moving=moving) for setting in settings))
        assert found.startswith(says.format(name=name)), found


def test_what_goes_together() -> None:
    sparse = ("wire.down.density=0.5", "wire.up.density=0.5")
    for settings in (
        ("objective.name=fedbc", "client.optimizer=adamw", *sparse),
        ("objective.name=scaffold", "wire.up.density=0.5", "server.optimizer=fedadam"),
        ("objective.name=fedglomo", "wire.up.values=bf16"),
    ):
        parts = build_components(lowrank(*settings))
        assert isinstance(parts.objective, Stateful)


@every_one
def test_auto_is_what_the_objective_allows(name: str) -> None:
    parts = build_components(lowrank("method.name=flasc", f"objective.name={name}"))
    assert parts.server_optimizer == ("adamw" if name == "scaffold" else "fedavg")
    assert type(parts.weighting).__name__ == "Uniform"


TEXTS = {"data": {"source": "stdlib", "task": "text_classification"}, "method": {"name": "local"}}
OWN_ONE = "its statistics are of one class a row: allowed with"
AIR = {"kind": "over_the_air", "noise": 0.0}
NOISE = {"kind": "local", "noise_multiplier": 1.0}
BY_CLASS_REFUSED = [
    ("fedimpro", {"data": {"source": "lowrank"}}, f"objective.name: got 'fedimpro', but {OWN_ONE}"),
    ("fedhpl", {"data": {"source": "lowrank"}}, "objective.name: got 'fedhpl', but its loss takes the place of"),
    ("fedhpl", {"method": {"name": "fedit"}}, "method.name: got 'fedit', but fedhpl sends logits in place of adapters"),
    ("fedhpl", {"client": {"label_smoothing": 0.1}}, "client.label_smoothing: got 0.1, but objective.name=fedhpl has"),
    *(
        (name, {"partition": {"sequence": {"experiences": 2}}}, f"objective.name: got '{name}', but what it stores")
        for name in BY_CLASS
    ),
    ("fedimpro", {"topology": {"kind": "graph"}}, "objective.name: got 'fedimpro', but topology.algorithm="),
    ("fedimpro", {"channel": AIR}, "objective.name: got 'fedimpro', but its clients send more"),
    ("fedimpro", {"privacy": NOISE}, "objective.name: got 'fedimpro', but what it sends beside"),
]


@pytest.mark.parametrize(("name", "settings", "says"), BY_CLASS_REFUSED, ids=lambda case: str(case)[:50])
def test_what_does_not_go_with_statistics_by_class_is_one_line(
    name: str, settings: dict[str, object], says: str
) -> None:
    base = TEXTS if name == "fedhpl" else {**TEXTS, "method": {"name": "fedit"}}
    if settings.get("data") == {"source": "lowrank"}:
        base = {**LOWRANK, "method": base["method"]}
    more = {"client": {"on_divergence": "drop"}} if "privacy" in settings else {}
    with pytest.raises(UserError) as refused:
        build_components(validate({**base, **more, "objective": {"name": name}, **settings}))
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_statistics_by_class_go_with_any_method_and_mixed_ranks() -> None:
    tiers = {"kind": "tiers", "ranks": [1, 2]}
    for name in ("fedhl", "flora", "fedex_lora", "fedsa", "rolora"):
        profiles = {"profiles": tiers} if name in ("fedhl", "flora") else {}
        settings = {**TEXTS, "method": {"name": name}, **profiles, "objective": {"name": "fedimpro"}}
        assert build_components(validate(settings)).profiles.mixed_ranks == bool(profiles)
    assert not build_components(validate({**TEXTS, "objective": {"name": "fedhpl"}})).objective.entrywise
