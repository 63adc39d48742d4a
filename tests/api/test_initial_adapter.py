"""`model.adapter`: a run starts from a given adapter, of rayfed's or of PEFT's own, or is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import lowrank

import rayfed
from rayfed.api import prepare
from rayfed.api.plans import build_components
from rayfed.clients.plan import RunPlan
from rayfed.config.adapter import FILES
from rayfed.engine.local_executor import LocalExecutor
from rayfed.errors import UserError
from rayfed.lora import peft_files
from rayfed.lora.adapter import flatten_changes
from rayfed.methods import METHODS, build, with_adapters
from rayfed.server.evaluation.evaluate import evaluate, metrics
from rayfed.server.evaluation.targets import global_changes

Tiny = Callable[..., Any]
KINDS = {  # what differs: the head on the encoder's mean, the model's own, a Conv1D
    "mean": (),
    "stock": ("model.pooling=stock",),
    "gpt2": ("model.pooling=stock", "lora.target_modules=[c_attn]"),
}


@pytest.fixture(scope="module")
def kind(tiny: Tiny, tiny_gpt2: Path) -> Callable[..., rayfed.Experiment]:
    """kind("mean", ...) -> settings of that model."""

    def make(name: str, *overrides: str) -> rayfed.Experiment:
        base = (f"model.name={tiny_gpt2}",) if name == "gpt2" else ()
        return tiny(*KINDS[name], *base, "method.name=fedit", *overrides)

    return make


@pytest.fixture(scope="module")
def trained(kind: Callable[..., rayfed.Experiment], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """trained("mean") -> a finished run of two rounds; each runs once."""
    runs: dict[str, rayfed.RunResult] = {}

    def run(name: str) -> rayfed.RunResult:
        if name not in runs:
            runs[name] = rayfed.run(kind(name), tmp_path_factory.mktemp(name) / "run")
        return runs[name]

    return run


def measured(plan: RunPlan) -> dict[str, Any]:
    """The test metrics of the first state: as after a round, before any."""
    state = plan.method.init(plan.start(), plan.seed)
    model = flatten_changes(global_changes(plan.method, state), plan.method.head(state))
    with closing(LocalExecutor(plan)) as executor:
        outputs = evaluate(executor, plan.federation, {"": model}, ("test",), plan.eval.batch_size)
    return metrics(plan.task, plan.federation, outputs, ("",), ("test",))


@pytest.mark.parametrize("name", KINDS)
def test_the_first_state_is_the_adapter_for_every_method_or_the_method_is_refused(
    kind: Callable[..., rayfed.Experiment], trained: Callable[..., Any], name: str
) -> None:
    result = trained(name)
    given = f"model.adapter={result.out}"
    plan, last = prepare(kind(name, given)), result.metrics[-1]
    assert measured(replace(plan, initial=None))["test/loss"] != pytest.approx(last["test/loss"], rel=0.01)
    for method in METHODS:
        if method in with_adapters():
            found = measured(replace(plan, method=build(method)))
            assert found["test/loss"] == pytest.approx(last["test/loss"], rel=1e-4)
            assert found["test/accuracy"] == last["test/accuracy"]
        else:
            with pytest.raises(UserError, match=rf"^model\.adapter: got .*, but {method} cannot start from one: .*the"):
                build_components(kind(name, given, f"method.name={method}"))


@pytest.mark.parametrize("method", ["fedit", "flora", "rac_lora"])
def test_the_clients_first_download_has_the_adapter(
    tiny: Tiny, trained: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    """All of it, in the first messages or as the base update of clients that take part for the first time."""
    out = trained("mean").out
    settings = (f"method.name={method}", "server.rounds=1", "client.lr=1e-9", "server.cohort=12")
    run = rayfed.run(tiny(*settings, f"model.adapter={out}"), tmp_path / "run")
    entries = sum(tensor.numel() for tensor in load_file(out / "adapter" / peft_files.WEIGHTS).values())
    head = 4 * 32 + 4
    assert run.metrics[0]["params/down"] == 12 * (entries + head)
    new = rayfed.run(tiny(*settings), tmp_path / "new")
    assert new.metrics[0]["params/down"] == 12 * ((entries if method == "fedit" else 0) + head)
    assert "model.adapter: starts from" in (run.out / "events.log").read_text()


def test_a_run_from_an_adapter_goes_on_learning_and_resumes_to_the_same_bits(
    kind: Callable[..., rayfed.Experiment], trained: Callable[..., Any], tmp_path: Path
) -> None:
    settings = kind("mean", f"model.adapter={trained('mean').out / 'adapter'}")
    whole = rayfed.run(settings, tmp_path / "whole")
    with rayfed.iter_rounds(settings, tmp_path / "run") as rounds:
        next(rounds)
    resumed = rayfed.run(settings, tmp_path / "run", resume=True)
    assert list(resumed.history["state/chain"]) == list(whole.history["state/chain"])
    assert whole.metrics[0]["train/loss"] < trained("mean").metrics[0]["train/loss"]
    again = rayfed.run(tmp_path / "run" / "config.yaml", tmp_path / "again")
    assert list(again.history["state/chain"]) == list(whole.history["state/chain"])


def test_another_content_under_the_same_path_is_refused(
    kind: Callable[..., rayfed.Experiment], trained: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained("mean").out / "adapter", tmp_path / "adapter")
    moved = shutil.copytree(folder, tmp_path / "moved")
    out = rayfed.run(kind("mean", f"model.adapter={folder}"), tmp_path / "run").out
    rayfed.run(kind("mean", f"model.adapter={moved}"), out, resume=True)  # the same files elsewhere
    head = load_file(folder / peft_files.HEAD)
    save_file({name: tensor + 1 for name, tensor in head.items()}, folder / peft_files.HEAD)
    with pytest.raises(UserError, match=r"model\.adapter_digest was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        rayfed.run(kind("mean", f"model.adapter={folder}"), out, resume=True)
    saved = rayfed.load_config(out / "config.yaml").with_(f"model.adapter={folder}")
    with pytest.raises(UserError, match=r"^model\.adapter: got .*, but its files have the digest .* and model"):
        rayfed.run(saved, tmp_path / "other")


def test_stock_peft_writes_what_a_run_starts_from(tiny: Tiny, tiny_bert: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=4)
    config = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, use_rslora=True, target_modules=["query", "value"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "peft")
    plan = prepare(tiny("model.pooling=stock", f"model.adapter={tmp_path / 'peft'}", "method.name=fedit"))
    (note,) = plan.notes
    assert "(rank 3, digest " in note
    assert note.endswith("with its head, whose classes have no names")
    split, right, loss = plan.federation.test, 0, 0.0
    for row in range(len(split)):
        batch = split.batch(torch.tensor([row]).numpy(), padded=True)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = adapted.eval()(**batch).logits
        loss += float(torch.nn.functional.cross_entropy(logits, labels)) / len(split)
        right += int(logits.argmax(-1) == labels)
    found = measured(plan)
    assert found["test/loss"] == pytest.approx(loss, rel=1e-4)
    assert found["test/accuracy"] == right / len(split)
    start = plan.start()
    new = replace(plan, initial=None).start()
    for name, pair in start.layers.items():  # the fourth rank is new
        assert not pair.B[:, 3].any()
        assert torch.equal(pair.A[3], new.layers[name].A[3])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("classes", "with a new head: its own is for other classes"),
        ("shape", "with a new head: its own has other tensors"),
        ("none", "with a new head: it has none"),
        ("frozen", "with the run's frozen head"),
    ],
)
def test_a_head_that_does_not_fit_is_a_new_one(
    kind: Callable[..., rayfed.Experiment], trained: Callable[..., Any], tmp_path: Path, change: str, why: str
) -> None:
    folder = shutil.copytree(trained("mean").out / "adapter", tmp_path / "adapter")
    if change == "classes":
        (folder / "classes.json").write_text(json.dumps(["card", "app", "loan", "rate"]))
    elif change == "shape":
        save_file({"classifier.weight": torch.ones(5, 32), "classifier.bias": torch.ones(5)}, folder / peft_files.HEAD)
    elif change == "none":
        (folder / peft_files.HEAD).unlink()
    frozen = ("model.head=frozen",) if change == "frozen" else ()
    plan = prepare(kind("mean", f"model.adapter={folder}", *frozen))
    assert plan.notes[0].endswith(why)
    head = replace(plan, initial=None).start().head
    assert plan.start().head.keys() == head.keys()
    assert all(torch.equal(plan.start().head[name], tensor) for name, tensor in head.items())


def config_of(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors_of(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    path = folder / peft_files.WEIGHTS
    save_file(dict(change(name, tensor) for name, tensor in load_file(path).items()), path)


@pytest.mark.parametrize(
    ("damage", "overrides", "line"),
    [
        (lambda f: config_of(f, peft_type="LOHA"), (), r"it has peft_type='LOHA'; only plain LoRA is read"),
        (lambda f: config_of(f, use_dora=True), (), r"it has use_dora=True; only plain LoRA is read"),
        (lambda f: config_of(f, rank_pattern={"query": 2}), (), r"it has rank_pattern=\{'query': 2\}; only"),
        (lambda f: config_of(f, init_lora_weights="pissa"), (), r"init_lora_weights='pissa'; only"),
        (lambda f: config_of(f, init_lora_weights=[]), (), r"init_lora_weights=\[\]; only"),
        (lambda f: config_of(f, r=3), (), r"has no B \(out, r\) and A \(r, in\) with r=3"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), (), r"it has r=None"),
        (lambda f: (f / "adapter_config.json").write_text("{"), (), r"adapter_config\.json.*it cannot be read"),
        (lambda f: (f / "adapter_config.json").unlink(), (), r"has no adapter_config\.json: it is no adapter, and"),
        (lambda f: (f / peft_files.WEIGHTS).rename(f / "adapter_model.bin"), (), r"pickled weights are not read"),
        (lambda f: (f / peft_files.WEIGHTS).write_bytes(b"no"), (), r"adapter_model\.safetensors.*cannot be read"),
        (
            lambda f: (f / peft_files.WEIGHTS).rename(f / "x") and (f / peft_files.WEIGHTS).symlink_to(f / "x"),
            (),
            r"is no regular file",
        ),
        (lambda f: tensors_of(f, lambda n, t: (n, t * float("nan"))), (), r"has values that are not finite"),
        (lambda f: tensors_of(f, lambda n, t: (n.replace("lora_B", "lora_C"), t)), (), r"has no B"),
        (
            lambda f: tensors_of(f, lambda n, t: (n.replace("base_model.", ""), t)),
            (),
            r"is missing, and in the run it is \(32, 32\)",
        ),
        (lambda f: None, ("lora.target_modules=[query]",), r"layer .*value is \(32, 32\), and in the run it is not"),
        (
            lambda f: None,
            ("lora.target_modules=[query,value,key]",),
            r"its layer .*key is missing, and in the run it is \(32, 32\)",
        ),
        (lambda f: None, ("lora.rank=3",), r"^lora\.rank: got 3, but model\.adapter has rank 4"),
        (lambda f: None, ("lora.train=head",), r"^lora\.train: got 'head', but model\.adapter has layers"),
        (lambda f: None, ("model.adapter=/no/such",), r"^model\.adapter: got '/no/such', but there is no such folder$"),
        (lambda f: None, ("model.adapter=null", "model.adapter_digest=abc"), r"^model\.adapter_digest: got 'abc', but"),
    ],
)
def test_what_cannot_be_read_or_does_not_fit_is_refused_in_one_line(
    kind: Callable[..., rayfed.Experiment], trained: Callable[..., Any], tmp_path: Path, damage: Any,
    overrides: tuple[str, ...], line: str,
) -> None:  # fmt: skip
    folder = shutil.copytree(trained("mean").out / "adapter", tmp_path / "adapter")
    damage(folder)
    with pytest.raises(UserError, match=line) as caught:
        rayfed.run(kind("mean", f"model.adapter={folder}", *overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_known_answer_starts_from_zero(trained: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"^model\.adapter: got .*data\.source=lowrank every run starts from W = 0"):
        rayfed.run(lowrank(f"model.adapter={trained('mean').out}"))


def test_the_digest_covers_the_files_that_are_read() -> None:
    assert set(FILES) == {peft_files.CONFIG, peft_files.WEIGHTS, peft_files.HEAD, peft_files.CLASSES}
