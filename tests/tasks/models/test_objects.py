"""A base model that is a Python object: the same bits in every process, a fingerprint, one-line refusals."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import rayfed
from rayfed.config import load_config
from rayfed.errors import UserError

OWN = ("server.rounds=1", "model.pooling=stock", "lora.target_modules=[up]")
ON_RAY = ("engine.kind=ray", "engine.workers=2")


class Net(nn.Module):
    """The mean of embedded tokens, a hidden layer, a head: no config, and logits as a tensor."""

    def __init__(self, words: int = 48, classes: int = 4, head: str = "classifier") -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(words, 16), nn.Linear(16, 16)
        self.head = head
        setattr(self, head, nn.Linear(16, classes))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        states = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        return getattr(self, self.head)(torch.tanh(self.up(states)))


class Drawn(Net):
    """Weights that no seed of torch decides."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.up.bias, float(np.random.default_rng().normal()))


class Fails(Net):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        raise ZeroDivisionError("no luck")


class Tuple(Net):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return (super().forward(input_ids, attention_mask),)


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


def run(experiment: Any, out: Path, model: Any, tokenizer: Any, **parts: Any) -> rayfed.RunResult:
    return rayfed.run(experiment, out, task=rayfed.TextClassification(model=model, tokenizer=tokenizer), **parts)


def digests(result: rayfed.RunResult) -> list[str]:
    return list(result.history["state/digest"])


def logits(model: nn.Module) -> Tensor:
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return found if isinstance(found, Tensor) else found.logits


def test_a_model_of_transformers_gives_the_bits_of_its_folder(tmp_path: Path, tiny: Any, tiny_bert: Path) -> None:
    experiment = tiny("server.rounds=1")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert)
    named = rayfed.run(experiment, tmp_path / "named")
    own = run(experiment, tmp_path / "own", model, tokenizer)
    assert digests(own) == digests(named)
    assert own.metrics[0]["test/loss"] == named.metrics[0]["test/loss"]
    section = yaml.safe_load((own.out / "config.yaml").read_text())["model"]
    assert section["name"] == "object"
    assert section["fingerprint"].startswith("transformers.models.bert.modeling_bert:BertModel ")
    assert not hasattr(model, "classifier")
    task = rayfed.TextClassification(model=lambda: AutoModel.from_pretrained(tiny_bert), tokenizer=str(tiny_bert))
    assert torch.equal(logits(rayfed.load_model(own.out, task=task)), logits(rayfed.load_model(named.out)))


def test_a_plain_module_trains_resumes_and_loads(tmp_path: Path, tiny: Any, rows: Any, tokenizer: Any) -> None:
    experiment, out, torch_state = tiny(*OWN, "export.merged=true"), tmp_path / "run", torch.random.get_rng_state()
    torch.manual_seed(5)
    net = Net()
    torch.random.set_rng_state(torch_state)
    before = copy.deepcopy(net.state_dict())
    finished = run(experiment, out, net, tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert finished.metrics[0]["eval/loss"] > 0
    assert run(out / "config.yaml", out, net, tokenizer, resume=True).rounds == 1
    loaded = rayfed.load_model(out, task=rayfed.TextClassification(model=net, tokenizer=tokenizer))
    merged = Net()
    load_model(merged, out / "merged" / "model.safetensors")
    torch.testing.assert_close(logits(loaded), logits(merged))
    assert not torch.equal(logits(loaded), logits(net))
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(net), out / "adapter").eval()), logits(loaded))
    nn.init.zeros_(net.up.weight)
    for other in (net, Net()):
        with pytest.raises(UserError, match=r"^task: got '.*:Net .*', but the run's model comes from .*:Net "):
            rayfed.load_model(out, task=rayfed.TextClassification(model=other, tokenizer=tokenizer))
        with pytest.raises(UserError, match=r"^--resume: .*other settings.*model.fingerprint was"):
            run(out / "config.yaml", out, other, tokenizer, resume=True)
    with pytest.raises(UserError, match=r"^run: got .*comes from .*:Net .*: load_model\(run, task=...\) needs ray"):
        rayfed.load_model(out)
    with pytest.raises(UserError, match=r"^data.fingerprint: got .* give it again, rayfed.run"):
        rayfed.run(out / "config.yaml", out, resume=True)
    with pytest.raises(UserError, match=r"^model.fingerprint: got .*was a Python object: give it again"):
        rayfed.run(out / "config.yaml", out, resume=True, task=rayfed.TextClassification())


def test_a_function_makes_equal_models_whatever_torchs_state(tmp_path: Path, tiny: Any, tokenizer: Any) -> None:
    first = run(tiny(*OWN), tmp_path / "first", Net, tokenizer)
    torch.rand(3)
    state = torch.random.get_rng_state()
    again = run(tiny(*OWN), tmp_path / "again", lambda: Net(), tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert digests(again) == digests(first)


@pytest.mark.slow
def test_modules_and_functions_on_ray(tmp_path: Path, tiny: Any, tokenizer: Any, ray_cluster: None) -> None:
    here = run(tiny(*OWN), tmp_path / "here", Net, tokenizer)
    there = run(tiny(*OWN, *ON_RAY), tmp_path / "there", Net, tokenizer)
    assert digests(there) == digests(here)
    net = Net()
    here, there = (run(tiny(*OWN, *on), tmp_path / f"net{len(on)}", net, tokenizer) for on in ((), ON_RAY))
    assert digests(there) == digests(here)


def test_a_task_that_cannot_be_pickled_is_refused(tmp_path: Path, tiny: Any, tokenizer: Any) -> None:
    lock = threading.Lock()

    def make() -> Net:
        assert lock
        return Net()

    with pytest.raises(UserError, match=r"^task: got 'TextClassification', but it cannot be pickled, and on Ray it is"):
        run(tiny(*OWN, *ON_RAY), tmp_path / "run", make, tokenizer)


WRONG: dict[str, tuple[Any, str]] = {
    "no model": (7, "model: got 7, but it is a torch.nn.Module, or a function without arguments that makes one"),
    "makes none": (lambda: 7, "model: got 7, but .*<lambda> should make a torch.nn.Module"),
    "needs arguments": (nn.Linear, "model: Linear failed: TypeError: .*missing 2 required positional arguments"),
    "other weights": (
        Drawn,
        "model.fingerprint: got '.*:Drawn .*', but the model that is given has .*:Drawn .*generator",
    ),
    "no head": (Net(head="top"), "model.name: the model has no head named classifier or score, only embed, up, top"),
    "wrong classes": (
        Net(classes=5),
        r"model: got 'Net', but its logits for 2 rows and 4 classes are \(2, 5\); a model",
    ),
    "few words": (Net(words=20), "model: got 'Net', but calling it fails with IndexError: index out of range in self"),
    "fails": (
        Fails(),
        r"model: got 'Fails', but .* ZeroDivisionError: no luck \(.*test_objects.py:\d+\); a model takes",
    ),
    "no logits": (Tuple(), "model: it returned tuple, but a tensor is needed, or an object with `logits`"),
    "no texts": (nn.Sequential(), "model.name: the model has no head named classifier or score, only "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, tiny: Any, tokenizer: Any, name: str) -> None:
    model, message = WRONG[name]
    with pytest.raises(UserError, match=f"^{message}") as refused:
        run(tiny(*OWN), tmp_path / "run", model, tokenizer)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, tiny: Any, tokenizer: Any) -> None:
    for model, wrong, message in (
        (Net(), None, "tokenizer: got None, but a model that is a Python object comes with its tokenizer"),
        (Net(), 7, "tokenizer: got 7, but it is a tokenizer of transformers, or the path of its folder"),
        (Net(), tmp_path, "tokenizer: got '.*', but this folder holds no tokenizer"),
        (None, tokenizer, "tokenizer: got 'Tok.*', but it comes with a model that is a Python object"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            run(tiny(*OWN), tmp_path / "run", model, wrong)


def test_mean_pooling_needs_an_encoder(tmp_path: Path, tiny: Any, tokenizer: Any, tiny_bert: Path) -> None:
    with pytest.raises(UserError, match=r"^model.pooling: got 'mean', but Net has no config.hidden_size"):
        run(tiny(), tmp_path / "run", Net(), tokenizer)
    whole = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=4)
    with pytest.raises(
        UserError, match=r"^model: got 'MeanPooledClassifier', but calling it fails with AttributeError"
    ):
        run(tiny(), tmp_path / "run", whole, tokenizer)


def test_a_config_that_names_an_object_needs_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: object}\n")
    with pytest.raises(UserError, match=r"^model.name: got 'object', but Python objects come with rayfed.run"):
        load_config(tmp_path / "config.yaml")
