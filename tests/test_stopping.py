"""A run that is stopped at any moment goes on as if nothing had been; files are never half there.

Two processes fork a child per attempt, so that each kill is a real SIGKILL and costs no start-up.
The children have one thread, and all comparisons are bit for bit.
"""
import errno
import io
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import common
import data.text.prepare as prepare
import distill
import model
import train
from data import script
from helpers import NANO, ROOT, begin, call, make_dataset, refused

pytestmark = pytest.mark.usefixtures("small_nano")

SMALL = ["--batch", "8", "--device", "cpu", "--log_every", "1", "--save_every", "2"]
TRAIN = SMALL + ["--steps", "12", "--warmup", "3"]
QUIET = TRAIN + ["--log_every", "20", "--save_every", "2"]
ROUNDS = SMALL + ["--rounds", "2", "--teacher_steps", "8", "--steps_per_round", "5",
                  "--samples", "4", "--warmup", "2"]
OTHER = ["--handover", "raw", "--reset_optimizer", "--dropout", "0.2", "--micro_batch", "4"]


# ---- processes that are killed

PLACES = ["half written", "before replace", "in a step", "after a log line", "before fsync",
          "after replace"]
MAINS = {"train.py": train.main, "distill.py": distill.main, "prepare.py": prepare.main}


def drive(jobs, path):
    """Do jobs, dicts of "script", "argv" and "seed"; with a seed, each attempt is killed at a
    random moment until one comes through; with "kill" (place, number) there is one attempt, killed
    there. Writes a list of {"code", "places" of the kills, "out"} into the file path."""
    model.PRESETS["nano"] = NANO
    distill.COLUMNS[:] = [4, 8]
    usual = train.TrainConfig.__post_init__

    def few_steps(config):               # of judge and teacher, on the way
        config.steps = config.steps or 5
        usual(config)
    train.TrainConfig.__post_init__ = few_steps
    Path(path).write_text(json.dumps([results_of(job) for job in jobs]))


def results_of(job):
    """One job's results, see drive."""
    rng, places = random.Random(job["seed"]), []
    with tempfile.TemporaryFile("w+") as out:
        while True:
            kill = job.get("kill")
            if job["seed"] is not None:
                place = PLACES[len(places) % len(PLACES)]
                kill = (place, rng.randint(1, 4))
            status = attempt(job, kill, out)
            if job.get("kill") or not os.WIFSIGNALED(status) or len(places) > 60:
                break
            places.append(place)
        out.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "places": places,
                "out": out.read()[-3000:]}


def attempt(job, kill, out):
    """Run the job's script in a child, killed at (place, number); returns its status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    code = 1
    try:
        if kill:
            arm(*kill)
        sys.argv = [job["script"]] + job["argv"]
        script.command(MAINS[job["script"]], script.GOES_ON)
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        if code == 1:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def arm(place, n):
    """Make this process kill itself when it comes to the place for the n-th time."""
    calls = [0]

    def die_at(where):
        calls[0] += where == place
        if calls[0] == n and where == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def half_save(content, f, save=torch.save):
        whole = io.BytesIO()
        save(content, whole)
        f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        f.flush()
        die_at("half written")
        f.write(whole.getvalue()[len(whole.getvalue()) // 2:])

    def fsync(fd, fsync=os.fsync):
        die_at("before fsync")
        fsync(fd)

    def replace(a, b, replace=os.replace):
        die_at("before replace")
        replace(a, b)
        die_at("after replace")

    def ema_update(*args, update=train.ema_update):
        die_at("in a step")
        update(*args)

    def write_log(*args, log=train.write_log, **kw):
        log(*args, **kw)
        die_at("after a log line")
    torch.save, os.fsync, os.replace = half_save, fsync, replace
    train.ema_update, train.write_log = ema_update, write_log


begun = []                       # begin_runs's result, when it has begun


def begin_runs(top):
    """Begin every run of this file, whole and killed, under the folder top, in two processes that
    go on beside other tests: see conftest."""
    data = ["--dataset", str(make_dataset(top / "data"))]
    kinds = {"mdlm": ("train.py", TRAIN), "ar": ("train.py", TRAIN + ["--objective", "ar"]),
             "distill": ("distill.py", ROUNDS), "distill2": ("distill.py", ROUNDS + OTHER)}
    jobs = {}
    for name, (script, argv) in kinds.items():
        for how, seed in (("whole", None), ("killed", 1)):
            out = str(top / f"{name}-{how}")
            jobs[f"{name}-{how}"] = dict(script=script, argv=argv + data + ["--out", out],
                                         seed=seed)
    texts = {name: " ".join(random.Random(seed).choices(letters, k=3000)) for name, seed, letters in
             (("first", 1, "abcdefgh"), ("second", 2, "abcdefgh"), ("third", 3, "stuvwxyz"))}
    mine = TRAIN + ["--dataset", str(top / "mine"), "--context", "16"]
    for name, text in texts.items():         # one after the other, all under the same name
        (top / f"{name}.txt").write_text(text)
        jobs[f"prepare-{name}"] = dict(script="prepare.py", seed=None, argv=[
            str(top / f"{name}.txt"), "--name", str(top / "mine"), "--tokenizer", "chars"])
        jobs[f"train-{name}"] = dict(script="train.py", seed=None, argv=mine + [
            "--out", str(top / "rebound")])
    jobs["train-first"]["kill"] = ["in a step", 6]
    jobs["prepare-again"] = jobs["prepare-first"]
    jobs["train-again"] = dict(script="train.py", seed=None, argv=jobs["train-second"]["argv"])
    jobs["diverging"] = dict(script="train.py", seed=None, argv=TRAIN + data + [
        "--lr", "1e30", "--log_every", "20", "--save_every", "20",
        "--out", str(top / "diverging")])
    # of about equal work; jobs that follow each other are in one
    halves = [{name: job for name, job in jobs.items() if name.startswith("distill-") == first}
              for first in (True, False)]
    drivers = [begin(top / f"{i}.txt", drive, list(half.values()), top / f"{i}.json")
               for i, half in enumerate(halves)]
    begun.append((top, jobs, halves, drivers))


@pytest.fixture(scope="module")
def runs(small_nano, tmp_path_factory):
    """What begin_runs has begun: {name: folder}, "dataset" and "reports"."""
    if not begun:
        begin_runs(tmp_path_factory.mktemp("runs"))
    top, jobs, halves, drivers = begun[0]
    found = {}
    for i, driver in enumerate(drivers):
        driver.join(300)
        assert driver.exitcode == 0, (top / f"{i}.txt").read_text()
        found |= dict(zip(halves[i], json.loads((top / f"{i}.json").read_text())))
    return {"dataset": top / "data", "reports": found, **{name: top / name for name in jobs}}


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def names(run):
    """The checkpoints that a run leaves."""
    if run.startswith("distill"):
        return ["ar", "teacher", "round1", "round2"]
    return [{"mdlm": "teacher", "ar": "ar"}[run]]


@pytest.mark.parametrize("run", ["mdlm", "ar", "distill", "distill2"])
def test_killed_runs_were_killed_often_and_while_writing(runs, run):
    """The kills land at the places meant, so that the next tests prove something. The moments come
    from a fixed seed: no false alarm."""
    whole, killed = runs["reports"][run + "-whole"], runs["reports"][run + "-killed"]
    assert whole["code"] == 0 and not whole["places"], whole["out"]
    assert killed["code"] == 0, killed["out"]
    assert len(killed["places"]) >= 4
    assert {"half written", "before replace", "in a step"} <= set(killed["places"])


@pytest.mark.parametrize("run", ["mdlm", "ar", "distill", "distill2"])
def test_killed_and_resumed_weights_equal_uninterrupted_ones(runs, run):
    """Model, EMA and optimizers of every checkpoint, bit for bit (one thread): no false alarm."""
    for name in names(run):
        whole, killed = (load(runs[f"{run}-{how}"] / f"{name}.pt") for how in ("whole", "killed"))
        for key in ("model", "ema", "optimizer", "step", "config"):
            if key == "config":
                whole[key].pop("out"), killed[key].pop("out")
            assert same(whole[key], killed[key]), f"{name}: {key}"


@pytest.mark.parametrize("run", ["mdlm", "ar", "distill", "distill2"])
def test_log_of_a_killed_run_has_each_step_once_and_the_same_losses(runs, run):
    """Also for lines written after the checkpoint from which the run went on. No false alarm."""
    def entries(how, name):
        lines = (runs[f"{run}-{how}"] / f"{name}.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(s).items() if k != "tokens_per_s"} for s in lines]
    for name in names(run):
        steps = load(runs[run + "-whole"] / f"{name}.pt")["steps"]
        expected = entries("whole", name)
        assert expected and expected[-1]["step"] == steps
        if run in ("mdlm", "ar") or name.startswith("round"):        # log_every is 1 there
            assert [entry["step"] for entry in expected] == list(range(1, steps + 1))
        assert entries("killed", name) == expected


@pytest.mark.parametrize("run", ["distill", "distill2"])
def test_killed_distillation_gives_the_same_table(runs, run):
    """Each row of results.json once and with the same numbers, but for times. No false alarm: the
    samples are drawn by one thread from the same weights and seeds."""
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(
        (runs[f"{run}-{how}"] / "results.json").read_text())["rows"]]
        for how in ("whole", "killed")]
    assert rows[0] == rows[1] and len(rows[0]) == 2 + 3 * 2


def test_no_temporary_file_is_left(runs):
    """Not even by kills: the next write of the same file takes its place. No false alarm."""
    for run in ("mdlm", "ar", "distill", "distill2"):
        assert not list(runs[run + "-killed"].glob("*.tmp"))


def start_from(runs, tmp_path):
    """A folder with a finished judge and teacher, and the flags of a distillation there."""
    for name in ("ar.pt", "teacher.pt"):
        shutil.copy(runs["distill-whole"] / name, tmp_path / name)
    return ROUNDS + ["--dataset", runs["dataset"], "--out", tmp_path]


class Killed(BaseException):
    """Stands for a kill in this process."""


def killed_in_step(n, module, argv):
    """Run a command up to the middle of its n-th optimizer step."""
    calls = []

    def ema_update(*args, update=train.ema_update):
        calls.append(1)
        if len(calls) == n:
            raise Killed
        update(*args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "ema_update", ema_update)
        call(module, *argv)


def test_round_file_holds_the_teacher_until_the_round_is_done(runs, tmp_path):
    """Unfinished: the frozen teacher, in round 1 the given one's EMA; finished: None, to save room.
    Exact, no false alarm."""
    argv = start_from(runs, tmp_path)
    killed_in_step(4, distill, argv)
    unfinished = load(tmp_path / "round1.pt")
    assert 0 < unfinished["step"] < unfinished["steps"]
    assert same(dict(unfinished["teacher"]), dict(load(tmp_path / "teacher.pt")["ema"]))
    killed_in_step(3 + 4, distill, argv)         # the three steps left, and into round 2
    first, second = load(tmp_path / "round1.pt"), load(tmp_path / "round2.pt")
    assert first["step"] == first["steps"] and first["teacher"] is None
    assert second["step"] < second["steps"]
    assert same(dict(second["teacher"]), dict(first["ema"]))


def spoilt(kind, good):
    """Bytes that are no checkpoint of this project; good: the bytes of one."""
    if kind == "truncated":
        return good[:len(good) * 2 // 3]
    if kind in ("garbage", "empty"):
        return b"no checkpoint at all\n" * 50 if kind == "garbage" else b""
    f = io.BytesIO()
    torch.save({"other dict": {"weights": torch.zeros(3)}, "other list": [torch.zeros(3)],
                "newer format": {"format": 2, "kind": "mdlm", "step": 1},
                "nearly": {"format": 1, "kind": "mdlm"}}[kind], f)
    return f.getvalue()


@pytest.mark.parametrize("kind", ["truncated", "garbage", "empty", "other dict", "other list",
                                  "newer format", "nearly"])
def test_spoilt_checkpoint_is_refused_by_name_and_kept(runs, tmp_path, capsys, kind):
    """In training, one sentence names the file, which stays as it was. No false alarm."""
    path = tmp_path / "teacher.pt"
    path.write_bytes(spoilt(kind, (runs["mdlm-whole"] / "teacher.pt").read_bytes()))
    before = path.read_bytes()
    message = refused(capsys, train, *TRAIN, "--dataset", runs["dataset"], "--out", tmp_path)
    assert str(path) in message
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["teacher.pt"]


@pytest.mark.parametrize("kind", ["truncated", "garbage", "other dict"])
def test_spoilt_round_file_is_refused_by_name_and_kept(runs, tmp_path, capsys, kind):
    """The same for a round of distillation. No false alarm."""
    argv, path = start_from(runs, tmp_path), tmp_path / "round1.pt"
    path.write_bytes(spoilt(kind, (runs["distill-whole"] / "round1.pt").read_bytes()))
    before = path.read_bytes()
    assert str(path) in refused(capsys, distill, *argv)
    assert path.read_bytes() == before


def test_checkpoint_of_another_kind_is_refused_by_name_and_kept(runs, tmp_path, capsys):
    """An AR model under the teacher's name is not trained on. No false alarm."""
    path = tmp_path / "teacher.pt"
    shutil.copy(runs["ar-whole"] / "ar.pt", path)
    before = path.read_bytes()
    message = refused(capsys, train, *TRAIN, "--dataset", runs["dataset"], "--out", tmp_path)
    assert str(path) in message and "'ar'" in message and path.read_bytes() == before


def failing(where):
    """A context in which the second checkpoint to be written meets a full disk."""
    saves = []
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(content, f, save=torch.save):
        saves.append(1)
        if len(saves) == 2 and where != "fsync":
            f.write(b"half of a file")
            raise full if where == "to_file" else RuntimeError("PytorchStreamWriter failed")
        save(content, f)

    def fsync(fd, fsync=os.fsync):
        if len(saves) == 2 and where == "fsync":
            raise full
        fsync(fd)
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "save", save)
    patch.setattr(os, "fsync", fsync)
    return patch


@pytest.mark.parametrize("where", ["fsync", "to_file", "torch"])
def test_failed_write_leaves_the_old_checkpoint_and_no_temporary_file(runs, tmp_path, capsys,
                                                                      where):
    """A full disk at the second checkpoint (step 4): refused by name, and the first is still whole;
    with room again the run goes on from it to the end. No false alarm."""
    argv = TRAIN + ["--dataset", runs["dataset"], "--out", tmp_path]
    patch = failing(where)
    try:
        message = refused(capsys, train, *argv)
    finally:
        patch.undo()
    assert str(tmp_path / "teacher.pt") in message
    assert load(tmp_path / "teacher.pt")["step"] == 2 and not list(tmp_path.glob("*.tmp"))
    if where == "fsync":
        call(train, *argv)
        assert load(tmp_path / "teacher.pt")["step"] == 12


@pytest.mark.parametrize("flag, value", [("lr", "0.001"), ("seed", "3"), ("batch", "4"),
                                         ("steps", "14"), ("optimizer", "adamw")])
def test_training_on_with_another_flag_is_refused_by_its_name(runs, capsys, flag, value):
    """What a checkpoint was made with cannot change under it; the file is kept. No false alarm."""
    folder = runs["mdlm-whole"]
    before = (folder / "teacher.pt").read_bytes()
    argv = TRAIN + ["--dataset", runs["dataset"], "--out", folder, f"--{flag}", value]
    message = refused(capsys, train, *argv)
    assert f"--{flag} " in message and str(folder / "teacher.pt") in message
    assert (folder / "teacher.pt").read_bytes() == before


@pytest.mark.parametrize("flag, value", [("lr", "0.001"), ("divergence", "fkl"),
                                         ("teacher_steps", "16")])
def test_distilling_on_with_another_flag_is_refused_by_its_name(runs, tmp_path, capsys, flag,
                                                               value):
    """The same for the rounds. No false alarm."""
    argv = start_from(runs, tmp_path)
    shutil.copy(runs["distill-whole"] / "round1.pt", tmp_path)
    message = refused(capsys, distill, *argv, f"--{flag}", value)
    assert f"--{flag} " in message and str(tmp_path / "round1.pt") in message


@pytest.mark.parametrize("flag, other", [("clip", "0.5"), ("handover", "raw")])
def test_flag_newer_than_a_round_has_its_default_there(runs, tmp_path, capsys, flag, other):
    """A fork that adds a flag goes on with the rounds it has: the flag had its default's value when
    they were made, and only another value is refused. The default is not None in either case, so
    a comparison with what the file lacks would refuse it too. No false alarm."""
    argv = start_from(runs, tmp_path)
    saved = load(runs["distill-whole"] / "round1.pt")
    del saved["config"][flag]
    torch.save(saved, tmp_path / "round1.pt")
    call(distill, *argv)
    after = load(tmp_path / "round1.pt")
    assert same(after["model"], saved["model"])
    message = refused(capsys, distill, *argv, f"--{flag}", other)
    assert f"--{flag} " in message and str(tmp_path / "round1.pt") in message


def test_round_of_another_teacher_is_refused(runs, tmp_path, capsys):
    """Rounds are bound to the weights they began from, not to a file name. No false alarm."""
    argv = start_from(runs, tmp_path)
    shutil.copy(runs["distill-whole"] / "round1.pt", tmp_path)
    before = (tmp_path / "round1.pt").read_bytes()
    message = refused(capsys, distill, *argv, "--teacher", runs["mdlm-whole"] / "teacher.pt")
    assert "another teacher" in message and str(tmp_path / "round1.pt") in message
    assert (tmp_path / "round1.pt").read_bytes() == before


def test_interrupt_ends_with_status_130_and_leaves_a_checkpoint(runs, tmp_path, capsys):
    """Ctrl-C is no error: one line says how to go on. No false alarm."""
    calls = []

    def ema_update(*args, update=common.ema_update):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(*args)
    argv = [*TRAIN, "--dataset", str(runs["dataset"]), "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common, "ema_update", ema_update)
        # as from a command line: the sentence is given at the end of the script
        patch.setattr(sys, "argv", ["train.py", *argv])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 130 and "the same command" in capsys.readouterr().err
    assert load(tmp_path / "teacher.pt")["step"] == 2


# ---- what a run is bound to

@pytest.mark.parametrize("name, said", [("second", "other text"), ("third", "other tokens")])
def test_run_does_not_go_on_with_another_text_of_the_same_name(runs, name, said):
    """A training of the first text was killed; then texts of the same letters, and of others, were
    prepared under the same name: both are refused. No false alarm."""
    reports = runs["reports"]
    assert reports["train-first"]["code"] == -signal.SIGKILL
    assert reports[f"prepare-{name}"]["code"] == 0
    assert reports[f"train-{name}"]["code"] == 2
    assert said in reports[f"train-{name}"]["out"] and "Traceback" not in str(reports)


def test_run_goes_on_where_the_first_text_is_there_again(runs):
    """Prepared anew it has the same tokens: what counts are these, not when they were made."""
    assert runs["reports"]["train-again"]["code"] == 0
    assert load(runs["dataset"].parent / "rebound/teacher.pt")["step"] == 12


def test_run_goes_on_with_the_same_data_under_another_name(runs, tmp_path):
    """The folder was moved: no reason to refuse. No false alarm."""
    out, data = tmp_path / "out", tmp_path / "moved"
    killed_in_step(4, train, QUIET + ["--dataset", runs["dataset"], "--out", out])
    shutil.copytree(runs["dataset"], data)
    call(train, *QUIET, "--dataset", data, "--out", out)
    assert load(out / "teacher.pt")["step"] == 12


def test_run_begun_from_weights_is_bound_to_them_and_not_to_their_path(runs, tmp_path, capsys):
    """The same file elsewhere goes on, another file under the old path does not. Exact."""
    first, other = runs["mdlm-whole"] / "teacher.pt", runs["distill-whole"] / "teacher.pt"
    init = tmp_path / "init.pt"
    argv = QUIET + ["--dataset", runs["dataset"], "--out", tmp_path / "out", "--init"]
    shutil.copy(first, init)
    killed_in_step(4, train, argv + [init])
    shutil.copy(other, init)
    assert "other weights" in refused(capsys, train, *argv, init)
    call(train, *argv, first)
    assert load(tmp_path / "out/teacher.pt")["step"] == 12


def test_finished_teacher_of_another_text_is_not_distilled(runs, tmp_path, capsys):
    """distill.py finds a teacher.pt in --out that was trained on other rows. No false alarm."""
    argv, data = start_from(runs, tmp_path), tmp_path / "data"
    shutil.copytree(runs["dataset"], data)
    rows = (data / "train.bin").read_bytes()
    (data / "train.bin").write_bytes(rows[24:] + rows[:24])
    assert "other text" in refused(capsys, distill, *argv, "--dataset", data)


# ---- numbers that are not finite

def test_diverging_training_stops_at_the_first_bad_step(runs):
    """A learning rate of 1e30: status 2, the step and the remedy; nothing is saved. float32 cannot
    hold the second step's states: no false alarm."""
    report, folder = runs["reports"]["diverging"], runs["dataset"].parent / "diverging"
    assert report["code"] == 2
    assert "at step 2 of 12" in report["out"] and "lower --lr" in report["out"]
    assert not (folder / "teacher.pt").exists()


@pytest.mark.parametrize("step", [5, 6])
def test_divergence_keeps_the_last_good_checkpoint(runs, tmp_path, capsys, step):
    """Weights blow up in step 5, or in 6, which is saved: the checkpoint of step 4 stays, and the
    same command goes on from it. No false alarm."""
    argv = QUIET + ["--dataset", runs["dataset"], "--out", tmp_path]

    def lr_factor(i, *args, usual=common.lr_factor):
        return 1e38 if i + 1 == step else usual(i, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "lr_factor", lr_factor)
        assert "at step 6" in refused(capsys, train, *argv)
    assert load(tmp_path / "teacher.pt")["step"] == 4
    call(train, *argv)
    assert load(tmp_path / "teacher.pt")["step"] == 12


def test_clip_0_does_not_clip(runs, tmp_path):
    """As elsewhere in the field: the same weights as with a norm that no gradient reaches, and
    they move. Bit for bit."""
    argv = QUIET + ["--dataset", runs["dataset"], "--steps", "3"]
    call(train, *argv, "--clip", "0", "--out", tmp_path / "none")
    call(train, *argv, "--clip", "1e9", "--out", tmp_path / "far")
    none, far = (load(tmp_path / name / "teacher.pt") for name in ("none", "far"))
    assert same(none["model"], far["model"])
    assert not same(none["model"], none["ema"])          # which follows the weights that move


# ---- two runs at a time, and Ctrl-C in the middle of a checkpoint

class Slow:
    """A file whose first part waits until the file go is there."""

    def __init__(self, f, go):
        self.f, self.go = f, go

    def write(self, part):
        print("writing", flush=True)
        while not os.path.exists(self.go):
            time.sleep(0.01)
        return self.f.write(part)

    def __getattr__(self, name):
        return getattr(self.f, name)


def train_slowly(go, argv):
    """train.py with Slow checkpoints."""
    model.PRESETS["nano"] = NANO
    sys.argv = ["train.py", *argv]
    save = torch.save
    torch.save = lambda content, f: save(content, Slow(f, go))
    script.command(train.main, script.GOES_ON)


def test_second_run_in_a_folder_is_told_of_the_first_and_ctrl_c_waits_for_the_checkpoint(
        runs, tmp_path, capsys):
    """While the first run writes its checkpoint of step 2, a second one is refused and names its
    process; then Ctrl-C: the file is still written whole, status 130, and the second run goes on
    from it to the end. The first run waits in its first part of the file: no false alarm."""
    def read(path):
        return path.read_text() if path.exists() else ""
    out, go = tmp_path / "out", tmp_path / "go"
    argv = [str(word) for word in TRAIN + ["--dataset", runs["dataset"], "--out", out]]
    first = begin(tmp_path / "first.txt", train_slowly, go, argv)
    deadline = time.monotonic() + 60
    while "writing" not in read(tmp_path / "first.txt"):
        assert time.monotonic() < deadline and first.is_alive()
        time.sleep(0.01)
    message = refused(capsys, train, *argv)
    assert str(first.pid) in message and str(out / "teacher.pt") in message
    os.kill(first.pid, signal.SIGINT)
    time.sleep(0.1)
    go.touch()
    first.join(60)
    error = read(tmp_path / "first.txt")
    assert first.exitcode == 130 and "goes on from the last checkpoint" in error
    assert "make room" not in error and "Traceback" not in error
    assert load(out / "teacher.pt")["step"] == 2
    assert sorted(os.listdir(out)) == ["teacher.jsonl", "teacher.pt"]
    call(train, *argv)
    assert load(out / "teacher.pt")["step"] == 12
