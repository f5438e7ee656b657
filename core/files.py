"""How every program ends on bad input, in one line, and how files are written, all or nothing."""

import os
import sys


def fail(message):
    """One line on stderr and exit code 2: the end of every run with a bad input."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def stop_if_full(error, folder):
    """A full disk is the user's to solve: one line. Any other error of writing is raised again."""
    if "No space left" in str(error):
        fail(f"disk full while writing {folder}, what was there is untouched; free some space, "
             "or choose another folder, and run again")
    raise error


def write(path, content, append=False):
    """Bytes or text to a file, all or nothing: a run killed here leaves the previous file whole.
    `append`: behind what is there, instead."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = path if append else path + ".tmp"
    try:
        with open(part, "ab" if append else "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())     # a power cut must not leave the new name without data
    except OSError as error:
        if not append and os.path.exists(part):
            os.remove(part)
        stop_if_full(error, path)
    os.replace(part, path)
