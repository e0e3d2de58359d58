"""The earlier place of `bettertogether.steps.rows`."""

from .steps.rows import Row, read_rows, write_rows

__all__ = ["Row", "read_rows", "write_rows"]
