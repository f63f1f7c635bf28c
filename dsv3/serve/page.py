"""The chat page: one document that needs nothing from outside, and the policy under which a browser runs it."""

import base64
import hashlib
from functools import cache
from importlib import resources


@cache
def chat_page() -> str:
    """Return the page as one HTML document, with its style and its script inside."""
    return _file("page.html").replace("{{ style }}", _style()).replace("{{ script }}", _script())


@cache
def content_security_policy() -> str:
    """Return the `Content-Security-Policy` that the page is to be sent with.

    It names the page's own script and style by their hashes, lets the page speak with its own server only, and makes
    the browser refuse every place where text could become markup (`require-trusted-types-for`).
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash_of(_script())}",
            f"style-src {_hash_of(_style())}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _style() -> str:
    return "\n" + _file("page.css")


def _script() -> str:
    return "\n" + _file("page.js")


def _file(name: str) -> str:
    return (resources.files("dsv3.serve") / name).read_text(encoding="utf-8")


def _hash_of(text: str) -> str:
    """Return a hash source of the policy; the browser hashes all that stands between the tags."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
