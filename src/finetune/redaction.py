"""What must be neither shown nor written: tokens, keys, and the values of environment variables that look secret."""

import os
import re

HUB_TOKEN = re.compile(rb"\bhf_(?:oauth_[\w.-]{20,}|[A-Za-z0-9]{20,})")
KEYS = {
    "a Hugging Face token": HUB_TOKEN,
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS access key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
}
SECRET_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")


def secret_values() -> dict[str, str]:
    """ "the value of $NAME" -> that value, for the environment variables whose names say that they are secret."""
    # Shorter values are words that a text may hold for good reasons.
    shortest = {"HF_TOKEN": 8}
    return {
        f"the value of ${name}": value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= shortest.get(name, 16)
    }


def secret_in(text: str) -> str | None:
    """The kind of secret that `text` holds, in words, or None."""
    if kind := next((kind for kind, pattern in KEYS.items() if pattern.search(_bytes(text))), None):
        return kind
    return next((kind for kind, value in secret_values().items() if value in text), None)


def without_secrets(text: str) -> str:
    """`text` with "[token]" in the place of all that looks like a token, and of the values of secret variables."""
    for value in sorted(secret_values().values(), key=len, reverse=True):
        text = text.replace(value, "[token]")
    data = _bytes(text)
    for pattern in KEYS.values():
        data = pattern.sub(b"[token]", data)
    return data.decode(errors="surrogatepass")


def shown(text: str) -> str:
    """`text` for a screen: without secrets, and with control characters as escapes, which a terminal would obey.

    A caption, a file name or an answer of a server may hold them, and a message may quote these.
    """
    visible = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in without_secrets(text))
    return "".join(visible)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
