"""How every program ends, in one line: on bad input, on what the system refuses, when it is
interrupted; how files are written, all or nothing; how programs share a folder."""

import ast
import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import numpy as np

# what the operating system refuses -> the way out
WAYS_OUT = {
    errno.ENOSPC: "free some space or choose another folder", errno.EROFS: "choose another folder",
    errno.EACCES: "get the permission or choose another folder",
    errno.EPERM: "get the permission or choose another folder",
    errno.ENOTDIR: "a file is where a folder must be; choose another folder",
    errno.EEXIST: "a file is where a folder must be; choose another folder",
    errno.EISDIR: "a folder is where a file must be; choose another name",
    errno.ENAMETOOLONG: "give a shorter --name",
    errno.EAGAIN: "another program is writing it; run again when that has ended"}


def plain(node):
    """A syntax tree as lists, without docstrings, the same in every version of Python."""
    if isinstance(node, list):
        return [plain(x) for x in node
                if not isinstance(x, ast.Expr) or not isinstance(x.value, ast.Constant)]
    if not isinstance(node, ast.AST):
        return repr(node)
    return [type(node).__name__, *((name, plain(x)) for name, x in ast.iter_fields(node)
                                   if x not in (None, []))]


@functools.cache
def code():
    """A hash of the sources that a result depends on: tests, tables and pages change nothing, nor
    do comments and docstrings."""
    root, found = Path(__file__).parent.parent, hashlib.sha1()
    for folder in (".", "core", "sims", "demos", "baselines", "video_control"):
        for path in sorted((root / folder).glob("*.py")):
            text = path.read_bytes()
            with contextlib.suppress(SyntaxError):      # of a file that nobody imports
                text = repr(plain(ast.parse(text))).encode()
            found.update(text)
    return found.hexdigest()[:10]


def fail(message):
    """One line on stderr and exit code 2: the end of every run with a bad input."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line(path):
    """What the operating system refuses inside ends in one line with the cause and the way out; any
    other error passes.  path: named where the error names none."""
    try:
        yield
    except (OSError, RuntimeError) as error:    # h5py raises a RuntimeError on a full disk
        number = getattr(error, "errno", None)
        number = errno.ENOSPC if "No space left" in str(error) else number
        if number not in WAYS_OUT:
            raise
        fail(f"{getattr(error, 'filename', None) or path}: {os.strerror(number)}; what was there "
             f"is untouched: {WAYS_OUT[number]}, and run again")


def check_folder(flag, folder):
    """Refuses, before the first second of work, a folder that cannot be made or written."""
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        fail(f"{flag} {folder}: {there} is no folder; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        fail(f"{flag} {folder}: nothing can be written in {there}; choose another folder")


@contextlib.contextmanager
def alone(folder):
    """One program at a time: another one that comes here waits until the first has left, and what
    it lent the yielded file descriptor, the lock."""
    with one_line(folder):
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another program is making {folder}: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield lock
    finally:
        os.close(lock)


def end_quietly():
    """An interrupted program, or one whose output nobody reads any more (| head), ends without a
    traceback, with the shell's usual exit code; one without a standard output prints nothing."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)     # at once into a pipe, too

    def end(kind, error, trace):
        """What Python calls with an error that nobody has caught."""
        if kind is KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr, flush=True)
            os._exit(130)
        try:        # is it this pipe, and not a worker's, which is an error?
            print(end="\n" * (kind is BrokenPipeError))
        except BrokenPipeError:
            os._exit(141)
        sys.__excepthook__(kind, error, trace)
    sys.excepthook = end


def write(path, content):
    """Bytes or text to a file, all or nothing: a run killed here leaves the previous file whole."""
    path = os.fspath(path)
    with one_line(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            with open(path + ".tmp", "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())     # a power cut must not leave the new name without data
        except OSError:
            with contextlib.suppress(OSError):      # the first error counts
                os.remove(path + ".tmp")
            raise
        os.replace(path + ".tmp", path)


def mapped_array(shape):
    """An array (float16) whose numbers are on disk, in a file that ends with it."""
    with one_line(gettempdir()), TemporaryFile() as file:
        # at once: a disk that is full later would kill the process that writes there
        os.posix_fallocate(file.fileno(), 0, 2 * int(np.prod(shape)))
        return np.memmap(file, np.float16, shape=shape)
