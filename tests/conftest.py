"""A tiny federation that every part can be tested on: made by code, trained in milliseconds, no download."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' own small sums: threads would only wait for each other
os.environ.setdefault("RAY_worker_niceness", "0")  # else Ray's workers yield to the tests in the other process

settings.register_profile("default", max_examples=25, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests on Ray come first: they take longest, and so no process of pytest-xdist is left with one."""
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in on_ray)


@pytest.fixture(scope="module")
def ray_cluster() -> None:
    """Ray with 4 CPUs, shared by all tests of this process that use the fixture.

    It is started once, and again where a module with a Ray of its own has stopped it.
    """
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )


SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TOPICS = ("card", "loan", "rate", "app")
WORDS = [f"{topic}{i}" for topic in TOPICS for i in range(6)] + [f"the{i}" for i in range(20)]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers, 32 wide, with random weights and a word-level tokenizer, saved as a local model folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.1, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 2 layers, 32 wide (Conv1D layers, no padding token of its own) with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    vocabulary = {word: i for i, word in enumerate(["<end>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<end>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 training and 60 test texts of 4 topics as JSON lines; words of the own topic outweigh the others."""
    folder = tmp_path_factory.mktemp("tiny-data")
    draw = random.Random(0)
    for split, rows in (("train", 160), ("test", 60)):
        lines = []
        for i in range(rows):
            topic = i % len(TOPICS)
            own = [f"{TOPICS[topic]}{draw.randrange(6)}" for _ in range(draw.randint(1, 4))]
            text = own + draw.choices(WORDS, k=draw.randint(2, 8))
            draw.shuffle(text)
            lines.append(json.dumps({"text": " ".join(text), "label": TOPICS[topic], "owner": f"user{i % 7}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_bert: Path, tiny_data: Path) -> Callable[..., Any]:
    """tiny("server.rounds=3", ...) -> Experiment: 12 clients, 3 a round, in this process, nothing tracked."""
    from rayfed.config.load import _apply, validate  # the same path an override takes

    def make(*overrides: str) -> Any:
        settings: dict[str, Any] = {
            "name": "tiny",
            "data": {"source": "files", "path": str(tiny_data), "validation": 0.2},
            "partition": {"kind": "dirichlet", "clients": 12, "alpha": 0.5},
            "model": {"name": str(tiny_bert), "pooling": "mean"},
            "lora": {"rank": 4, "alpha": 8, "target_modules": ["query", "value"]},
            "client": {"lr": 0.05, "batch_size": 8},
            "server": {"rounds": 2, "cohort": 3},
            "eval": {"batch_size": 16},
            "engine": {"kind": "local"},
            "tracking": {"console": "off", "wandb": "off"},
        }
        for override in overrides:
            _apply(settings, override)
        return validate(settings)

    return make
