"""The earlier place of `bettertogether.run.directory`."""

from .run.directory import RunDirectory

__all__ = ["RunDirectory"]
