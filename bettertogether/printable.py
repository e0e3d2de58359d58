"""Text from models, data and files, made safe to show: what would steer a terminal is written out instead."""

from __future__ import annotations

import logging
import re

from .redaction import masked, remember_asked

_STEERING = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters: escape sequences, carriage return, bell
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # separators and marks that change the order of what is read
    "\ud800-\udfff"  # halves of characters, which no terminal's encoding takes
    "\U000e0000-\U000e007f"  # characters that are never seen
)
_CONTROL = re.compile(f"[{_STEERING}]")
_CONTROL_OR_BREAK = re.compile(f"[{_STEERING}\t\n]")


def printable(value: object) -> str:
    """`value` as text, in which control characters but tab and line break are written as `\\x1b`."""
    return _CONTROL.sub(_written_out, str(value))


def one_line(value: object) -> str:
    """`printable` text whose tabs and line breaks are written out too."""
    return _CONTROL_OR_BREAK.sub(_written_out, str(value))


NOT_UNICODE = "not valid Unicode (half of an emoji, for example)"


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8, which tokenizers and schemas ask for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _written_out(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")


class _PrintableRecords(logging.Filter):
    """Makes the message and the traceback of a log record printable before any handler sees them. No secret is in a
    traceback."""

    _formatter = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        if record.exc_info:
            remember_asked(record.exc_info[1])
            record.exc_text = printable(masked(self._formatter.formatException(record.exc_info)))
        return True


_filter = _PrintableRecords()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, whose lines can't steer a terminal whatever text is in them."""
    logger = logging.getLogger(name)
    logger.addFilter(_filter)
    return logger
