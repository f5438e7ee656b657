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


def write(path, content):
    """Bytes or text to a file, all or nothing: a run killed here leaves the previous file whole."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())     # a power cut must not leave the new name without data
    except OSError as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        stop_if_full(error, path)
    os.replace(path + ".tmp", path)
