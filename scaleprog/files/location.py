"""Where a data set lies: in a local folder, or behind a URL. Text only: nothing here opens a file or a connection."""

import re
from urllib.parse import urlsplit

PROTOCOLS = ("s3", "gs", "http", "https", "hf")
"""Of the URLs that scaleprog reads; each stands for one library that reads it, and none starts a program."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def check_location(location: str) -> str:
    """`location` itself, a local path or a URL.

    Raises:
        ValueError: it is a URL that scaleprog does not read; the message says what to use, and repeats no password.
    """
    found = _SCHEME.match(location)
    if not found:
        return location
    scheme = found[1]
    if "::" in location:
        raise ValueError("scaleprog reads no chained URLs (::); give the URL of the folder of the shards itself")
    if scheme == "file" and location.startswith("file:///"):
        return location
    if scheme not in PROTOCOLS or not location.startswith(f"{scheme}://"):
        raise ValueError(
            f"scaleprog does not read {scheme}: and starts no programs; use the path of a folder (write ./ before a "
            f"name with a colon), file:///PATH, or a URL of {', '.join(PROTOCOLS)}"
        )
    try:
        parts = urlsplit(location)
    except ValueError:
        raise ValueError("the URL is malformed") from None
    if "@" in parts.netloc:
        raise ValueError(
            "a URL may not hold a user or a password, because recipes are copied into run directories; give them as "
            "fsspec takes them: in ~/.netrc, in variables of the environment, or in ~/.config/fsspec"
        )
    if not parts.netloc or parts.query or parts.fragment or "?" in location or "#" in location:
        raise ValueError("the URL of a folder of shards has a host or bucket, and neither ? nor #")
    return location


def local_path(location: str) -> str | None:
    """The local path at a location that `check_location` accepts; None if it is behind a URL."""
    if location.startswith("file:///"):
        return location.removeprefix("file://")
    return None if _SCHEME.match(location) else location
