"""`rayfed.load_model` gives a run's model, and a run directory from anybody can do no harm."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import lowrank

import rayfed
from rayfed.errors import UserError
from rayfed.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    return rayfed.run(tiny("server.rounds=1"), out=tmp_path_factory.mktemp("load") / "run").out


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "foreign"))


class Planted:
    """Code that leaves a file where it runs, in a pickle."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refused(run, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        rayfed.load_model(run, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, 5, 9, 3]]), attention_mask=torch.ones(1, 4, dtype=torch.int64)).logits


def test_code_of_a_model_runs_only_where_the_caller_says_so(run, tiny_bert, tmp_path, monkeypatch):
    """The settings of a foreign run allow nothing."""
    evil, marker = Path(shutil.copytree(tiny_bert, tmp_path / "evil")), tmp_path / "ran"
    settings = json.loads((evil / "config.json").read_text())
    own = {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted", "AutoModel": "planted.PlantedModel"}}
    (evil / "config.json").write_text(json.dumps(settings | own))
    (evil / "planted.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise OSError('it ran')\n")
    replace_in(run / "config.yaml", str(tiny_bert), str(evil))
    refused(run, "model.name: .*cannot be loaded")  # transformers' own refusal
    replace_in(run / "config.yaml", "trust_remote_code: false", "trust_remote_code: true")
    load_base = TextClassification.load_base
    monkeypatch.setattr(TextClassification, "load_base", lambda *_: pytest.fail("the base is loaded"))
    refused(run, r"model\.trust_remote_code: got true in .*config\.yaml.*load_model\(run, trust_remote_code=True\)")
    assert not marker.exists()
    monkeypatch.setattr(TextClassification, "load_base", load_base)
    refused(run, "it ran", trust_remote_code=True)
    assert marker.exists()


def test_a_method_named_by_an_import_path_is_not_imported(run, tmp_path, monkeypatch):
    (tmp_path / "planted_method.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    replace_in(run / "config.yaml", "name: flasc", "name: planted_method:Method")
    rayfed.load_model(run)
    assert "planted_method" not in sys.modules


def test_what_an_adapters_config_names_is_not_obeyed(run, finished, tmp_path):
    (tmp_path / "planted_base.py").write_text("raise SystemExit('it ran')")
    path = run / "adapter" / "adapter_config.json"
    own = {
        "base_model_name_or_path": str(tmp_path / "elsewhere"),
        "auto_mapping": {"base_model_class": "Base", "parent_library": "planted_base"},
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "lora_ga_config": {"x": 1},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    assert torch.equal(logits(rayfed.load_model(run)), logits(rayfed.load_model(finished)))
    assert "planted_base" not in sys.modules


@pytest.mark.parametrize("name", ["adapter_model", "head"])
def test_pickles_are_not_opened(run, tmp_path, name):
    weights, marker = run / "adapter" / f"{name}.safetensors", tmp_path / "ran"
    for planted in (weights, weights.with_suffix(".bin")):
        planted.write_bytes(pickle.dumps(Planted(marker)))
    refused(run, f"adapter: got .*{name}.safetensors.*cannot be read")
    weights.unlink()
    refused(run, f"adapter: got .*{name}.safetensors.*cannot be read")
    assert not marker.exists()


LINKED = ("config.yaml", "adapter", "adapter/classes.json", "adapter/adapter_config.json", "adapter/README.md",
          "adapter/adapter_model.safetensors", "adapter/head.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_links_are_not_followed(run, tmp_path, name):
    (run / name).rename(tmp_path / "target")
    os.symlink(tmp_path / "target", run / name)
    refused(run, f"got '.*/{re.escape(name)}', but it is a symbolic link")


@pytest.mark.parametrize("name", ["config.yaml", "adapter/classes.json", "adapter/head.safetensors"])
def test_a_pipe_is_not_waited_for(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    refused(run, f"got .*{name}', but it (cannot be read|is a symbolic link or a pipe)")


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "weights cut": ("adapter_model.safetensors", cut),
    "head cut": ("head.safetensors", cut),
    "config cut": ("adapter_config.json", cut),
    "classes cut": ("classes.json", cut),
    "weights missing": ("adapter_model.safetensors", Path.unlink),
    "config missing": ("adapter_config.json", Path.unlink),
    "classes missing": ("classes.json", Path.unlink),
    "no text": ("adapter_config.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "nested too deeply": ("adapter_config.json", lambda path: path.write_text("[" * 100_000)),
    "config a list": ("adapter_config.json", lambda path: path.write_text("[1]")),
    "rank 0": ("adapter_config.json", lambda path: replace_in(path, '"r": 4', '"r": 0')),
    "rank true": ("adapter_config.json", lambda path: replace_in(path, '"r": 4', '"r": true')),
    "alpha infinite": ("adapter_config.json", lambda path: replace_in(path, '"lora_alpha": 8', '"lora_alpha": 1e999')),
    "classes numbers": ("classes.json", lambda path: path.write_text("[1, 2, 3, 4]")),
    "no classes": ("classes.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_one_line(run, name, damage):
    damage(run / "adapter" / name)
    refused(run, f"adapter.*{name}")


def test_an_adapter_of_another_rank_or_of_other_classes_is_one_line(run):
    replace_in(run / "adapter" / "adapter_config.json", '"r": 4', '"r": 5')
    refused(run, r"lora_A\.weight is \(4, 32\), and in the run's model it is \(5, 32\)")
    (run / "adapter" / "classes.json").write_text('["a", "b"]')
    refused(run, r"classifier\.bias is \(4,\), and in the run's model it is \(2,\)")


def test_other_tensors_are_one_line(run):
    shutil.copy(run / "adapter" / "head.safetensors", run / "adapter" / "adapter_model.safetensors")
    refused(run, "and in the run's model it is missing")
    save_file({}, run / "adapter" / "adapter_model.safetensors")
    refused(run, "is missing, and in the run's model it is")


def test_a_run_that_is_not_finished_has_no_model_yet(run):
    shutil.rmtree(run / "adapter")
    refused(run, "adapter: got .*there is no such folder; a run writes it when it is finished")


def test_the_known_answer_has_no_model(tmp_path):
    out = rayfed.run(lowrank("server.rounds=1"), out=tmp_path / "run").out
    refused(out, "run: got .*, but it solved data.source=lowrank, which has no model to load")


def test_a_change_of_a_loaded_model_reaches_no_other(finished):
    model = rayfed.load_model(finished)
    before = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(rayfed.load_model(finished)), before)
