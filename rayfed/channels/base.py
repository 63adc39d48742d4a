"""The base class of channels."""

from __future__ import annotations

from typing import ClassVar


class Channel:
    """Carries one payload from one end to the other. The result depends on the payload and the settings only."""

    analog: ClassVar[bool] = False
    """Whether uploads are no bytes, but add up on their way: then `deliver` carries downloads alone, see
    `rayfed.server.air`."""

    def deliver(self, payload: bytes) -> bytes:
        """The payload as the other end receives it. `rayfed.wire.encode` made ``payload``."""
        raise NotImplementedError
