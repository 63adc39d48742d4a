"""One round at a time, and a callback that ends a run: python examples/step_by_step.py"""

from collections.abc import Mapping
from typing import Any

import rayfed

SETTINGS = {
    "data": {"source": "lowrank"},  # a regression problem with a known answer: no download, milliseconds a round
    "partition": {"kind": "natural", "clients": 10},
    "lora": {"rank": 4, "target_modules": ["layer"]},
    "method": {"name": "fedit"},
    "server": {"rounds": 10, "cohort": 5},
    "engine": {"kind": "local"},
    "tracking": {"console": "off", "wandb": "off"},
}


class StopBelow(rayfed.Callback):
    """Ends the run when the training loss is below a bound. On Ray, it runs in the driver actor."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_round(self, record: Mapping[str, Any]) -> bool:
        return bool(record["train/loss"] > self.loss)  # False ends the run


def main(out: str = "runs/step-by-step") -> rayfed.RunResult:
    """Runs three rounds, then goes on until the loss has halved."""
    with rayfed.iter_rounds(SETTINGS, out) as rounds:
        for record in rounds:
            print(f"round {record['round']}: loss {record['train/loss']:.4f}")
            if record["round"] == 3:
                break  # the next round has not begun, and a resume continues after this one
    bound = record["train/loss"] / 2
    return rayfed.run(SETTINGS, out, resume=True, callbacks=[StopBelow(bound)])


if __name__ == "__main__":
    print(main().history[["train/loss", "bytes/total"]])
