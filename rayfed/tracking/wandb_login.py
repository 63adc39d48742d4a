"""Whether a run is tracked by W&B, and how. Reads settings, environment and files only: no network, no import of wandb.

wandb itself would ask for a key on a terminal and wait for servers, and a run may start unattended. No key is stored
or shown here; the code only checks that there is one.
"""

from __future__ import annotations

import configparser
import netrc
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from rayfed.errors import allowed

if TYPE_CHECKING:
    from rayfed.config.execution import Tracking

Mode = Literal["online", "offline", "off"]
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the two names of W&B's public service
RESTRICTIONS: dict[str, Mode] = {"disabled": "off", "offline": "offline", "dryrun": "offline"}


def wandb_mode(settings: Tracking) -> Mode:
    """The setting `tracking.wandb`, where `auto` is online if logged in, else offline.

    WANDB_MODE, `wandb offline` and `wandb disabled` can restrict the mode. `off` stays off. UserError if wandb is not
    installed and the setting is `online` or `offline`.
    """
    if settings.wandb == "off":
        return "off"
    if find_spec("wandb") is None:
        if settings.wandb == "auto":
            return "off"
        raise allowed("tracking.wandb", settings.wandb, "wandb is not installed: `pip install wandb`, or choose off")
    mode = os.environ.get("WANDB_MODE") or _stored_settings().get("mode", "")
    if mode in RESTRICTIONS:
        return RESTRICTIONS[mode]
    if settings.wandb == "auto":
        return "online" if logged_in() else "offline"
    return settings.wandb


def logged_in() -> bool:
    """Whether wandb would find a key or an identity token: in the environment, its settings or a netrc file."""
    stored = _stored_settings()
    names = ("api_key", "identity_token_file")
    if any(os.environ.get(f"WANDB_{name.upper()}") or stored.get(name) for name in names):
        return True
    server = os.environ.get("WANDB_BASE_URL") or stored.get("base_url", "")
    hosts = (urlsplit(server).netloc,) if server else HOSTS
    named = os.environ.get("NETRC")  # else wandb reads the first of these files
    files = [Path(file).expanduser() for file in ([named] if named else ["~/.netrc", "~/_netrc"])]
    try:
        logins = netrc.netrc(next(filter(Path.exists, files), files[-1])).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in logins and logins[host][2] for host in (*hosts, "default"))


def _stored_settings() -> dict[str, str]:
    """What `wandb login`, `wandb offline` and `wandb disabled` store; the working folder's values come first."""
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    found: dict[str, str] = {}
    for folder in (user, Path(os.environ.get("WANDB_DIR") or ".") / "wandb"):
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError, KeyError):
            parser.read(folder / "settings")
            found |= parser["default"]
    return found
