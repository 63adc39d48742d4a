"""`rayfed doctor` prints the right facts and no secret, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayfed.cli import main
from rayfed.clients import device_memory
from rayfed.config import dump_config


@pytest.fixture
def config(tiny, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny("server.cohort=3", "profiles.kind=tiers", "profiles.ranks=[2,4]",
                                     "method.name=flexlora")))  # fmt: skip
    return path


def facts_of(out: str) -> dict[str, str]:
    return {line[2:24].strip(): line[24:] for line in out.splitlines() if line.startswith("  ")}


def test_the_machine_and_no_secret(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret")
    monkeypatch.setenv("WANDB_API_KEY", "more-secret")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    facts = facts_of(out)
    assert facts["torch"] == torch.__version__
    assert facts["ray token"] == "RAY_AUTH_MODE=token, and there is one"
    assert facts["w&b login"] == "yes"
    assert "secret" not in out
    assert "packs" not in out


def test_missing_extras_say_how_to_get_them(monkeypatch, capsys) -> None:
    from rayfed.cli import doctor

    find = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert main(["doctor"]) == 0
    facts = facts_of(capsys.readouterr().out)
    assert facts["report figures"] == "no: pip install -e '.[report]' in a clone"
    assert "refuse this machine" in facts["ray token"]


def test_a_configs_plan_and_its_packs(config: Path, tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", str(config), "server.rounds=7"]) == 0
    facts = facts_of(capsys.readouterr().out)
    changed = ("server.cohort=3", "profiles.kind=tiers", "profiles.ranks=[2,4]", "method.name=flexlora")
    assert facts["digest"] == tiny(*changed, "server.rounds=7").digest()
    assert facts["a round"] == "3 clients, 7 rounds"
    # rank 4 on query and value of two layers, 32 wide, and a head of 4 classes; 4 bytes each behind the header
    entries = 4 * 4 * (32 + 32) + 4 * 32 + 4
    assert facts["trained"].startswith(f"{entries} entries on ")
    assert facts["a dense message"].startswith("0.00 MB")
    assert facts["padding"].startswith("none (the head reads the mean")
    assert [label for label in facts if label.endswith("at a time")] == ["1 at a time", "2 at a time", "3 at a time"]
    assert all(float(facts[f"{k} at a time"].split()[0]) > 0 for k in (1, 2, 3))
    assert all(facts[f"{k} at a time"].endswith(" MiB") for k in (1, 2, 3))
    assert facts["a step takes"].endswith(" ms a client")
    assert facts["a step needs"].endswith(" GiB are free for a worker")
    size, rest = facts["engine.pack=auto"].split(", ", 1)
    assert int(size) in (1, 2, 3)
    assert rest == "for 3 clients a round and 1 pack(s) at a time"
    # ranks 2 and 4 in turn, a mean of 3: three messages of 3 * 4 * (32 + 32) entries and the head
    assert facts["a round sends"].startswith("about 0.0109 MB down and 0.0109 MB up, if whole adapters travel")
    assert float(facts["a round trains"].split()[1]) > 0
    assert facts["the run trains"].endswith(" h in 7 rounds")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sparse_message_is_counted_with_its_indices(tiny) -> None:
    from rayfed import wire
    from rayfed.api import prepare
    from rayfed.cli.doctor import _bytes

    plan = prepare(tiny("wire.up.density=0.25", "server.cohort=2"))
    entries = plan.start().layout.size
    assert _bytes(plan, "down") == 2 * (wire.HEADER_BYTES + 4 * entries)
    values = wire.HEADER_BYTES + 4 * wire.keep_count(entries, 0.25)
    assert 2 * values < _bytes(plan, "up") < 2 * (values + entries / 8 + 8)


def test_messages_of_an_objective_are_said_to_be_missing(tiny) -> None:
    from rayfed.api import prepare
    from rayfed.cli.doctor import describe

    own = ["method.name=fedit", "client.optimizer=sgd", "client.momentum=0", "client.clip_norm=null"]
    scaffold = dict(describe(prepare(tiny(*own, "objective.name=scaffold"))))["a round sends"]
    assert ", beside the messages of scaffold, if whole adapters travel" in scaffold
    assert "beside" not in dict(describe(prepare(tiny(*own))))["a round sends"]


def test_a_dry_run_is_the_same_answer_and_starts_nothing(config: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from rayfed.cli import run as command

    asked = []
    monkeypatch.setattr(command, "doctor", lambda *given: asked.append(given))
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(config), "server.rounds=7", "--dry-run", "--out", "out"]) == 0
    assert asked == [(str(config), ("server.rounds=7",))]
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_what_a_worker_of_ray_needs_is_measured(config: Path, capsys) -> None:
    """A pack comes on top of what this process holds of its own."""
    assert main(["doctor", str(config), "engine.kind=ray", "engine.memory_per_worker=0.5"]) == 0
    needs, rest = facts_of(capsys.readouterr().out)["a worker needs"].split(" ", 1)
    assert device_memory.private() / 2**30 * 0.5 < float(needs) < device_memory.private() / 2**30 + 1
    assert rest == "GiB of its node's memory; engine.memory_per_worker=0.5 is reserved"


def test_padding_says_why(config: Path, capsys) -> None:
    assert main(["doctor", str(config), "engine.padding=batch"]) == 0
    assert facts_of(capsys.readouterr().out)["padding"] == "to the longest of a batch (engine.padding=batch)"


def test_what_a_run_would_refuse_is_refused(config: Path, capsys) -> None:
    assert main(["doctor", str(config), "method.name=fedit"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rayfed: profiles.kind: got 'tiers'")
    assert err.count("\n") == 1
