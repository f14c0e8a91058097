"""Keys and passwords, kept out of what is written down: records of runs, recipes, messages.

Known are values of environment variables that are named for secrets, the shapes that keys of
common services have, and passwords within addresses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(?i)(^|[^a-z])(api_?keys?|access_?key|secrets?|token|passw(or)?d|credentials?)($|[^a-z])"
)
LEAST_CHARACTERS = 8  # of a variable's value: `true` or `1` is no secret
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bgithub_pat_\w{40,}|\bAKIA[0-9A-Z]{16}\b|\bwandb_v\d_\w{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


def without_secrets(text: str) -> str:
    """The text with `***` in place of each."""
    for value in sorted(_values(os.environ), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _PASSWORD.sub(HIDDEN, _SHAPES.sub(HIDDEN, text))


def is_secret_name(name: str) -> bool:
    """Whether an option or a variable is named for a secret: WANDB_API_KEY, hub.token."""
    return SECRET_NAME.search(name) is not None


def secret_variable(text: str) -> str | None:
    """The environment variable whose secret value stands in the text; None: none does."""
    return next((name for value, name in _values(os.environ).items() if value in text), None)


def require_no_password(address: str, option: str) -> None:
    """Refuses https://user:password@host/: it would stand in records and messages."""
    if _PASSWORD.search(address):
        raise ValueError(
            f"{option}={without_secrets(address)} holds a password, which would be written down; "
            "fetch the files by other means, and name their folder"
        )


def _values(variables: Mapping[str, str]) -> dict[str, str]:
    """Values of variables that are named for secrets, and their names."""
    return {
        value: name
        for name, value in variables.items()
        if is_secret_name(name) and len(value) >= LEAST_CHARACTERS
    }
