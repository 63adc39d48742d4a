"""Channels: what happens between the bytes that are sent and the bytes that arrive. One file a channel."""

from rayfed.channels.base import Channel
from rayfed.channels.lossless import Lossless

__all__ = ["Channel", "Lossless"]
