"""Reading and writing files: text by one rule, JSON without NaN, a file whole or not at all,
and one writer at a time.
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


class UserError(Exception):
    """Something the user can mend: one sentence that names it and the remedy."""


def reason(error):
    """What the system says of an OSError, in a few words: "No such file or directory"."""
    return error.strerror or type(error).__name__


def as_text(content, name):
    """Bytes -> str, by the rule for all text that is read here: UTF-8, a byte order mark at the
    beginning dropped, line ends as LF. Raises UserError on what is not UTF-8; name: for it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 text (byte {e.start}); convert it to UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path):
    """A text file, as as_text reads it. It is read once: a pipe will do. Raises UserError."""
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); name a text file that can")
    return as_text(content, path)


def without_nan(value):
    """Plain values (dicts, lists, numbers, ...) as JSON can hold them: NaN and infinities -> None.
    """
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value, indent=None):
    """Plain values as JSON, where there is no NaN: null stands for what is not a finite number."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def write_json(path, value):
    """Plain values as a JSON file, null where a number is not finite."""
    write(Path(path), lambda f: f.write(to_json(value, indent=1).encode()))


def write(path, to_file):
    """Write a file so that a stop at any moment leaves the old or the new one, never a part.
    to_file(f) writes into f. Ctrl-C waits until the file is there. Raises UserError."""
    begins, ends = f"{path.name}.{socket.gethostname()}.", ".tmp"
    temporary = path.with_name(f"{begins}{os.getpid()}{ends}")   # two processes: two names
    try:
        with interrupts_later():
            path.parent.mkdir(parents=True, exist_ok=True)
            for old in path.parent.glob("*" + ends):             # left by a process that was killed
                if old.name.startswith(begins) and gone(old.name[len(begins):-len(ends)]):
                    old.unlink(missing_ok=True)
            with open(temporary, "wb") as f:
                to_file(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                 # torch.save may wrap the OSError
        raise UserError(f"{path} cannot be written ({' '.join(str(e).split())[:200]}); "
                        + remedy(e))
    finally:
        with contextlib.suppress(OSError):               # there may be none, nor its folder
            temporary.unlink()


def remedy(error):
    """What may help where a file cannot be written."""
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a place that you may write to"
    if number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return "a folder and a file are in each other's way; choose another name"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "make room or choose another folder"          # also where torch.save hides the reason


def gone(pid):
    """Whether no process of this machine has that number (text)."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OverflowError, OSError):         # not a number, or another user's
        return False
    return False


@contextlib.contextmanager
def interrupts_later():
    """Ctrl-C inside takes effect at the end, a second one at once. (torch.save turns what comes
    while it writes into a RuntimeError.)"""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield                                            # nothing arrives here, or it is ignored
        return
    pressed = []

    def press(number, frame):
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if pressed:
            raise KeyboardInterrupt


HELD = {}                        # path -> the open file whose lock this process holds


def hold(path, wait=False):
    """Be the only process that writes `path`, until release() or the process's death, however that
    comes: the system gives the lock back. The lock is on a hidden file beside path, which holds
    the number of the process. wait: for another run to end; otherwise a UserError names it.
    Returns whether this call took it: it may be held by this process already."""
    try:
        import fcntl
    except ImportError:                                  # not a Unix: no locks
        return False
    path = Path(path).absolute()
    lock = path.with_name(f".{path.name}.lock")
    while path not in HELD:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            f = open(lock, "a+")
        except OSError as e:
            raise UserError(f"{path} cannot be written ({reason(e)}); {remedy(e)}")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            owner = f"another run (process {f.read().strip() or 'unknown'})"
            if not wait:
                f.close()
                raise UserError(f"{owner} is writing {path}; wait for its end, or choose another "
                                "folder")
            print(f"{owner} is writing {path}; waiting for its end", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError:                                  # a file system without locks
            f.close()
            return False
        # release() removes the file: what was opened before that is no longer the lock
        if lock.exists() and os.path.samestat(os.stat(lock), os.fstat(f.fileno())):
            f.truncate(0)
            f.write(f"{os.getpid()} on {socket.gethostname()}")
            f.flush()
            HELD[path] = f
            return True
        f.close()
    return False


def release(path=None):
    """Give back what hold(path) took, or everything."""
    for path in list(HELD) if path is None else [Path(path).absolute()]:
        f = HELD.pop(path, None)
        if f is None:
            continue
        with contextlib.suppress(OSError):               # its folder may be gone
            path.with_name(f".{path.name}.lock").unlink()
        f.close()


# ---- what a script prints

class Output:
    """stdout or stderr, whose failures are not the user's mistakes. What the encoding has no
    sign for is written as an escape; where nobody reads on (`| head -1`), the work goes on
    unseen. needed: whether other failures, such as a full disk, end the work (UserError)."""

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
                raise UserError(f"what is to be shown cannot be written ({reason(e)}); make "
                                "room, or send it elsewhere")

    def __getattr__(self, name):
        return getattr(self.stream, name)
