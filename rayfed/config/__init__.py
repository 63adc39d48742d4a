"""Settings: one schema, read from YAML and `key=value` overrides, refused in one line where wrong."""

from rayfed.config.load import dump_config, load_config, validate
from rayfed.config.schema import Experiment

__all__ = ["Experiment", "dump_config", "load_config", "validate"]
