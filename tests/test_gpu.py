"""tools.gpu, the one command for a rented GPU, in small on a CPU. That something is fast is not
tested. No test here has a false alarm: nothing random is looked at.
"""
import itertools
import json
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

from helpers import call
from tools import bench_setup, gpu, gpu_times, machine

pytestmark = pytest.mark.usefixtures("small_nano")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A folder to run in, few tokens, and a machine that is not measured."""
    monkeypatch.chdir(tmp_path)
    for module in (bench_setup, gpu_times):
        monkeypatch.setattr(module, "VOCAB", 50)
    monkeypatch.setattr(machine, "limits", lambda device, dtype: dict(
        device="CPU", threads=1, torch="2", dtype="float32", load=0.0, bytes_per_s=1e10,
        flop_per_s=1e11))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_all_is_timed_in_small_and_that_is_said(capsys):
    """Each kind of row, with a number, beside which stands no prediction of another device; in the
    file as they are printed, once on the way and once in the table at the end."""
    call(gpu, "--what", "timings", "--json", "gpu.json")
    found = json.loads(open("gpu.json").read())
    out = capsys.readouterr().out
    assert out.startswith("no CUDA GPU here, so this is a rehearsal") and found["left_out"] == []
    names = [row["what"] for row in found["rows"]]
    of_a_gpu = {"bfloat16 products", "TF32 products"}
    assert {"AR", "full", "cached", "exact", "SDTT optimizer", "waits, exact"} <= set(names)
    assert {what for what, _ in gpu.OTHERS} <= of_a_gpu | set(names)
    for row in found["rows"]:
        assert row["measured"] > 0 or row["what"].startswith("waits")
        assert "predicted" not in row and "ratio" not in row
        assert out.count(machine.line(row, gpu.COLUMNS) + "\n") >= 2
    assert f"{len(names)} numbers; 0 left out" in out


def test_predictions_stand_beside_what_is_measured(monkeypatch, capsys):
    """By hand: of a text in 16 steps, of a step, of what was not predicted, and of 0 waits. Rows of
    a GPU, which are made up."""
    rows = [dict(what="full", preset="xl", batch=8, steps=16, unit="s", measured=1.42),
            dict(what="SDTT step", preset="small", batch=16, unit="s", measured=0.061),
            dict(what="exact", preset="small", batch=8, unit="s", measured=3.0),
            dict(what="waits, AR", preset="small", batch=1, unit="a call", measured=0.0),
            dict(what="AR", preset="xl", batch=8, steps=None, unit="s", measured=None,
                 error="does not fit in memory")]
    monkeypatch.setattr(gpu, "pieces", lambda *_: [gpu_times.Piece("all", 0, lambda: rows)])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    report = gpu.Report({})
    gpu.run_timings(report, GPU, float("inf"), None)
    assert [row.get("predicted") for row in report.rows] == [0.71, 0.122, None, 0, 1.7]
    assert [row.get("ratio") for row in report.rows] == [2.0, 0.5, None, None, None]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-3:] == ["predicted", "measured", "ratio"]
    assert lines[2].split()[-3:] == ["0.71", "1.42", "2.00"]
    assert lines[-1].endswith("does not fit in memory")


def test_every_prediction_is_of_a_row_that_is_measured():
    """Of texts: none is written in vain. (Of all else: see above, by name.)"""
    found = set()
    for piece in gpu_times.pieces(GPU, {}):
        f = piece.rows
        if f.func is gpu_times.engine_times:
            _, _, size, B, name = f.args
            found |= {(name, size.preset, steps, B) for steps in [None, *size.steps]}
    # xl in batches of 32 takes long
    wanted = {(*key, B) for key, B in itertools.product(gpu.TEXTS, gpu.BATCHES)}
    assert {(*key, B) for *key, B in wanted if (key[1], B) != ("xl", 32)} <= found


def test_pieces_for_which_there_is_no_time_are_named_and_errors_do_not_end_the_run(monkeypatch,
                                                                                  capsys):
    """Of four pieces: one fits, one needs more than is left, one fails, one fits again."""
    def fails():
        yield dict(what="a", unit="s", measured=1.0)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def fits():
        yield dict(what="b", unit="s", measured=2.0)
    monkeypatch.setattr(gpu, "pieces", lambda *_: [
        gpu_times.Piece("first", 0, fits), gpu_times.Piece("second", 1000, fits),
        gpu_times.Piece("third", 0, fails), gpu_times.Piece("fourth", 1, fits)])
    call(gpu, "--what", "timings", "--minutes", 1, "--device", "cpu", "--json", "gpu.json")
    found = json.loads(open("gpu.json").read())
    assert [row["what"] for row in found["rows"]] == ["b", "a", "b"]
    assert found["left_out"] == ["second (may need 1000 s)",
                                 "third (OutOfMemoryError: CUDA out of memory.)"]
    out = capsys.readouterr().out
    assert "left out: second (may need 1000 s)\n" in out and "2 left out" in out


def test_rows_are_in_the_file_after_each(monkeypatch):
    """A stop in the middle leaves those that were measured."""
    def rows():
        yield dict(what="a", unit="s", measured=1.0)
        raise KeyboardInterrupt
    monkeypatch.setattr(gpu, "pieces", lambda *_: [gpu_times.Piece("all", 0, rows)])
    with pytest.raises(SystemExit) as stop:
        call(gpu, "--what", "timings", "--device", "cpu", "--json", "gpu.json")
    assert stop.value.code == 130
    assert [row["what"] for row in json.loads(open("gpu.json").read())["rows"]] == ["a"]


CHECKS = '''
import time
import pytest
@pytest.mark.parametrize("device", ["on_cpu", "on_gpu"])
def test_it_holds(device):
    assert device == "on_cpu"
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("device", ["on_cpu"])
def test_it_is_one(device, n):
    if n == 2:
        time.sleep(SLEEP)
    assert n == 1
'''


def test_checks_have_a_line_each_and_a_failure_is_shown_and_ends_in_status_1(monkeypatch, tmp_path,
                                                                            capsys):
    """Two that pass and one that fails, with what pytest says of it; of a GPU's none is run."""
    monkeypatch.setattr(gpu, "CHECKS", tmp_path / "tests/test_some.py")
    (tmp_path / "tests").mkdir()
    gpu.CHECKS.write_text(CHECKS.replace("SLEEP", "0"))
    with pytest.raises(SystemExit) as stop:
        call(gpu, "--what", "checks", "--device", "cpu", "--json", "gpu.json")
    checks = json.loads(open("gpu.json").read())["checks"]
    assert stop.value.code == 1
    assert checks == [{"check": "it holds", "outcome": "passed"},
                      {"check": "it is one (1)", "outcome": "passed"},
                      {"check": "it is one (2)", "outcome": "failed"}]
    out = capsys.readouterr().out
    assert "failed   it is one (2)\n" in out and "assert 2 == 1" in out
    assert "3 checks, 1 failed; 0 numbers" in out


def test_checks_end_with_their_time(monkeypatch, tmp_path):
    """Which is over here while one sleeps, after two. It is said that others were left out."""
    monkeypatch.setattr(gpu, "CHECKS", tmp_path / "tests/test_some.py")
    (tmp_path / "tests").mkdir()
    gpu.CHECKS.write_text(CHECKS.replace("SLEEP", "600"))
    report = gpu.Report({})

    class Timer(threading.Timer):
        def __init__(self, limit, end):
            super().__init__(limit / 100, self.look)
            self.end = end

        def look(self):
            while len(report.checks) < 2:
                time.sleep(0.01)
            self.end()
    monkeypatch.setattr(threading, "Timer", Timer)
    gpu.run_checks(report, CPU, 1)
    assert [one["check"] for one in report.checks] == ["it holds", "it is one (1)"]
    assert report.left_out == ["checks after these 2 (pytest ended with status -9)"]


def test_waits_are_counted_by_place(monkeypatch):
    """On a GPU that is made up: warnings of PyTorch's count, with the place where they are raised;
    others do not. The mode is as before, also after an error."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
    device = SimpleNamespace(type="cuda")
    places = machine.host_waits(run, device)
    assert list(places.values()) == [3] and list(places)[0].startswith("test_gpu.py:")
    with pytest.raises(ZeroDivisionError):
        machine.host_waits(lambda: 1 / 0, device)
    assert modes == ["default", "warn", "default", "warn", "default"]
    assert machine.host_waits(lambda: None, CPU) == {}


def test_the_checks_are_there():
    """For both devices, by the names that tools.gpu asks for."""
    text = gpu.CHECKS.read_text()
    assert '"on_cpu", "on_gpu"' in text and text.count("\ndef test_") >= 12
