"""Model folders that transformers would accept, or fail on with a traceback, are refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from faults.bad_data import bad_inputs, write
from safetensors.torch import load_file, save_file

from rayfed.config.task import Model
from rayfed.errors import UserError
from rayfed.tasks.models.base import load_base, load_tokenizer, longest_input, vocabulary

CASES = {case.name: case for case in bad_inputs() if case.kind == "model"}
IN_DATA = ("config.json: small vocabulary", "tokenizer.json: a token outside")  # seen when the texts are tokenised


@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_DATA])
def test_a_bad_folder_is_refused(tiny_bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    settings = Model(name=write(CASES[name], tmp_path, tiny_bert, 0), pooling="mean")
    with pytest.raises(UserError, match=r"^model.name: ") as refusal:
        _ = longest_input(settings), load_tokenizer(settings), load_base(settings, 2, 0)
    assert CASES[name].refusal in str(refusal.value)
    assert str(refusal.value).isprintable()
    assert capfd.readouterr().err == ""


def test_a_folder_with_few_layers_of_its_weights_or_a_head_of_another_task_is_accepted(
    tiny_bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"classifier.weight": torch.zeros(7, 32), "classifier.bias": torch.zeros(7)}
    tensors = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_base(Model(name=str(tmp_path)), 3, 0).head == ("bert.pooler.dense", "classifier")
    assert load_base(Model(name=str(tmp_path), pooling="mean"), 3, 0).head == ("classifier",)
    assert vocabulary(Model(name=str(tmp_path))) == config["vocab_size"]


def test_code_in_a_folder_does_not_run_without_the_users_word(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Net"}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for kind in ("bert", "evil"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": code}))
        try:
            load_base(Model(name=str(tmp_path), pooling="mean"), 2, 0)
        except UserError:
            assert kind == "evil"
        assert not (tmp_path / "ran").exists()


def test_the_random_generator_of_torch_is_left_alone(tiny_bert: Path) -> None:
    torch.manual_seed(random.Random(0).randrange(100))
    before = torch.get_rng_state()
    load_base(Model(name=str(tiny_bert), pooling="mean"), 2, 0)
    assert torch.equal(before, torch.get_rng_state())
