"""`rayfed pretrain`: a small base model from the rows that no client has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial


def pretrain(config: str, overrides: Sequence[str], out: str | None) -> None:
    """Trains the model of the section `pretrain`, and prints its loss by step and its folder."""
    from rayfed import api

    api.pretrain(api.load_config(config, overrides), out=out, report=partial(print, flush=True))
