"""The typed configuration: YAML files, dotted overrides, and errors that say what to do.

Nothing here imports torch or ray, so that a mistake is answered before they are loaded.
"""

from flowbp_ray.config.errors import ConfigError
from flowbp_ray.config.load import dump, load, settings
from flowbp_ray.config.schema import AlignConfig

__all__ = ["AlignConfig", "ConfigError", "dump", "load", "settings"]
