"""Channels: what happens to a payload between the two ends. One file per channel; `channel.kind` names it."""

from rayfed.channels.base import Channel
from rayfed.channels.lossless import Lossless
from rayfed.channels.over_the_air import OverTheAir
from rayfed.config.channel import Channel as Settings


def build(settings: Settings, seed: int) -> Channel:
    """The channel of these settings. ``seed`` is the run's: fading and noise are keyed by it."""
    if settings.kind == "lossless":
        return Lossless()
    noise = settings.power / 10 ** (settings.snr / 10) if settings.snr is not None else settings.noise
    assert noise is not None  # the settings have one of the two
    return OverTheAir(settings.power, noise, settings.truncation, seed)


__all__ = ["Channel", "Lossless", "OverTheAir", "build"]
