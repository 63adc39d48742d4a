"""`rayfed submit`: refusals, the files that are sent, and jobs on a real head with token authentication."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray_heads import RAY, TOKEN, WITH_TOKEN, Head, environment, started_head
from small_runs import LOWRANK

import rayfed
from rayfed.cli import main, submit
from rayfed.errors import UserError
from rayfed.tracking import read_metrics

SETTINGS: dict[str, Any] = {
    **LOWRANK,
    "name": "tiny job",
    "server": {"rounds": 3, "cohort": 2},
    "engine": {"workers": 2},
    "tracking": {"wandb": "off"},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


# Before the cluster is asked


def test_a_job_is_the_same_command_with_quoted_words(config: str) -> None:
    job = submit.plan(config, ["server.rounds=5", "tracking.tags=[a, b c]"], "~/runs/a b", resume=True)
    assert shlex.split(job.entrypoint) == [
        "rayfed", "run", "tiny.yaml", "server.rounds=5", "tracking.tags=[a, b c]",
        "--out", "$HOME/runs/a b", "--resume",
    ]  # fmt: skip
    assert subprocess.run(
        f"printf '%s|' {job.entrypoint}", shell=True, text=True, capture_output=True, env={"HOME": "/home/x y"}
    ).stdout.split("|")[-3:] == ["/home/x y/runs/a b", "--resume", ""]
    assert list(job.files) == [Path("tiny.yaml")]
    assert re.fullmatch(r"tiny-job-\d{8}-\d{6}-[0-9a-f]{4}", job.id)
    assert job.metadata["digest"] == rayfed.load_config(config, ["server.rounds=5"]).digest()


def test_without_out_the_run_is_named_like_the_job(config: str) -> None:
    job = submit.plan(config)
    assert job.out == f"~/runs/{job.id}"
    assert submit.plan(config).id != job.id


def test_a_sweep_is_known_by_its_section_or_override(config: str) -> None:
    override = "sweep.parameters.client.lr={grid: [0.1, 0.2]}"
    assert submit.plan(config, [override, "sweep.metric=eval/gap"]).entrypoint.startswith("rayfed sweep tiny.yaml ")
    Path(config).write_text(yaml.safe_dump({**SETTINGS, "sweep": {"parameters": {"seed": {"grid": [0, 1]}}}}))
    assert submit.plan(config).entrypoint.startswith("rayfed sweep tiny.yaml ")


def test_runs_and_sweeps_go_to_a_uri_and_a_container_is_masked(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "abfss://box@account.dfs.core.windows.net/x"
    override = "sweep.parameters.client.lr={grid: [0.1, 0.2]}"
    assert submit.plan(config, [override, "sweep.metric=eval/gap"], out=uri).entrypoint.endswith(f"--out {uri}")
    monkeypatch.setattr(submit, "_connect", lambda _: SimpleNamespace(submit_job=lambda **_: None))
    assert main(["submit", config, "--address", "http://127.0.0.1:9", "--out", uri]) == 0
    out = capsys.readouterr().out
    assert "out abfss://***@account.dfs.core.windows.net/x\n" in out
    assert "box" not in out


def test_includes_are_sent_by_their_last_name_without_environments_and_history(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for name in ("a.py", "deep/b.py", ".git/c", ".venv/d", "deep/__pycache__/e"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    job = submit.plan(config, include=[str(folder), str(folder / "a.py")])
    assert sorted(map(str, job.files)) == ["a.py", "mine/a.py", "mine/deep/b.py", "tiny.yaml"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["server.round=3"], "server.round: unknown key; did you mean server.rounds?"),
        (["--out", "runs/x"], "--out: got 'runs/x', but a job's own folder goes with the job"),
        (["--out", "s3://key:secret@bucket/x"], "--out: the URI has a password, a key or a query string, but"),
        (["name=ftp://me:secret@host/x"], "override: the URI has a password, a key or a query string, but"),
        (["--out", ""], "--out: got '', but a job's own folder goes with the job"),
        (["--resume"], "--resume: needs --out, the directory to continue"),
        (["--include", "/nowhere/x"], "--include: got '/nowhere/x', but there is no such file or folder"),
        (
            ["data.source=files", "data.client=owner", "data.path=my/rows"],
            "data.path: got 'my/rows', but a job runs in a folder of its own",
        ),
        (
            ["data.source=files", "data.client=owner", "data.path=/rows", "model.adapter=runs/a"],
            "model.adapter: got 'runs/a', but a job runs in a folder of its own",
        ),
        (["--address", "localhost:8265"], "--address: got 'localhost:8265', but allowed is the URL of a dashboard"),
    ],
)
def test_refusals_are_one_line(config: str, capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    address = [] if "--address" in words else ["--address", "http://127.0.0.1:9"]
    assert main(["submit", config, *words, *address]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"rayfed: {line}")
    assert err.count("\n") == 1
    assert "secret" not in err


def test_data_that_are_sent_along_may_be_named_relatively(config: str, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("{}")
    words = ["data.source=files", "data.client=owner", "data.path=rows", "lora.target_modules=[query]"]
    job = submit.plan(config, words, include=[str(tmp_path / "rows")])
    assert Path("rows/train.jsonl") in job.files


def test_too_much_is_refused_before_it_is_sent(config: str, tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(submit.SENT_AT_MOST + 1)  # takes no room on the disk
    with pytest.raises(UserError, match=r"--include: 10\.0 MB would be sent \(.*weights\.bin alone 10\.0\)"):
        submit.plan(config, include=[str(tmp_path / "weights.bin")])


def test_an_address_without_a_cluster_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", config, "--address", "http://127.0.0.1:9"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "rayfed: --address: got 'http://127.0.0.1:9', but no Ray cluster takes a job there (Failed to"
    )
    assert err.count("\n") == 1


# On a head of its own, with token authentication


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as head:
        yield head


def rayfed_here(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rayfed", *words]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=240)


def digests(out: Path) -> list[Any]:
    return [record["state/digest"] for record in read_metrics(out / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        ({}, "asks for a token: set RAY_AUTH_MODE=token"),
        ({**WITH_TOKEN, "RAY_AUTH_TOKEN": "wrong"}, "does not take this machine's token"),
    ],
    ids=["no token", "a wrong token"],
)
def test_a_missing_or_wrong_token_is_one_line(head: Head, config: str, tokens: dict[str, str], line: str) -> None:
    done = rayfed_here("submit", config, "--address", head.url, **tokens)
    assert done.returncode == 2
    (said,) = [said for said in done.stderr.splitlines() if said.startswith("rayfed:")]
    assert line in said
    assert not any(token in done.stdout + done.stderr for token in (TOKEN, "wrong"))


@pytest.mark.slow
def test_a_submitted_run_gives_the_bits_of_a_run_here(head: Head, config: str, tmp_path: Path) -> None:
    here = rayfed.run(rayfed.load_config(config, ["engine.kind=local", "tracking.console=off"]), out=tmp_path / "here")
    there = tmp_path / "there"
    done = rayfed_here("submit", config, "--address", head.url, "--out", str(there), "--follow", **WITH_TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digests(there) == [record["state/digest"] for record in here.metrics]
    assert f"run directory {there}" in done.stdout  # the job's own words
    (job,) = re.findall(r"^job (\S+)$", done.stdout, re.MULTILINE)
    status, logs, stop = re.findall(r"^  (ray job .*)$", done.stdout, re.MULTILINE)
    secret = environment(**WITH_TOKEN)
    for command, expected in ((status, "succeeded"), (logs, f"run directory {there}")):
        shown = subprocess.run(command, shell=True, env=secret, capture_output=True, text=True, timeout=120)
        assert expected in shown.stdout + shown.stderr
        assert job in command
    assert stop == f"ray job stop --address {head.url} {job}"
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_failed_job_that_is_followed_is_a_failure_here(head: Head, config: str) -> None:
    words = ["data.source=files", "data.client=owner", "data.path=/nowhere", "lora.target_modules=[query]"]
    done = rayfed_here("submit", config, *words, "--address", head.url, "--follow", **WITH_TOKEN)
    assert done.returncode == 1
    assert "data.path: got '/nowhere', but there is no such file or folder" in done.stdout
    assert re.search(r"^rayfed: job \S+ ended as FAILED: ", done.stderr, re.MULTILINE)


@pytest.mark.slow
def test_plain_ray_job_submit_with_a_working_directory(head: Head, config: str, tmp_path: Path) -> None:
    """As in README: the folder is sent, without the files that .gitignore names. Sweeps work, too."""
    folder = tmp_path / "project"
    folder.mkdir()
    parameters = {"client.lr": {"grid": [0.02, 0.05]}}
    sweep = {"parameters": parameters, "metric": "eval/gap", "mode": "min"}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**SETTINGS, "engine": {"kind": "local"}, "sweep": sweep}))
    out = tmp_path / "out"
    done = subprocess.run(
        [RAY, "job", "submit", "--address", head.url, "--working-dir", str(folder), "--",
         "rayfed", "sweep", "sweep.yaml", "--out", str(out)],
        env=environment(**WITH_TOKEN), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "done"]
