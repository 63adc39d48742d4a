"""Whole runs with privacy, on the problem with a known answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_runs import lowrank

import rayfed
from rayfed.api.plans import build_components, prepare
from rayfed.config import validate
from rayfed.config.marks import settings_digest
from rayfed.errors import UserError
from rayfed.privacy import private_methods
from rayfed.privacy.accounting import Guarantee, Uses
from rayfed.server.chain import verify

DROP = "client.on_divergence=drop"
USER, LOCAL = (DROP, "privacy.kind=user"), (DROP, "privacy.kind=local")
OFF = ("privacy.noise_multiplier=0", "privacy.clip_norm=1e30")
NOISE = "privacy.noise_multiplier=1.0"
RDP = "privacy.accountant=rdp"  # the faster one
POISSON = (*USER, RDP, "server.sampling=poisson")
MIXED = ("profiles.kind=tiers", "profiles.ranks=[1,2]")


@pytest.fixture(scope="module")
def dp():
    pytest.importorskip("dp_accounting")


def run(path, *overrides, **more):
    return rayfed.run(lowrank(*overrides), out=path / "run", **more)


def column(result, key):
    return [record[key] for record in result.metrics]


@pytest.mark.parametrize(
    "method",
    [
        ("method.name=flasc", "engine.pack=3", "server.cohort=5", "wire.up.density=0.4", "wire.down.density=0.6"),
        ("method.name=ffa_lora", *MIXED),
        ("method.name=fedview", *MIXED),
        ("method.name=fedhl", "method.gamma=0.0", *MIXED),
    ],
    ids=["flasc", "ffa_lora", "fedview", "fedhl"],
)
def test_without_noise_and_limit_a_run_has_the_bits_of_one_without_privacy(tmp_path, method):
    plain = run(tmp_path / "plain", *method, "server.weights=uniform")
    for kind in (USER, *([LOCAL] if "flasc" in method[0] else [])):
        private = run(tmp_path / kind[1], *method, *kind, *OFF)
        assert column(private, "state/digest") == column(plain, "state/digest")
        assert column(private, "privacy/epsilon") == [None] * 4


def test_an_empty_cohort_is_a_round_of_noise_alone(tmp_path, dp):
    """One of six clients in the mean: some rounds of this seed are empty."""
    poisson = ("server.sampling=poisson", "server.cohort=1", "server.rounds=8")
    plain, private = run(tmp_path / "plain", *poisson), run(tmp_path / "private", *poisson, *USER, NOISE, RDP)
    for result in (plain, private):
        assert column(result, "clients/ok").count(0) > 1
        assert max(column(result, "clients/ok")) > 1
        assert verify(result.out, rayfed.load_config(result.out / "config.yaml").digest()).startswith("rounds 1 to 8")
    empty = [t for t in range(1, 8) if plain.metrics[t]["clients/ok"] == 0]
    losses = column(plain, "eval/loss"), column(private, "eval/loss")
    assert all(losses[0][t] == losses[0][t - 1] for t in empty)
    assert all(losses[1][t] != losses[1][t - 1] for t in empty)
    assert all(private.metrics[t]["privacy/clipped"] is None for t in empty)


def test_noise_alone_is_merged_into_the_base_and_counted(tmp_path, dp):
    """The first cohort is empty. RAC-LoRA merges the noise, and clients have to download it."""
    settings = (*POISSON, NOISE, "server.cohort=1", "server.rounds=2", "method.name=rac_lora")
    result = run(tmp_path, *settings)
    assert column(result, "clients/ok") == [0, 2]
    whole = json.loads((result.out / "checkpoints" / "round-000001" / "checkpoint.json").read_text())["base_updates"]
    assert len(whole["sizes"]) == 1
    assert result.metrics[1]["params/down"] == 2 * (6 * 2)  # what was merged of B (6, 2), for both clients
    views = run(tmp_path / "views", *settings, "method.name=fedview")  # clients get corrections towards the noise
    assert column(views, "clients/ok") == [0, 2]
    # A method that has seen one update, of no client, reports nothing.
    products = run(tmp_path / "b", *USER, *OFF, "server.rounds=1", "method.name=fedhl", "method.gamma=0.0")
    assert not any(key.startswith("method/") for key in products.metrics[0])


def test_a_budget_ends_the_run_before_the_round_that_exceeds_it(tiny, tmp_path, dp):
    """The last round that it allows is evaluated, as the last one of any run."""
    target = Guarantee(1e-5, "rdp").epsilon([Uses(2, "poisson", 3, 12)], 2.0) + 0.01
    budget = ("privacy.noise_multiplier=2.0", f"privacy.target_epsilon={target}", "server.rounds=5", "eval.every=5")
    settings = tiny(*POISSON, *budget)
    result = rayfed.run(settings, out=tmp_path / "run")
    assert [loss is None for loss in column(result, "eval/loss")] == [True, False]
    assert column(result, "privacy/epsilon")[1] == pytest.approx(target - 0.01)
    events = (result.out / "events.log").read_text()
    assert "the run ends after round 2: with another one epsilon would be " in events
    assert f", over privacy.target_epsilon={target:g}" in events
    assert rayfed.run(settings, out=tmp_path / "run", resume=True).rounds == 2


def test_noise_for_a_target_spends_it_in_the_last_round(tmp_path, dp):
    settings = (*POISSON, "privacy.target_epsilon=3")
    result = run(tmp_path, *settings)
    assert 2.9 < result.metrics[-1]["privacy/epsilon"] <= 3
    with pytest.raises(UserError, match=r"server\.rounds: got 9, but .* privacy\.target_epsilon depends on the number"):
        run(tmp_path, *settings, "server.rounds=9", resume=True)


def test_a_resumed_run_goes_on_with_its_clip_norm_and_noise(tmp_path, dp):
    settings = (*POISSON, NOISE, "privacy.quantile=0.5", "checkpoint.keep=9")
    whole = run(tmp_path, *settings)
    assert len(set(column(whole, "privacy/clip_norm"))) == 4
    half = tmp_path / "half"
    shutil.copytree(whole.out, half / "run")
    for path in (half / "run" / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > 2:
            shutil.rmtree(path)
    lines = (half / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "run" / "metrics.jsonl").write_text("".join(lines[:2]))
    resumed = run(half, *settings, resume=True)
    for key in ("state/digest", "privacy/clip_norm", "privacy/epsilon"):
        assert column(resumed, key) == column(whole, key)


def test_keyed_noise_repeats_and_secret_noise_does_not(tmp_path, dp):
    one, two = (run(tmp_path / name, *POISSON, NOISE, "server.rounds=1") for name in "ab")
    assert column(one, "state/digest") == column(two, "state/digest")
    one, two = (run(tmp_path / name, *POISSON, NOISE, "server.rounds=1", "privacy.noise=secret") for name in "cd")
    assert column(one, "state/digest") != column(two, "state/digest")


def test_local_privacy_takes_any_method_and_counts_a_clients_own_rounds(tmp_path, dp):
    settings = (*LOCAL, "privacy.noise_multiplier=4.0", "server.rounds=3", "wire.up.density=0.5")
    for method in ("fedview", "fedex_lora"):
        result = run(tmp_path / method, f"method.name={method}", *settings)
        rounds = [[client for client, _ in record["clients/trained"]] for record in result.metrics]
        most = [max(sum(c in r for r in rounds[: t + 1]) for c in range(6)) for t in range(3)]
        epsilons = column(result, "privacy/epsilon")
        assert [epsilons[t] > epsilons[t - 1] for t in (1, 2)] == [most[t] > most[t - 1] for t in (1, 2)]
        assert column(result, "params/up") == [column(result, "params/up")[0]] * 3


def test_the_log_says_where_noise_misleads(tmp_path):
    quiet = (*USER, "privacy.noise_multiplier=0", "server.rounds=1")
    found = {
        name: (run(tmp_path / name, f"method.name={name}", *more, *quiet).out / "events.log").read_text()
        for name, more in (("fedit", ()), ("ffa_lora", ()), ("fedhl", ("method.gamma=0.0",)))
    }
    assert "A and B both get noise, so their product has the square of it" in found["fedit"]
    assert "noise is on 36 entries, where the factors have 24" in found["fedhl"]
    assert "get noise" not in found["ffa_lora"]


def test_example_level_privacy_trains_a_model_and_reports_its_worst_client(tiny, tmp_path, dp):
    settings = tiny("privacy.kind=example", "privacy.noise_multiplier=1.0", "model.dtype=float32", RDP)
    result = rayfed.run(settings, out=tmp_path / "run")
    epsilons = column(result, "privacy/epsilon")
    assert 0 < epsilons[0] <= epsilons[1]
    assert result.metrics[0]["state/digest"] != result.metrics[1]["state/digest"]
    card = (result.out / "adapter" / "README.md").read_text()
    assert (
        f"| privacy | example level, epsilon {epsilons[1]:.3g} at delta 1e-05: a simulation's figure; whoever" in card
    )
    assert f"noise multiplier 1; 2 rounds: epsilon {epsilons[1]:.3g} at" in (result.out / "events.log").read_text()


def test_the_metrics_and_the_methods_are_documented(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    settings = (*USER, "privacy.noise_multiplier=0", "privacy.quantile=0.5", "server.rounds=1")
    keys = [key for key in run(tmp_path, *settings).metrics[0] if key.startswith("privacy/")]
    assert len(keys) == 3
    assert [key for key in keys if f"`{key}`" not in (docs / "outputs.md").read_text()] == []
    listed = (docs / "privacy.md").read_text().split("**Methods.**")[1].split("**Where noise")[0]
    assert [name for name in private_methods() if f"`{name}`" not in listed] == []


EXAMPLE = ("privacy.kind=example", *OFF)
PRODUCTS = ("method.name=fedhl", "method.gamma=0.0", "privacy.order=clip_first")
REFUSED = [
    (("privacy.kind=user",), r"privacy\.noise_multiplier: got null, but .* set one of them"),
    (("privacy.clip_norm=2",), r"privacy\.clip_norm: got 2\.0, but that belongs to privacy\.kind=user or"),
    ((*LOCAL, *OFF, "privacy.quantile=0.5"), r"privacy\.quantile: got 0\.5, but that belongs to privacy\.kind=user"),
    ((*USER, OFF[0], "privacy.target_epsilon=2"), r"privacy\.noise_multiplier: got 0, but privacy\.t"),
    ((*USER, *OFF, "privacy.noise_cohort=9"), r"privacy\.noise_cohort: got 9, but noise_population is null"),
    ((*USER, *OFF, "privacy.noise_cohort=9", "privacy.noise_population=8"), r"got 9, but noise_population is 8"),
    ((*USER, *OFF, "privacy.order=clip_first", "privacy.quantile=0.5"), r"privacy\.quantile: .* sparsify_first is"),
    ((*USER, *OFF, "server.max_mb=1"), r"server\.max_mb: got 1\.0, but with privacy the sizes of messages are not"),
    ((*USER, *OFF, "server.weights=examples"), r"server\.weights: got 'examples', but with privacy .* uniform is"),
    (("privacy.kind=user", *OFF), r"client\.on_divergence: got 'fail', but with privacy .* drop"),
    ((*USER, *OFF, "privacy.accountant=pld"), r"privacy\.accountant: got 'pld', but there is no .* server\.sampling="),
    ((*USER, *OFF, *PRODUCTS), r"privacy\.order: got 'clip_first', but fedhl sums products"),
    ((*LOCAL, *OFF, "method.name=fedsa"), r"method\.name: got 'fedsa', but the model that it exports has a mean of"),
    ((*EXAMPLE, "method.name=hetlora"), r"method\.regularizer: got 0\.001, but it is no loss of a row"),
    ((*EXAMPLE, "server.empty_clients=true"), r"server\.empty_clients: got true, but a client without rows adds no"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build_components(lowrank(*overrides))


@pytest.mark.parametrize(
    ("name", "options"),
    [("fedprox", ()), ("fedlc", ()), ("fedga", ()), ("tail_penalty", ("objective.weight=1", "objective.start=1"))],
)
def test_rows_of_private_batches_have_the_loss_of_the_task(tiny, name, options):
    private = tiny(*EXAMPLE, f"objective.name={name}", *options)
    with pytest.raises(UserError, match=rf"^objective.name: got '{name}', but with privacy.kind=example a client"):
        build_components(private)


def test_what_would_make_the_norms_of_rows_wrong_is_refused(tiny):
    for override, field in (("engine.gradient_checkpointing=true", "engine"), ("model.dtype=bfloat16", "model")):
        with pytest.raises(UserError, match=rf"{field}\.\w+: got .*, but .* is allowed"):
            build_components(tiny(*EXAMPLE, override))


def test_one_round_over_the_budget_is_refused(dp):
    with pytest.raises(
        UserError, match=r"privacy\.target_epsilon: got 0\.1, but with this noise one round alone takes"
    ):
        prepare(lowrank(*USER, NOISE, "privacy.target_epsilon=0.1"))


def test_a_missing_accountant_is_named(monkeypatch):
    monkeypatch.setattr("rayfed.privacy.accounting.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"privacy\.noise_multiplier: noise needs dp-accounting, which is not installed"
    ):
        build_components(lowrank(*USER, NOISE))
    build_components(lowrank(*USER, *OFF))


def test_a_run_without_privacy_has_the_digest_that_it_always_had():
    """Where they are off, the section and the kind of sampling are not in the digest."""
    settings = validate({}).model_dump(mode="json")
    whole = settings_digest(settings)
    del settings["privacy"], settings["server"]["sampling"]
    assert settings_digest(settings) == whole
    assert validate({"server": {"sampling": "poisson"}}).digest() != whole
