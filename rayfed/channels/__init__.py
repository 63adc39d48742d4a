"""Channels: what happens to a payload between the two ends. One file per channel."""

from rayfed.channels.base import Channel
from rayfed.channels.lossless import Lossless

__all__ = ["Channel", "Lossless"]
