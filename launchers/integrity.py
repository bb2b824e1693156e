"""Checks a folder of code against its digest, file by file. Uses only the standard library, and no code in that folder.

A batch script contains the text of this module, and runs it before the code: `python -I -S -c TEXT FOLDER DIGEST`.
"""

import hashlib
import os
import stat
import sys
import time


def digest(files: dict[str, bytes]) -> str:
    """SHA-256 of the files, given as {path: content}; in hexadecimal."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(os.fsencode(name) + b"\0%d\0" % len(files[name]) + files[name])
    return total.hexdigest()


def read(folder: str) -> dict[str, bytes]:
    """Reads all files of a folder, as {path below the folder: content}.

    Raises:
        OSError: something in the folder cannot be read.
        ValueError: the folder is a link, holds anything that is neither a file nor a folder, or is too large.
    """
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise ValueError(f"{folder!r} is a link")
    files = {}
    for parent, folders, names in os.walk(folder, onerror=_fail):
        for name in (*folders, *names):
            path = os.path.join(parent, name)
            kind = os.lstat(path).st_mode
            if stat.S_ISREG(kind):
                if os.lstat(path).st_size > MOST_BYTES:
                    raise ValueError(f"{path!r} is too large for code")
                with open(path, "rb") as file:
                    files[os.path.relpath(path, folder)] = file.read(MOST_BYTES)
            elif not stat.S_ISDIR(kind):
                raise ValueError(f"{path!r} is not a regular file")
            if len(files) > MOST_FILES:
                raise ValueError(f"{folder!r} holds more than {MOST_FILES} files")
    return files


def problem(folder: str, expected: str) -> str:
    """Why a folder does not match the digest `expected`; empty if it matches."""
    try:
        return _problem(folder, expected)
    except OSError as error:
        return str(error)


def _problem(folder: str, expected: str) -> str:
    """Like `problem`, but raises OSError if something in the folder cannot be read."""
    try:
        found = digest(read(folder))
    except ValueError as error:
        return str(error)
    return "" if found == expected else f"{folder!r}: files were changed, added, or removed after the copy was made"


def _fail(error: OSError) -> None:
    raise error


MOST_BYTES, MOST_FILES = 2**24, 1000

PAUSES = (1, 5, 15, 40)  # seconds; a file system may need that long on a node that has just booted

if __name__ == "__main__":
    wrong = ""
    for pause in (*PAUSES, 0):
        try:
            wrong = _problem(sys.argv[1], sys.argv[2])
            break
        except OSError as error:
            if not pause:
                sys.exit(f"scaleprog: the job's code cannot be read on this node: {error}; submit the same again")
            time.sleep(pause)
    if wrong:
        sys.exit(f"scaleprog: the job's code is not the submitted code: {wrong}; remove the folder and submit again")
