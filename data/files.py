"""Reading and writing files: text by one rule, JSON without NaN, a file whole or not at
all, and one writer at a time.
"""
import contextlib
import errno
import json
import math
import os
import signal
import socket
import sys
import threading
from pathlib import Path

try:
    import fcntl
except ImportError:              # not a Unix: no locks
    fcntl = None


class UserError(Exception):
    """Something the user can mend: one sentence that names it and the remedy."""


def reason(error):
    """What the system says of an OSError, in a few words: "No such file or directory"."""
    return error.strerror or type(error).__name__


# ---- text and JSON

def as_text(content, name):
    """Bytes -> str, by the rule for all text that is read here: UTF-8, a byte order mark at
    the beginning dropped, line ends as LF. Raises UserError on what is not UTF-8; name: for
    it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 text (byte {e.start}); convert it to UTF-8")
    # CR LF first, or it would become two line ends
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path):
    """A text file, as as_text reads it. It is read once: a pipe will do. Raises UserError.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); name a text file that can")
    return as_text(content, path)


def without_nan(value):
    """Plain values (dicts, lists, numbers, ...) as JSON can hold them: None in place of NaN
    and infinities."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value, indent=None):
    """Plain values as JSON, which has no NaN: null stands for a number that is not finite.
    """
    return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def write_json(path, value):
    """Plain values as a JSON file, null where a number is not finite."""
    write(Path(path), lambda f: f.write(to_json(value, indent=1).encode()))


# ---- a file whole or not at all

def write(path, to_file):
    """Write a file so that a stop at any moment leaves the old or the new one, never a
    part. to_file(f) writes into f. Ctrl-C waits until the file is there. Raises UserError.
    """
    # machine and process in the name: two processes never write to the same file
    begins = f"{path.name}.{socket.gethostname()}."
    temporary = path.with_name(f"{begins}{os.getpid()}.tmp")
    try:
        with interrupts_later():
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_left(path.parent, begins)
            with open(temporary, "wb") as f:
                to_file(f)
                # onto the disk, before it takes the old file's place
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    # torch.save may turn an OSError into a RuntimeError
    except (OSError, RuntimeError) as e:
        said = " ".join(str(e).split())[:200]
        raise UserError(f"{path} cannot be written ({said}); {remedy(e)}")
    finally:
        # after a failure only: there may be none, nor its folder
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_left(folder, begins):
    """Remove the temporary files of processes that were killed. begins: what stands before
    the number of the process."""
    for old in folder.glob("*.tmp"):
        # another file's, or another machine's, whose processes are not known here
        if not old.name.startswith(begins):
            continue
        number = old.name[len(begins):].removesuffix(".tmp")
        if gone(number):
            old.unlink(missing_ok=True)


def remedy(error):
    """What may help where a file cannot be written."""
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a place that you may write to"
    if number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return "a folder and a file are in each other's way; choose another name"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    # the likeliest, also where torch.save hides the reason
    return "make room or choose another folder"


def gone(pid):
    """Whether no process of this machine has that number (text)."""
    try:
        os.kill(int(pid), 0)             # signal 0 only asks
    except ProcessLookupError:
        return True
    # not a number, or a process of another user
    except (ValueError, OverflowError, OSError):
        return False
    return False


@contextlib.contextmanager
def interrupts_later():
    """Ctrl-C inside takes effect at the end, a second one at once. (torch.save turns what
    comes while it writes into a RuntimeError.)"""
    # only the main thread gets Ctrl-C; what is not callable ignores it
    usual = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(usual):
        yield
        return

    pressed = []                         # an entry for each Ctrl-C

    def press(number, frame):
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        # as before, also after an error; then what was put off
        signal.signal(signal.SIGINT, usual)
        if pressed:
            raise KeyboardInterrupt


# ---- one writer at a time

HELD = {}                    # path -> the open file whose lock this process holds


def lock_of(path):
    """The hidden file beside `path` that is locked for it."""
    return path.with_name(f".{path.name}.lock")


def hold(path, wait=False):
    """Be the only process that writes `path`, until release() or the process's death,
    however that comes: the system gives the lock back. The lock is on a hidden file beside
    path, which holds the number of the process. wait: for another run to end; otherwise a
    UserError names it. Returns whether this call took it: it may be held by this process
    already."""
    if fcntl is None:
        return False
    path = Path(path).absolute()         # one name for a file, in any working directory
    while path not in HELD:
        # "a+" makes the file, or opens it without emptying it: it names the owner
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            f = open(lock_of(path), "a+")
        except OSError as e:
            raise UserError(f"{path} cannot be written ({reason(e)}); {remedy(e)}")
        if not lock(f, path, wait):
            f.close()
            return False
        # the one before removed its file in release(): if f is that file, try again with
        # the one that is there now
        if is_still(f, lock_of(path)):
            f.truncate(0)
            f.write(f"{os.getpid()} on {socket.gethostname()}")
            f.flush()
            HELD[path] = f
            return True
        f.close()
    return False


def lock(f, path, wait):
    """Lock the open file f, as hold(path, wait) says. Returns whether it could be locked:
    some file systems have no locks."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # another process has it, and wrote its number into the file
    except BlockingIOError:
        f.seek(0)
        owner = f"another run (process {f.read().strip() or 'unknown'})"
        if not wait:
            f.close()
            raise UserError(f"{owner} is writing {path}; wait for its end, or choose "
                            "another folder")
        # the same without LOCK_NB waits
        print(f"{owner} is writing {path}; waiting for its end", file=sys.stderr)
        fcntl.flock(f, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def is_still(f, path):
    """Whether the open file f is the one that `path` names now."""
    return path.exists() and os.path.samestat(os.stat(path), os.fstat(f.fileno()))


def release(path=None):
    """Give back what hold(path) took, or everything."""
    paths = list(HELD)
    if path is not None:
        paths = [Path(path).absolute()]
    for one in paths:
        f = HELD.pop(one, None)
        if f is None:
            continue
        # removed before it is given back: nobody else's file is removed
        with contextlib.suppress(OSError):       # its folder may be gone
            lock_of(one).unlink()
        f.close()


# ---- what a script prints

class Output:
    """stdout or stderr, whose failures are not the user's mistakes. What the encoding has
    no sign for is written as an escape; where nobody reads on (`| head -1`), the work goes
    on unseen. needed: whether other failures, such as a full disk, end the work
    (UserError)."""

    def __init__(self, stream, needed=True):
        self.stream, self.needed = stream, needed
        # a notebook's stream has no encoding
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        return self.attempt(lambda: self.stream.write(text))

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, f):
        """f(), with its failures as the class says."""
        try:
            return f()
        except BrokenPipeError:
            # from now on into nothing, also at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError as e:
            if self.needed:
                raise UserError(f"what is to be shown cannot be written ({reason(e)}); "
                                "make room, or send it elsewhere")

    def __getattr__(self, name):
        return getattr(self.stream, name)
