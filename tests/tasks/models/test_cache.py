"""A process loads a base model once for all runs that need the same model, and no run changes its weights."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

import rayfed
from rayfed.api import build_components
from rayfed.tasks import _sequence_classification
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.base import in_dtype
from rayfed.tasks.models.cache import forget_base


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that were loaded since the test began with an empty cache."""
    loaded = []
    load_base = _sequence_classification.load_base
    monkeypatch.setattr(
        _sequence_classification, "load_base", lambda model, *rest: loaded.append(model.name) or load_base(model, *rest)
    )
    forget_base()
    return loaded


def base_of(experiment, classes=4):
    federation = Federation(None, None, None, tuple(map(str, range(classes))), None, None)
    return build_components(experiment).task.load_base(federation)


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
    for name, digest in digests.items():
        forget_base()
        alone = rayfed.run(tiny(*settings[name]), out=tmp_path / f"{name}-alone")
        assert alone.metrics[-1]["state/digest"] == digest


def test_another_number_format_or_head_changes_no_other_trainers_model(tiny, loads):
    first = base_of(tiny())
    before = copy.deepcopy(first.model.state_dict())
    in_dtype(base_of(tiny()), "bfloat16")
    base_of(tiny()).model.classifier = torch.nn.Linear(32, 9)
    assert len(loads) == 1
    for model in (first.model, base_of(tiny()).model):
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_settings_that_decide_the_weights_load_the_model_again(tiny, tiny_bert, tmp_path, loads):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    base_of(tiny(f"model.name={folder}"))
    base_of(tiny(f"model.name={folder}", "client.lr=0.3", "model.dtype=bfloat16"))
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
        base_of(experiment, classes)
        assert len(loads) == count
    base_of(tiny(f"model.name={folder}"))
    (folder / "model.safetensors").touch()  # as if other weights had come under the name
    base_of(tiny(f"model.name={folder}"))
    assert len(loads) == 7


def test_a_forgotten_base_is_loaded_again(tiny, loads):
    base_of(tiny())
    forget_base()
    base_of(tiny())
    assert len(loads) == 2
