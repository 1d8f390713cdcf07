"""The configuration: settings of every room, and how they are read."""

from agentray.config.load import load_settings
from agentray.config.settings import Settings

__all__ = ["Settings", "load_settings"]
