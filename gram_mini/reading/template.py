"""A judge prompt of one's own, from a file."""

from __future__ import annotations

from pathlib import Path

from gram_mini.chat import SLOTS
from gram_mini.errors import UserError
from gram_mini.prompts import PLACEHOLDER


def read_template(path: Path) -> str:
    """A judge prompt from a UTF-8 file that holds {prompt}, {response_a} and {response_b}, once
    each, in this order.

    The text is taken as it stands. Only one line break at the very end is dropped, because editors
    put one there.

    Raises:
        UserError: no such file, not UTF-8, or a placeholder is missing, doubled or out of order.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give the file of a judge prompt"
        ) from None
    names = PLACEHOLDER.findall(text)
    if names != list(SLOTS):
        raise UserError(
            f"{path}: holds the placeholders {', '.join(names) or 'none'}; the file must hold "
            "{prompt}, {response_a} and {response_b}, each exactly once and in this order"
        )
    return text.removesuffix("\n")
