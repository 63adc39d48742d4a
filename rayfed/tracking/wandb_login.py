"""Whether a run goes to W&B, and how: decided from settings, environment and files, without network and without wandb.

wandb itself would ask for a key on a terminal and wait for servers; a run that may start unattended can afford neither.
No key is kept or shown here: the only question is whether there is one.
"""

from __future__ import annotations

import configparser
import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from rayfed.errors import allowed

if TYPE_CHECKING:
    from rayfed.config.execution import Tracking

Mode = Literal["online", "offline", "off"]
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # W&B's public service, under both names it has had
REFUSALS: dict[str, Mode] = {"disabled": "off", "offline": "offline", "dryrun": "offline"}


def wandb_mode(settings: Tracking) -> Mode:
    """How to track: as set, unless WANDB_MODE, `wandb offline` or `wandb disabled` refuse; `off` stays off.

    `auto` is online when logged in, else offline.
    """
    if settings.wandb == "off":
        return "off"
    if find_spec("wandb") is None:
        if settings.wandb == "auto":
            return "off"
        raise allowed("tracking.wandb", settings.wandb, "wandb is not installed: `pip install wandb`, or choose off")
    stored = _stored_settings()
    wish = os.environ.get("WANDB_MODE") or stored.get("mode", "")
    if wish in REFUSALS:
        return REFUSALS[wish]
    if settings.wandb == "auto":
        return "online" if logged_in() else "offline"
    return settings.wandb


def logged_in() -> bool:
    """True where wandb would find a key or an identity token by itself: environment, netrc file or its settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    stored = _stored_settings()
    if stored.get("api_key") or stored.get("identity_token_file"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or stored.get("base_url", "")
    hosts = (urlsplit(server).netloc,) if server else HOSTS
    try:
        known = netrc.netrc(_netrc_path()).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in known and known[host][2] for host in (*hosts, "default"))


def _netrc_path() -> Path:
    """Where wandb looks: NETRC, `~/.netrc`, `~/_netrc`."""
    if named := os.environ.get("NETRC"):
        return Path(named).expanduser()
    usual = Path("~/.netrc").expanduser()
    return usual if usual.exists() else Path("~/_netrc").expanduser()


def _stored_settings() -> dict[str, str]:
    """What `wandb login`, `wandb offline` and `wandb disabled` leave behind: user-wide, then in the working folder."""
    everywhere = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    here = Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
    found: dict[str, str] = {}
    for folder in (everywhere, here):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(folder / "settings")
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
        if parser.has_section("default"):
            found |= dict(parser["default"])
    return found
