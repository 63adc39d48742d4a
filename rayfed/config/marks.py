"""temporary"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any


def settings_digest(settings: Mapping[str, Any]) -> str:
    from rayfed.config.schema import WHERE_AND_HOW

    settings = copy.deepcopy(dict(settings))
    for name, fields in WHERE_AND_HOW.items():
        for field in fields or (None,):
            settings[name].pop(field) if field else settings.pop(name)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def data_key(settings: Mapping[str, Any]) -> str:
    no = ("name", "lora", "method", "wire", "profiles", "client", "server", "eval", "engine", "tracking", "checkpoint", "export")  # fmt: skip
    decides = {k: v for k, v in settings.items() if k not in no}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def model_key(settings: Mapping[str, Any]) -> str:
    from rayfed.sweeps.plan import NO_MATTER_OF_MODEL  # temporary

    return json.dumps({k: v for k, v in settings.items() if k not in NO_MATTER_OF_MODEL}, sort_keys=True)
