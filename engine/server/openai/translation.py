"""Other protocols become chat completions; errors keep the names of their own fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import InvalidRequest


@contextmanager
def named(*rules: tuple[str, str]) -> Iterator[None]:
    """Errors about fields of chat completions get the names of another protocol's: pattern -> replacement."""
    try:
        yield
    except InvalidRequest as error:
        field = error.field or ""
        for pattern, name in rules:
            field = re.sub(pattern, name, field)
        message = error.message.replace(f"`{error.field}`", f"`{field}`")
        raise InvalidRequest(message, field=field or None, hint=error.hint) from None
