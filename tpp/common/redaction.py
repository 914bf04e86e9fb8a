"""What services say in their errors, without the secrets that they were given."""

import os
import re

_SECRET_VARIABLE = re.compile("key|secret|token|passw|credential|connection_string", re.IGNORECASE)
_SHORTEST = 8  # a shorter value is no secret, and stands in many words


def without_secrets(text: str) -> str:
    """A text without the values of environment variables that are called as secrets are."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, "...")
    return text
