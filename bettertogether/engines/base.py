"""The earlier place of `bettertogether.engines.protocol`."""

from .protocol import *  # noqa: F403
