"""A process that keeps its base loads it once for all runs that want the same; no run can tell, nor change it."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

import rayfed
from rayfed.tasks.models import cache as kept
from rayfed.tasks.models.base import base_of, in_dtype
from rayfed.tasks.models.cache import keep_base, shared_base


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that were loaded since; the process keeps its base until the test ends."""
    loaded = []
    monkeypatch.setattr(kept, "_kept", None)
    monkeypatch.setattr(kept, "base_of", lambda e, classes: loaded.append(e.model.name) or base_of(e, classes))
    keep_base()
    return loaded


def test_runs_of_one_base_load_it_once_and_do_not_differ(tiny, tiny_bert, tmp_path, loads):
    """Whatever a run does to its model: other methods, number formats, checkpointing, merged exports."""
    settings = {
        "plain": [],
        "merged": ["method.name=flora", "export.merged=true"],
        "coarse": ["model.dtype=bfloat16", "engine.gradient_checkpointing=true"],
        "upper": ["lora.layers_to_transform=[1]", "eval.controls=true"],
        "again": [],
    }
    digests = {
        name: rayfed.run(tiny(*changed), out=tmp_path / name).metrics[-1]["state/digest"]
        for name, changed in settings.items()
    }
    assert loads == [str(tiny_bert)]
    kept._kept = None  # each loads its own
    for name, digest in digests.items():
        alone = rayfed.run(tiny(*settings[name]), out=tmp_path / f"{name}-alone")
        assert alone.metrics[-1]["state/digest"] == digest


def test_another_number_format_or_head_changes_no_twin(tiny, loads):
    experiment = tiny()
    first = shared_base(experiment, 4)
    before = copy.deepcopy(first.model.state_dict())
    in_dtype(shared_base(experiment, 4), "bfloat16")
    other = shared_base(experiment, 4).model
    other.classifier = torch.nn.Linear(32, 9)
    assert len(loads) == 1
    for model in (first.model, shared_base(experiment, 4).model):
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_decides_the_weights_loads_anew(tiny, tiny_bert, tmp_path, loads):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    shared_base(tiny(f"model.name={folder}"), 4)
    shared_base(tiny(f"model.name={folder}", "client.lr=0.3"), 4)
    assert len(loads) == 1
    for count, (experiment, classes) in enumerate(
        (
            (tiny(f"model.name={folder}"), 5),
            (tiny(f"model.name={folder}", "seed=3"), 4),
            (tiny(f"model.name={folder}", "model.head=frozen"), 4),
            (tiny(f"model.name={tiny_bert}"), 4),
        ),
        start=2,
    ):
        shared_base(experiment, classes)
        assert len(loads) == count
    shared_base(tiny(f"model.name={folder}"), 4)
    (folder / "model.safetensors").touch()  # as if other weights had come under the name
    shared_base(tiny(f"model.name={folder}"), 4)
    assert len(loads) == 7


def test_a_process_that_does_not_keep_loads_every_time(tiny, monkeypatch):
    monkeypatch.setattr(kept, "_kept", None)
    one, other = shared_base(tiny(), 4).model, shared_base(tiny(), 4).model
    assert one.classifier.weight.data_ptr() != other.classifier.weight.data_ptr()
