"""Runs with `partition.sequence.of=domains`: experiences are groups of domains, which may share classes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rayfed
from rayfed.api.plans import prepare
from rayfed.errors import UserError

TWO = ("server.rounds=4", "method.name=fedit", "data.client=domain")
DOMAINS = "partition.sequence={experiences: 2, of: domains, order: given, loss: seen}"


@pytest.fixture
def rows(tiny_data: Path, tmp_path: Path) -> Any:
    """A folder with the tiny rows, and for each a domain by a function of its number and label."""

    def write(domain: Any) -> str:
        for split in ("train", "test"):
            lines = (tiny_data / f"{split}.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            text = "".join(json.dumps({**row, "domain": domain(i, row["label"])}) + "\n" for i, row in enumerate(found))
            (tmp_path / f"{split}.jsonl").write_text(text)
        return f"data.path={tmp_path}"

    return write


def comparable(run: rayfed.RunResult) -> list[dict[str, Any]]:
    left_out = ("time/", "state/chain")
    return [{k: v for k, v in record.items() if not k.startswith(left_out)} for record in run.metrics]


def test_domains_of_their_own_classes_are_a_sequence_of_classes(rows: Any, tiny: Any, tmp_path: Path) -> None:
    """To the bit: where each domain has two classes of its own, both sequences are one."""
    path = rows(lambda _, label: "ab"[label // 2] if isinstance(label, int) else label)
    names = prepare(tiny(path, *TWO[:2])).federation.classes
    path = rows(lambda _, label: "ab"[names.index(str(label)) // 2])
    own, classes = tiny(path, *TWO, DOMAINS), tiny(path, *TWO, DOMAINS.replace("of: domains, ", ""))
    assert own.digest() != classes.digest()
    one, other = rayfed.run(own, tmp_path / "domains"), rayfed.run(classes, tmp_path / "classes")
    assert comparable(one) == comparable(other)
    assert one.summary["sequence/accuracies"] == other.summary["sequence/accuracies"]


def test_domains_that_share_all_classes(rows: Any, tiny: Any, tmp_path: Path) -> None:
    path = rows(lambda i, _: ("north", "east", "west")[i % 3])
    experiment = tiny(path, *TWO, DOMAINS, "eval.subset=20")
    federation = prepare(experiment).federation
    found = federation.experiences
    assert found.domains == (("east", "north"), ("west",))
    assert found.classes[0] == found.classes[1] == (0, 1, 2, 3)
    shares = [sorted(set(own.rows.tolist())) for own in federation.by_experience]
    assert sorted(shares[0] + shares[1]) == list(range(len(federation.train)))
    assert [set(found.of_rows["train"][own]) for own in shares] == [{0}, {1}]
    run = rayfed.run(experiment, tmp_path / "run")
    rows_of = Counter(found.of_rows["test"].tolist())
    first, last = run.metrics[1], run.metrics[-1]
    assert first["test/accuracy_experience_1"] == first["test/accuracy"]  # nothing else was seen
    shares_right = sum(last[f"test/accuracy_experience_{j + 1}"] * rows_of[j] for j in (0, 1))
    assert shares_right / sum(rows_of.values()) == pytest.approx(last["test/accuracy"])
    partition = json.loads((run.out / "partition.json").read_text())
    assert [own["domains"] for own in partition["experiences"]] == [["east", "north"], ["west"]]


def test_test_rows_of_an_unknown_domain_are_left_out(rows: Any, tiny: Any, tmp_path: Path) -> None:
    path = rows(lambda i, _: "a" if i % 2 else "b")
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    new = [json.dumps({**json.loads(line), "domain": "c"}) for line in lines[:5]]
    (tmp_path / "test.jsonl").write_text("\n".join([*new, *lines[5:]]) + "\n")
    plan = prepare(tiny(path, *TWO, DOMAINS))
    assert np.array_equal(plan.seen_rows(3)["test"], np.arange(5, len(lines)))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("data.client=null",), r"data.client: got null, but partition.sequence.of=domains needs the column"),
        (("partition.sequence.experiences=4",), r"partition.sequence.experiences: got 4, but there are only 2 domains"),
        (("eval.clients=true",), r"eval.clients: with partition.sequence of domains there is none by class"),
    ],
)
def test_refusals(rows: Any, tiny: Any, overrides: tuple[str, ...], line: str) -> None:
    path = rows(lambda i, _: "ab"[i % 2])
    with pytest.raises(UserError, match=line):
        prepare(tiny(path, *TWO, DOMAINS, *overrides))
