"""Your own rows, loss and metric: python examples/own_data.py"""

import random

import torch
from torch import Tensor, nn

import rayfed

WORDS = {"card": ["card", "pin", "cash"], "loan": ["loan", "rate", "bank"]}


def make_rows(count: int) -> list[dict[str, str]]:
    """Texts of two topics; a datasets.Dataset, a DataFrame or a torch data set would do as well."""
    draw = random.Random(count)
    topics = [draw.choice(list(WORDS)) for _ in range(count)]
    return [{"text": " ".join(draw.choices(WORDS[topic], k=5)), "topic": topic} for topic in topics]


def smooth_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row's loss: (rows, classes), (rows,) -> (rows,)."""
    return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)


def error_rate(predicted: Tensor, labels: Tensor) -> float:
    """Over all rows of a split: predicted classes (n,), labels (n,) -> a number."""
    return float(torch.mean((predicted != labels).float()))


def main(model: str = "minilm", out: str | None = None) -> rayfed.RunResult:
    """Runs it with the model's name or folder; ``out`` is the run directory."""
    settings = {
        "partition": {"kind": "iid", "clients": 4},
        "model": {"name": model, "pooling": "mean"},
        "lora": {"rank": 4, "target_modules": ["query", "value"]},
        "server": {"rounds": 3, "cohort": 2},
        "engine": {"kind": "local"},
        "tracking": {"console": "off", "wandb": "off"},
    }
    task = rayfed.TextClassification(
        train=make_rows(160), test=make_rows(40), label="topic", loss_fn=smooth_loss, metric_fns={"error": error_rate}
    )
    return rayfed.run(settings, out, task=task)


if __name__ == "__main__":
    print(main().history[["train/loss", "test/accuracy", "test/error"]])
