"""The lines that a model card gives, run where rayfed cannot be imported."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest


def defined_by_card(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the lines of the run's card define. They run in the run's folder."""
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rayfed"]:
            patch.setitem(sys.modules, name, None)  # importing it is an ImportError
        patch.chdir(run)
        exec(code, namespace)
    return namespace
