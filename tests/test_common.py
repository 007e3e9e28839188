"""What the scripts share: text, JSON and files, locks, output, and what is said of foreign files.

Nothing here is random: no test has a false alarm.
"""
import errno
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from data import checkpoints, files, script
from model import ModelConfig, Transformer


def status(main, **how):
    """The exit status of a script whose main this is."""
    try:
        script.command(main, **how)
    except SystemExit as e:
        return e.code
    return 0


# ---- text, JSON, files

@pytest.mark.parametrize("content, text", [
    (b"a\r\nb\rc\n", "a\nb\nc\n"),
    (b"\xef\xbb\xbfa\xef\xbb\xbf", "a\ufeff"),            # a mark is one at the beginning alone
    ("a\u2028b\x85c\x00\U0001f600".encode(), "a\u2028b\x85c\x00\U0001f600")])
def test_text_is_utf8_without_a_mark_and_with_line_ends_as_lf(tmp_path, content, text):
    """The rule for all text, from bytes and from a file; nothing else is altered."""
    path = tmp_path / "text"
    path.write_bytes(content)
    assert files.as_text(content, "it") == files.read_text(path) == text


def test_text_is_read_once(tmp_path):
    """From a pipe, which cannot be read twice."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("once\n",))
    writer.start()
    assert files.read_text(path) == "once\n"
    writer.join()


@pytest.mark.parametrize("content, said", [("ä".encode("latin-1"), "not UTF-8"),
                                           (None, "No such file"), ("folder", "Is a directory")])
def test_what_is_no_text_is_refused_by_name(tmp_path, content, said):
    """Latin-1, a missing file, a folder."""
    path = tmp_path / "it"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(files.UserError, match=f"{path}.*{said}"):
        files.read_text(path)


def test_json_has_null_where_a_number_is_not_finite():
    """At any depth; all else is as it was."""
    value = {"a": [1.5, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": None, "e": True}}
    found = json.loads(files.to_json(value), parse_constant=pytest.fail)
    assert found == {"a": [1.5, None, [None, "x"]], "b": {"c": None, "d": None, "e": True}}


def test_two_processes_write_the_same_file_by_different_names(tmp_path):
    """Each sees its own temporary file until it is whole; what a killed process left is removed,
    what a living one writes is not."""
    path = tmp_path / "file"
    child = os.fork()
    if not child:
        files.write(path, lambda f: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(child, 0)
    left, = tmp_path.glob("*.tmp")
    alive = left.with_name(left.name.replace(f".{child}.", f".{os.getppid()}."))
    alive.touch()
    seen = []
    files.write(path, lambda f: seen.extend(p.name for p in tmp_path.glob("*.tmp")))
    assert len(seen) == 2 and alive.name in seen and left.name not in seen
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["file", alive.name])


@pytest.mark.parametrize("number, remedy", [
    (errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EACCES, "may write"),
    (errno.EROFS, "may write"), (errno.ENOTDIR, "each other's way"),
    (errno.ENAMETOOLONG, "shorter name")])
def test_remedy_for_a_failed_write_fits_the_reason(tmp_path, number, remedy):
    """The system's reason and the remedy are in the sentence, and nothing is left."""
    def fail(f):
        raise OSError(number, os.strerror(number))
    with pytest.raises(files.UserError, match=f"{os.strerror(number)}.*{remedy}"):
        files.write(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_a_file_is_written_takes_effect_when_it_is_whole(tmp_path):
    """Also where the writer turns it into an error of its own, as torch.save does at the second."""
    path = tmp_path / "file"

    def write(f):
        os.kill(os.getpid(), signal.SIGINT)
        f.write(b"whole")
    assert status(lambda: files.write(path, write)) == 130 and path.read_bytes() == b"whole"

    def twice(f):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("failed writing file")
    assert status(lambda: files.write(path, twice)) == 130 and path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- one writer at a time

def test_lock_ends_with_its_process_and_is_no_obstacle_to_itself(tmp_path):
    """Held twice by one process; given back at the end of a command, with its file; taken from a
    process that was killed, whose file is still there."""
    path, lock = tmp_path / "x.pt", tmp_path / ".x.pt.lock"

    def main():
        files.hold(path)
        files.hold(path)
        assert lock.exists()
    assert status(main) == 0 and not lock.exists() and not files.HELD
    child = os.fork()
    if not child:
        files.hold(path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert lock.exists()
    assert status(main) == 0 and not lock.exists()


@pytest.mark.parametrize("wait", [False, True])
def test_lock_of_another_process_is_named_or_waited_for(tmp_path, capfd, wait):
    """Through a real process that holds it until its pipe is closed."""
    path = tmp_path / "x.pt"
    held, ready = os.pipe()
    end, go_on = os.pipe()
    child = os.fork()
    if not child:
        os.close(go_on)
        files.hold(path)
        os.write(ready, b"!")
        os.read(end, 1)
        os._exit(0)
    os.read(held, 1)
    if wait:
        threading.Timer(0.2, os.close, [go_on]).start()
    code = status(lambda: files.hold(path, wait))
    assert code == (0 if wait else 2)
    error = capfd.readouterr().err
    assert f"process {child}" in error and str(path) in error
    if not wait:
        os.close(go_on)
    os.waitpid(child, 0)
    for fd in (held, ready, end):
        os.close(fd)


# ---- what is shown

@pytest.mark.parametrize("encoding, shown", [("ascii", b"1 \\xb1 2 \\u4e2d\n"),
                                             ("cp1252", b"1 \xb1 2 \\u4e2d\n"),
                                             ("utf-8", "1 ± 2 中\n".encode())])
def test_what_the_terminal_has_no_sign_for_is_escaped(monkeypatch, encoding, shown):
    """The rest is shown, and the command succeeds."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    assert status(lambda: print("1 ± 2 中")) == 0
    assert raw.getvalue() == shown


def test_work_goes_on_where_nobody_reads_on(monkeypatch):
    """As under `| head -1`: no error, the work is done to its end, and closing is silent too."""
    reader, writer = os.pipe()
    os.close(reader)
    done = []
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))

    def main():
        for i in range(3):
            print("x" * 100_000, flush=True)
            done.append(i)
    assert status(main) == 0 and done == [0, 1, 2]
    sys.stdout.close()


def test_work_goes_on_where_nobody_reads_the_bar_either():
    """`2>&1 | head -1`, through a real process: both streams are closed after the first line, and
    the work ends with status 0."""
    script = ("import sys\nfrom data import script\n"
              "def main():\n"
              "    for i in range(3):\n"
              "        print('x' * 100_000, flush=True)\n"
              "        print('y' * 100_000, file=sys.stderr, flush=True)\n"
              "    open(sys.argv[1], 'w').write('done')\n"
              "script.command(main)\n")
    reader, writer = os.pipe()
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-c", script, folder + "/file"], cwd=path,
                                   stdout=writer, stderr=writer)
        os.close(writer)
        os.read(reader, 10)
        os.close(reader)
        assert process.wait(timeout=60) == 0
        assert open(folder + "/file").read() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_to_a_full_disk_is_one_sentence(monkeypatch, capsys):
    """Status 2, not a traceback at the end."""
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    assert status(lambda: print("lost")) == 2
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(OSError):
        full.close()


@pytest.mark.parametrize("goes_on", [True, False])
def test_only_scripts_with_checkpoints_say_that_they_go_on(capsys, goes_on):
    """After Ctrl-C, status 130."""
    def main():
        raise KeyboardInterrupt
    how = {"stopped": script.GOES_ON} if goes_on else {}
    assert status(main, **how) == 130
    assert ("goes on" in capsys.readouterr().err) == goes_on


def test_a_broken_compiler_is_one_sentence_and_other_errors_are_not_hidden(capsys):
    """CXX names a compiler that is not there; an error of the script's own stays a traceback."""
    import torch._inductor.config as inductor
    torch.compiler.reset()
    f = torch.compile(lambda x: x.sin() + 1)
    with inductor.patch({"cpp.cxx": (None, "/nonexistent/c++"), "fx_graph_cache": False}):
        assert status(lambda: f(torch.zeros(3))) == 2
    torch.compiler.reset()
    error = capsys.readouterr().err
    assert "torch.compile failed" in error and "--no-compile" in error
    with pytest.raises(ZeroDivisionError):
        script.command(lambda: 1 / 0)


# ---- files that are not ours

def content(kind):
    """A file's bytes."""
    f = io.BytesIO()
    tensors = {"wte.weight": torch.zeros(2, 3), "h.0.bias": torch.zeros(3)}
    if kind == "nanoGPT":
        torch.save({"model": tensors, "optimizer": {}, "model_args": {"n_layer": 1},
                    "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": {}}, f)
    elif kind == "lightning":
        torch.save({"state_dict": tensors, "epoch": 3}, f)
    elif kind == "tensors":
        torch.save(tensors, f)
    elif kind == "objects":
        torch.save({"format": 1, "config": signal.SIGINT}, f)
    elif kind == "cut":
        torch.save(tensors, f)
        return f.getvalue()[:300]
    elif kind == "safetensors":
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        return len(header).to_bytes(8, "little") + header + bytes(4)
    elif kind == "pickle":
        return pickle.dumps(signal.SIGINT)
    elif kind == "lfs":
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    elif kind == "text":
        return b"It was a dark night.\n"
    return f.getvalue()


@pytest.mark.parametrize("kind, said", [
    ("nanoGPT", "nanoGPT's .*iter_num.*tools.convert"), ("lightning", "state_dict.*tools.convert"),
    ("tensors", "bare tensors .*wte.weight"), ("objects", "Python objects"),
    ("cut", "not whole"), ("safetensors", "safetensors file; tools.convert"),
    ("pickle", "pickle|Python objects"), ("lfs", "git-lfs"), ("text", "no file of PyTorch"),
    ("empty", "is empty")])
def test_foreign_checkpoint_is_called_what_it_is(tmp_path, kind, said):
    """And stays; no advice to remove it, which this project did not write."""
    path = tmp_path / "model.pt"
    path.write_bytes(content(kind))
    with pytest.raises(files.UserError, match=f"{path}.*({said})") as e:
        checkpoints.load_checkpoint(path)
    assert "delete" not in str(e.value) and "remove" not in str(e.value)
    assert path.read_bytes() == content(kind)


@pytest.mark.parametrize("inside, said", [("config.json", "tools.convert"), ("round7.pt", "round7.pt")])
def test_folder_given_as_a_checkpoint_is_told_apart(tmp_path, inside, said):
    """Of published weights, or of checkpoints."""
    (tmp_path / inside).touch()
    with pytest.raises(files.UserError, match=f"{tmp_path} is a folder.*{said}"):
        checkpoints.load_checkpoint(tmp_path)


def test_checkpoint_that_may_not_be_read_says_why(tmp_path, monkeypatch):
    """The system's reason (simulated: a superuser may read everything)."""
    def load(*args, **kw):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(files.UserError, match="Permission denied"):
        checkpoints.load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("spoil, said", [("nan", "not finite"), ("width", "do not fit"),
                                         ("field", "do not fit")])
def test_checkpoint_whose_weights_cannot_be_used_is_refused(tmp_path, spoil, said):
    """NaN in it, as after a training that diverged; sizes, or a setting, of another model."""
    model = Transformer(ModelConfig(7, 8, 1, 2, 8))
    sizes = dict(vocab=7, context=8, layers=1, heads=2, width=8)
    if spoil == "nan":
        model.lm_head.bias.data[3] = torch.nan
    elif spoil == "width":
        sizes["width"] = 16
    else:
        sizes["unknown"] = 1
    path = tmp_path / "x.pt"
    checkpoints.save_checkpoint(path, kind="mdlm", model_config=sizes, model={}, optimizer=[], step=1,
                           ema=model.state_dict(), steps=1, seconds=0.0, config={},
                           tokenizer={"kind": "gpt2"})
    with pytest.raises(files.UserError, match=f"{path}.*{said}"):
        checkpoints.load_model(path)
