"""Kills and stops of a run's processes, at moments that a seed draws."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

WORKER = "ray::Worker"  # Ray names a process after its actor, and after the method that it runs
TRAINING = "ray::Worker.execute"
DRIVING = "ray::Driver.run"


def processes(title: str, root: int) -> list[psutil.Process]:
    """The running processes below process ``root`` whose title begins with ``title``.

    A job takes milliseconds, so /proc is read for titles first, and asked for parents only where the title is right.
    """
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (entry / "cmdline").read_bytes().startswith(title.encode()):
                process = psutil.Process(int(entry.name))
                below = root in (parent.pid for parent in process.parents())
                if below and process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    found.append(process)
        except (OSError, ValueError, psutil.Error):
            continue
    return found


@dataclass
class Attack:
    """Sends ``signal`` to ``count`` processes one after the other, while the block runs.

    Before each there is a pause of ``pause`` (shortest, longest) seconds. ``delivered`` are the times of the signals,
    in seconds of the monotonic clock; ``pids`` are the processes.
    """

    count: int
    seed: int
    title: str = WORKER  # also those that load their model: an attack on those that train alone would be a bad pack's
    signal: int = signal.SIGKILL
    pause: tuple[float, float] = (0.3, 4.0)
    root: int = field(default_factory=os.getpid)
    delivered: list[float] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    def __enter__(self) -> Attack:
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._attack)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _attack(self) -> None:
        draw = random.Random(self.seed)
        while len(self.delivered) < self.count and not self._ended.wait(draw.uniform(*self.pause)):
            while not (found := processes(self.title, self.root)):
                if self._ended.wait(0.005):
                    return
            target = draw.choice(sorted(found, key=lambda process: process.pid))
            try:
                target.send_signal(self.signal)
            except psutil.Error:  # it has ended meanwhile
                continue
            self.delivered.append(time.monotonic())
            self.pids.append(target.pid)
