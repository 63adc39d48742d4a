"""Every bad data set and model folder is refused by `rayfed run`: one line, little work, nothing written."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import yaml

from faults.bad_data import BadInput, bad_inputs, write

SECONDS = 3.0  # of CPU time, for each
MEMORY = 3 * 2**30  # bytes more than the test's own process has


def settings(case: BadInput, path: str, data: Path, model: Path) -> dict:
    data_path, model_name = (path, str(model)) if case.kind == "data" else (str(data), path)
    return {
        "data": {"source": "files", "path": data_path, "max_tokens": 32},
        "model": {"name": model_name, "pooling": "mean"},
        "partition": {"kind": "iid", "clients": 2},
        "server": {"rounds": 1, "cohort": 2},
        "lora": {"rank": 2, "target_modules": ["query"]},
        "engine": {"kind": "local"},
        "tracking": {"console": "off", "wandb": "off"},
    }


def run_in_fork(arguments: list[str], folder: Path, output: Path) -> tuple[int, float]:
    """The exit code of `rayfed` in a fork of this process with limits, and its CPU seconds; negative after a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            log = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 2)
            sys.stderr = os.fdopen(2, "w")  # pytest has put a file of its own there
            os.chdir(folder)
            from rayfed.cli import main

            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + 60
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -int(signal.SIGKILL), 60.0
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as on Linux")
@pytest.mark.parametrize("seed", range(2))
def test_bad_inputs_are_refused(
    tmp_path: Path, tiny_bert: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # a fork has no threads of the pool
    monkeypatch.delenv("RUST_BACKTRACE", raising=False)
    import rayfed.api
    from rayfed.config.task import Model
    from rayfed.tasks.models.base import load_base, load_tokenizer

    assert rayfed.api.run  # all imports are made before the fork
    load_tokenizer(Model(name=str(tiny_bert)))
    load_base(Model(name=str(tiny_bert), pooling="mean"), 2, 0)
    wrong = []
    for number, case in enumerate(bad_inputs()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(case, folder, tiny_bert, seed)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings(case, path, tiny_data, tiny_bert)))
        before = sorted(folder.rglob("*"))
        output = tmp_path / f"{number}.log"
        code, seconds = run_in_fork(["run", str(folder / "config.yaml"), "--out", str(folder / "out")], folder, output)
        lines = output.read_bytes().decode(errors="replace").split("\n")[:-1]
        good = code == 2 and len(lines) == 1 and lines[0].startswith("rayfed: ") and case.refusal in lines[0]
        clean = len(lines) == 1 and lines[0].isprintable() and len(lines[0]) < 1000
        if not (good and clean and seconds < SECONDS and sorted(folder.rglob("*")) == before):
            wrong.append(f"{case.name}: exit code {code}, {seconds:.1f} s, {len(lines)} lines: {lines[-3:]}")
    assert not wrong, "\n".join(wrong)


def test_cases_have_unique_names() -> None:
    counts = Counter(case.name for case in bad_inputs())
    assert len(counts) >= 90
    assert max(counts.values()) == 1
