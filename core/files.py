"""One-line errors and atomic writing."""

import errno
import os
import sys


def fail(message):
    """One line on stderr and exit code 2: the end of every run with a bad input."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


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
            if not append:
                # else a power cut can leave the new name without its data
                os.fsync(file.fileno())
    except OSError as error:
        if not append:
            os.remove(part)
        if error.errno != errno.ENOSPC:
            raise
        fail(f"disk full while writing {path}, what was there is untouched; free space, run again")
    if not append:
        os.replace(part, path)


def stop_if_full(error, folder):
    """A full disk is the user's to solve; any other error is ours to show."""
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        fail(f"the disk of {folder} is full: free some space or choose another --data folder; "
             "what is done is kept")
    raise error
