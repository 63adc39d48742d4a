"""`rayfed run`: what is wrong is said in one line before anything starts or is written; what is right leaves a run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import rayfed
from rayfed.cli import main
from rayfed.config import dump_config

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tiny: Callable[..., rayfed.Experiment], tmp_path: Path) -> Path:
    """The tiny federation as a file, on Ray: a refusal that came too late would start it."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny("engine.kind=ray")))
    return path


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports Ray, or what needs it, fails."""
    for module in ("ray", "rayfed.engine.driver", "rayfed.engine.ray_executor"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def refused(no_ray: None, tmp_path: Path, capsys: Capture) -> Callable[..., str]:
    """Runs `rayfed run` with the arguments; the one line it said. Nothing may have been started or written."""

    def refused(*arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["run", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("rayfed: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("rayfed: ").strip()

    return refused


# Wrong settings. (overrides, what is said); {tmp} is the test's folder.

SETTINGS = {
    "unknown key": ("client.bach_size=3", "client.bach_size: unknown key; did you mean client.batch_size?"),
    "density 0": ("wire.up.density=0", "wire.up.density: got 0, but it should be a number in (0, 1]"),
    "density 1.5": ("wire.down.density=1.5", "wire.down.density: got 1.5, but it should be a number in (0, 1]"),
    "rank above a layer": ("lora.rank=33", "lora.rank: got 33, but encoder."),
    "rank above the smaller side": (
        "lora.rank=33 lora.target_modules=[intermediate.dense]",
        "lora.rank: got 33, but encoder.encoder.layer.0.intermediate.dense is 48 x 32; at most 32 is allowed",
    ),
    "target that matches nothing": (
        "lora.target_modules=[qurey]",
        "lora.target_modules: got ['qurey'], but it matches no layer; this model's linear layers are ",
    ),
    "target that is no linear layer": (
        "lora.target_modules=[LayerNorm]",
        "lora.target_modules: got ['LayerNorm'], but it matches encoder.",
    ),
    "layer index that is not there": ("lora.layers_to_transform=[2]", "lora.layers_to_transform: got [2], but"),
    "target that is no regular expression": ("lora.target_modules='('", "lora.target_modules: got '(', but"),
    "missing data": ("data.path={tmp}/gone", "data.path: got '{tmp}/gone', but there is no such file or folder"),
    "missing data file": ("data.path={tmp}/gone.csv", "data.path: got '{tmp}/gone.csv', but there is no such file"),
    "folder without data": ("data.path={tmp}", "data.path: got '{tmp}', but the folder needs a train file"),
    "hub data out of reach": (
        "data={{source: hub, name: nobody/nothing}}",
        "data.name: nobody/nothing cannot be loaded: ",
    ),
    "column that is not there": ("data.text=body", "data.text: got 'body', but"),
    "cohort above the population": (
        "server.cohort=13",
        "server.cohort: got 13, but the population has only 12 clients (partition.clients)",
    ),
    "cohort above the clients with data": (
        "partition.clients=100 partition.alpha=0.01 server.cohort=100",
        "server.cohort: got 100, but only ",
    ),
    "cohort above the owners": (
        "partition.kind=natural data.client=owner server.cohort=8",
        "server.cohort: got 8, but only 7 of 7 clients hold data",
    ),
    "more clients than rows": ("partition.clients=999", "partition.clients: got 999, but there are only 128 training"),
    "unknown method": ("method.name=flask", "method.name: got 'flask', but did you mean flasc? allowed are "),
    "unknown method option": ("method.topk=3", "method.topk: flasc has no such option; allowed are mask, train"),
    "wrong option value": ("method.mask=soft", "method.mask: got 'soft', but it should be refresh or fixed"),
    "option value that is a list": (
        "method.mask=[fixed]",
        "method.mask: got ['fixed'], but it should be refresh or fixed",
    ),
    "a rate for fedavg": (
        "server.optimizer=fedavg server.lr=0.1",
        "server.lr: got 0.1, but fedavg has no rate; server.optimizer=sgd has",
    ),
    "weight decay without adamw": (
        "server.optimizer=sgd server.weight_decay=0.1",
        "server.weight_decay: got 0.1, but only adamw has it, not sgd",
    ),
    "missing model": ("model.name={tmp}/gone", "model.name: got '{tmp}/gone', but it cannot be loaded: "),
    "folder without a model": ("model.name={tmp}", "model.name: got '{tmp}', but it cannot be loaded: "),
    "hub model out of reach": (
        "model.name=nobody/nothing",
        "model.name: got 'nobody/nothing', but it cannot be loaded",
    ),
    "half a GPU too much": ("engine.gpus_per_worker=1.5", "engine.gpus_per_worker: got 1.5, but above 1 Ray takes"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings_are_one_line(refused: Callable[..., str], config: Path, tmp_path: Path, case: str) -> None:
    overrides, line = (text.format(tmp=tmp_path) for text in SETTINGS[case])
    words = [overrides] if overrides.startswith("data={") else overrides.split()
    assert refused(config, *words, "--out", tmp_path / "out").startswith(line)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            [{"text": "a", "label": 1.5}, {"text": "b", "label": 2.5}],
            "data.label: got 1.5 in {path}, column 'label', row 1, but labels are integers or strings",
        ),
        (
            [{"text": "a", "label": "x"}, {"text": "b"}],
            "data.label: got None in {path}, column 'label', row 2, but labels",
        ),
        ([], "data.path: {path} holds no rows"),
        ([{"text": "a", "label": "x"}], "data.label: got column 'label' with the one class 'x', but two are needed"),
    ],
    ids=["float label", "no label", "empty", "one class"],
)
def test_wrong_rows_are_one_line(
    refused: Callable[..., str], config: Path, tmp_path: Path, rows: list[dict], line: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(config, f"data.path={path}", "--out", tmp_path / "out")
    assert said.startswith(line.format(path=path))


def test_a_missing_config_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    gone = tmp_path / "gone.yaml"
    assert refused(gone, "--out", tmp_path / "out") == f"config: got {str(gone)!r}, but there is no such file"


def test_resume_needs_a_directory(refused: Callable[..., str], config: Path) -> None:
    assert refused(config, "--resume") == "--resume: needs --out, the directory of the run to continue"


def test_the_directory_must_be_free(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert refused(config, "--out", tmp_path / "used") == (
        f"--out: got {str(tmp_path / 'used')!r}, but it is not empty; continue it with --resume or name another"
    )
    assert refused(config, "--out", tmp_path / "used" / "notes.txt").endswith("but that is a file")


def test_the_directory_cannot_lie_in_a_file(refused: Callable[..., str], config: Path) -> None:
    assert refused(config, "--out", config / "out").startswith(f"--out: got {str(config / 'out')!r}, but")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_weights_that_cannot_be_read(
    refused: Callable[..., str], config: Path, tiny_bert: Path, tmp_path: Path, damage: str
) -> None:
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = model / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.unlink()
    said = refused(config, "engine.kind=local", f"model.name={model}", "--out", tmp_path / "out")
    assert said.startswith(f"model.name: got {str(model)!r}, but it cannot be loaded: ")


def test_a_model_folder_without_a_tokenizer(
    refused: Callable[..., str], config: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    # transformers makes one up in which every word is unknown.
    model = shutil.copytree(tiny_bert, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    said = refused(config, "engine.kind=local", f"model.name={model}", "--out", tmp_path / "out")
    assert said.startswith(f"model.name: got {str(model)!r}, but ")
    assert "tokenizer" in said


def test_texts_longer_than_the_model_reads(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"  # 100 words; the model has 64 positions
    path.write_text("".join(json.dumps({"text": "card1 " * 100, "label": i % 2}) + "\n" for i in range(60)))
    said = refused(config, "engine.kind=local", f"data.path={path}", "partition.kind=iid", "--out", tmp_path / "out")
    assert said.startswith("data.max_tokens: got 128, but")


def test_a_device_that_is_not_there(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    said = refused(config, "engine.kind=local", "engine.device=cuda", "--out", tmp_path / "out")
    assert said.startswith("engine.device: got 'cuda', but")


def test_every_mistake_of_a_config_has_its_line(no_ray: None, config: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["run", str(config), "seed=x", "client.lr=0", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line[: line.index(": got")] for line in err.splitlines()] == ["rayfed: seed", "rayfed: client.lr"]
    assert not (tmp_path / "out").exists()


def test_as_a_process_a_refusal_is_one_line_too(config: Path, tmp_path: Path) -> None:
    # What libraries print or log by themselves shows only here.
    command = [sys.executable, "-m", "rayfed", "run", config, "lora.target_modules=[qurey]", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("rayfed: lora.target_modules: got ['qurey'], but it matches no layer; ")
    assert done.stderr.count("\n") == 1
    assert re.fullmatch(r"settings [0-9a-f]{16}\n", done.stdout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "template", ["{a} {b} {flags}", "{flags} {a} {b}", "{a} {flags} {b}", "{a} --resume {b} {out}"]
)
def test_overrides_stand_before_and_behind_flags(
    no_ray: None, config: Path, tmp_path: Path, capsys: Capture, template: str
) -> None:
    # The refusal shows that both were read: each is fine alone.
    out = f"--out {tmp_path / 'out'}"
    words = template.format(a="server.cohort=9", b="partition.clients=8", flags=f"{out} --resume", out=out)
    assert main(["run", str(config), *words.split()]) == 2
    assert "server.cohort: got 9, but the population has only 8 clients" in capsys.readouterr().err


# A run that goes well


@dataclass(frozen=True)
class Finished:
    config: Path
    out: Path
    code: int
    stdout: str


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., rayfed.Experiment], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(dump_config(tiny()))
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = main(["run", str(folder / "config.yaml"), "server.rounds=1", "--out", str(folder / "out")])
    return Finished(folder / "config.yaml", folder / "out", code, stdout.getvalue())


def test_a_run_prints_its_settings_digest_and_its_directory(finished: Finished) -> None:
    assert finished.code == 0
    digest = rayfed.load_config(finished.config, ["server.rounds=1"]).digest()
    lines = finished.stdout.splitlines()
    assert lines[0] == f"settings {digest}"
    assert lines[-1] == f"run directory {finished.out}"


def test_a_run_leaves_its_directory(finished: Finished) -> None:
    assert sorted(path.name for path in finished.out.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "events.log",
        "ledger.parquet",
        "metrics.jsonl",
        "report.html",
    ]
    assert [path.name for path in (finished.out / "checkpoints").iterdir()] == ["round-000001"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (finished.out / "adapter").iterdir()
    }
    (record,) = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert record["round"] == 1


def test_the_config_of_a_run_is_resolved_and_reads_back(finished: Finished) -> None:
    path = finished.out / "config.yaml"
    assert rayfed.load_config(path) == rayfed.load_config(finished.config, ["server.rounds=1"])
    assert yaml.safe_load(path.read_text())["client"]["momentum"] == 0.9  # defaults are spelled out


def test_a_finished_run_is_not_written_over(finished: Finished, no_ray: None, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    for overrides, line in (
        (["server.rounds=1"], f"rayfed: --out: got {str(finished.out)!r}, but it is not empty; "),
        (["server.rounds=2", "--resume"], "rayfed: --resume: "),
        (["server.rounds=1", "lora.alpha=9", "--resume"], "rayfed: --resume: "),
    ):
        assert main(["run", str(finished.config), *overrides, "--out", str(finished.out)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(line)
        assert err.count("\n") == 1
    assert "was made with other settings (digest " in err
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")} == before
