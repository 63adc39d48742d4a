"""The model card of an exported adapter, `adapter/README.md`, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayfed.clients.plan import RunPlan
from rayfed.config.load import dump_settings
from rayfed.privacy import Privacy
from rayfed.tasks.models.usage import Usage
from rayfed.wire.ledger import DIRECTIONS

# Sections that decide nothing of the result: how the base was made, on which machine, under which accounts.
LEFT_OUT = ("pretrain", "engine", "tracking", "checkpoint", "export")


def model_card(plan: RunPlan, summary: Mapping[str, Any]) -> str:
    """The card: a YAML header, what the adapter is and what it reaches, the lines that load it, the run's settings.

    ``summary`` is the run's summary with the figures of the export.
    """
    usage = plan.task.usage()
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(plan, summary).items())
    settings = {name: value for name, value in plan.settings.items() if name not in LEFT_OUT}
    parts = [
        _header(usage),
        f"# {json.dumps(plan.name)[1:-1]}",
        "A LoRA adapter, trained by federated learning on simulated clients, with rayfed.",
        f"| | |\n|---|---|\n{rows}",
        *(_use(plan, usage) if usage else ()),
        f"## Settings\n\n```yaml\n{dump_settings(settings)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _header(usage: Usage | None) -> str:
    """The YAML header. A JSON string is a YAML string, whatever is in it."""
    lines = ["library_name: peft", "tags:", "- lora", "- federated-learning", "- rayfed"]
    if usage:
        lines = [f"base_model: {json.dumps(usage.base)}", f"pipeline_tag: {usage.task}", *lines]
    return "\n".join(["---", *lines, "---"])


def _facts(plan: RunPlan, summary: Mapping[str, Any]) -> dict[str, str]:
    """The rows of the card's table."""
    metric = plan.task.metric or "accuracy"
    rank, lost = summary["export/rank"], summary["export/lost_energy"]
    facts = {"method": f"`{plan.settings['method']['name']}`"}
    if plan.task.metric:
        facts[f"test {metric} of the run"] = _percent(summary[f"final/test_{metric}"])
    own = summary[f"export/test_{metric}"]
    if lost:
        what = f"rank {rank} is too small for the run's change of the base: {_percent(lost)} of its energy is lost"
        facts[f"test {metric} of this adapter"] = f"{_percent(own)} ({what})"
    facts |= {
        "rounds": str(summary["rounds"]),
        "clients": f"{plan.federation.clients}, {plan.server.cohort} a round",
        **_bytes(plan, summary),
        "adapter": f"rank {rank}, alpha {plan.lora.alpha:g}, {len(plan.model.shapes)} layers, float32",
        "trained": "the head alone; the adapter changes nothing" if plan.lora.train == "head" else _trained(plan),
        "base": f"{plan.model.parameters:,} parameters, {plan.model.base_format}",
        "digest of the settings": f"`{plan.digest}`",
    }
    return facts if plan.privacy is None else facts | {"privacy": _privacy(plan.privacy, summary["rounds"])}


def _bytes(plan: RunPlan, summary: Mapping[str, Any]) -> dict[str, str]:
    down, up = (f"{summary[f'bytes/{way}_total']:,}" for way in DIRECTIONS)
    if plan.topology is None:
        return {"bytes from the server to clients": down, "bytes from clients to the server": up}
    own = plan.settings["topology"]
    return {"topology": f"{own['graph']}, {own['algorithm']}; no server", "bytes between clients": up}


def _privacy(privacy: Privacy, rounds: int) -> str:
    own = privacy.settings
    secret = "the noise is secret" if own.noise == "secret" else "whoever has the seed can subtract the noise"
    return f"{own.kind} level, {privacy.cost(rounds)}: a simulation's figure; {secret}"


def _trained(plan: RunPlan) -> str:
    if plan.model.frozen_head:
        return "the adapter; the head is random and frozen"
    return "the adapter and the head" if plan.model.head else "the adapter"


def _use(plan: RunPlan, usage: Usage) -> list[str]:
    """The section with the lines that load the adapter."""
    what = "These lines need transformers and PEFT alone. They run in the folder that has `adapter/`."
    if plan.model.dtype != "float32":
        what += f" They compute in float32 on the base's weights in {plan.model.dtype}, in which the run computed."
    if plan.model.load_in_4bit:
        what += " The run had the weights of the base's linear layers in 4 bits, so its figures differ a little."
    if plan.export.merged:
        head = ", with the head in `merged/head.safetensors`" if plan.model.root else ""
        what += f" `merged/` has the base model with the change of all layers in its weights{head}: no PEFT, no loss."
    return ["## Use", what, f"```python\n{usage.code}```"]


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.1f} %"
