"""Two processes (gloo, as torchrun would start them) train what one process trains."""
import json
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import distill
import model
import train
from data import checkpoints, files, processes, script
from helpers import NANO, begin, call, make_dataset, run_script

pytestmark = pytest.mark.usefixtures("small_nano")

FLAGS = ["--batch", "8", "--micro_batch", "2", "--device", "cpu", "--log_every", "1",
         "--save_every", "3", "--warmup", "2", "--dropout", "0.1", "--optimizer", "adamw"]
JOBS = {"train.py": ["--steps", "6"],
        "distill.py": ["--rounds", "2", "--teacher_steps", "8", "--steps_per_round", "4",
                       "--samples", "34"]}                # two batches


def together(world, folder, f, *args):
    """Run f(*args) in `world` processes joined as torchrun joins them; their outputs, which are
    kept in the folder."""
    with socket.socket() as s:                       # a free port
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    folder.mkdir(exist_ok=True)
    outputs = [folder / f"output-{rank}.txt" for rank in range(world)]
    started = [begin(out, f, *args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
               for rank, out in enumerate(outputs)]
    for process in started:
        process.join(120)
    texts = [out.read_text() for out in outputs]
    assert [process.exitcode for process in started] == [0] * world, texts
    return texts


def run_small(name, argv):
    """A script as torchrun would run it, with a tiny preset nano."""
    model.PRESETS["nano"] = NANO
    run_script(name, argv)


@pytest.fixture(scope="module")
def runs(small_nano, tmp_path_factory):
    """{(script, processes): folder}; the distillations begin with the same judge and teacher."""
    top = tmp_path_factory.mktemp("processes")
    data = ["--dataset", str(make_dataset(top / "data"))]
    for objective in ("ar", "mdlm"):
        call(train, *data, "--objective", objective, "--steps", 3, "--out", top / "start",
             *FLAGS[:6])
    given = ["--judge", str(top / "start/ar.pt"), "--teacher", str(top / "start/teacher.pt")]
    found = {"outputs": {}}
    for script, module in (("train.py", train), ("distill.py", distill)):
        argv = data + FLAGS + JOBS[script] + (given if script == "distill.py" else [])
        one, two = top / f"{script}-1", top / f"{script}-2"
        call(module, *argv, "--out", one)
        found["outputs"][script] = together(2, top / f"{script}-outputs", run_small, script,
                                            argv + ["--out", str(two)])
        found |= {(script, 1): one, (script, 2): two}
    return found


@pytest.mark.parametrize("script, name", [("train.py", "teacher"), ("distill.py", "round1"),
                                          ("distill.py", "round2")])
def test_two_processes_give_the_losses_and_weights_of_one(runs, script, name):
    """The micro-batches are the same; only the order of float32 sums differs: 1e-7 to 1e-6 was
    seen, and 3e-2 where gradients are not averaged. AdamW, because Muon, which makes all singular
    values equal, carries rounding further. No false alarm but by another rounding."""
    logs = [[json.loads(line) for line in (runs[script, n] / f"{name}.jsonl").read_text()
             .splitlines()] for n in (1, 2)]
    assert len(logs[0]) == len(logs[1]) == {"teacher": 6}.get(name, 4)
    for one, two in zip(*logs):
        assert one["step"] == two["step"]
        assert abs(one["loss"] - two["loss"]) < 1e-4
        assert abs(one["val_loss"] - two["val_loss"]) < 1e-4
    one, two = (torch.load(runs[script, n] / f"{name}.pt", weights_only=True)["model"]
                for n in (1, 2))
    for key in one:
        assert (one[key] - two[key]).abs().mean() < 1e-4, key


def test_two_processes_fill_the_table_with_the_rows_of_one(runs):
    """All that they have measured of the data, the judge and the teacher, whose weights are the
    same, but for the time that it took. Exact. (Those of the rounds differ by rounding.)"""
    found = []
    for n in (1, 2):
        rows = json.loads((runs["distill.py", n] / "results.json").read_text())["rows"]
        found.append([{key: value for key, value in row.items() if key != "seconds"}
                      for row in rows if not row["model"].startswith("round")])
    # this process has fewer columns, see helpers
    columns = {row["steps"] for row in found[0]}
    assert columns == {None, 4, 8} and len(found[0]) == 4
    assert found[0] == [row for row in found[1] if row["steps"] in columns]


@pytest.mark.parametrize("script", list(JOBS))
def test_the_first_process_alone_prints(runs, script):
    """The second one leaves no line; warnings of gloo itself aside. No false alarm."""
    first, second = runs["outputs"][script]
    assert "step" in first and "step" not in second


def test_two_processes_give_the_losses_of_one_where_prompts_are_given(tmp_path):
    """Of several lengths, so that micro-batches differ in how much counts. As above: no false alarm
    but by another rounding."""
    data, logs = make_dataset(tmp_path / "data", prompts=[0, 3, 9]), []
    argv = ["--dataset", str(data), *FLAGS, "--steps", "3"]
    call(train, *argv, "--out", tmp_path / "1")
    together(2, tmp_path / "outputs", run_small, "train.py", argv + ["--out", str(tmp_path / "2")])
    for n in ("1", "2"):
        lines = (tmp_path / n / "teacher.jsonl").read_text().splitlines()
        logs.append([(line["loss"], line["val_loss"]) for line in map(json.loads, lines)])
    assert len(logs[0]) == 3
    for one, two in zip(*logs):
        assert one == pytest.approx(two, abs=1e-4)


def test_micro_batches_that_do_not_fill_the_batch_are_refused():
    """8 sequences in micro-batches of 3, or over 3 processes; and the ones that do fit."""
    c = train.TrainConfig(batch=8, micro_batch=3)
    with pytest.raises(files.UserError, match="--batch 8"):
        train.micro_batches(c, processes.Processes(torch.device("cpu")))
    c = train.TrainConfig(batch=8)
    with pytest.raises(files.UserError, match="3 processes"):
        train.micro_batches(c, processes.Processes(torch.device("cpu"), 0, 3))
    assert train.micro_batches(c, processes.Processes(torch.device("cpu"), 1, 2)) == (4, 1)
    c = train.TrainConfig(batch=8, micro_batch=2)
    assert train.micro_batches(c, processes.Processes(torch.device("cpu"), 1, 2)) == (2, 2)


def distil_on_the_way(argv):
    """distill.py with few steps, in which process 0 saves late, while the other one has nothing to
    do; then what happens where processes hold different things, and where the first is refused."""
    model.PRESETS["nano"] = NANO
    sys.argv = ["distill.py", *argv]
    distill.COLUMNS[:] = [8]
    usual, save, check = train.TrainConfig.__post_init__, train.save, distill.agree

    def few_steps(config):
        config.steps = config.steps or 5
        usual(config)

    def save_late(run):
        time.sleep(0.5)
        save(run)

    def agree(p, value, what):
        print(what, value, flush=True)
        check(p, value, what)

    def refuse():
        raise files.UserError("by the first")

    def main():
        distill.main()
        p = processes.start("cpu")
        for f in (lambda: processes.agree(p, p.rank, "ranks"), lambda: processes.run_in_first(p, refuse)):
            try:
                f()
            except files.UserError as e:
                print("refused:", e, flush=True)
    train.TrainConfig.__post_init__, train.save, distill.agree = few_steps, save_late, agree
    script.command(main)


def test_processes_that_train_on_the_way_distil_from_one_teacher(tmp_path):
    """Judge and teacher are missing, and process 0 saves each checkpoint half a second late: the
    second process waits, and holds the teacher that the first one saved, in both rounds. Processes
    that hold different things are told so, all of them, as they are where the first is refused. A
    process that did not wait would find step 3, or no file. No false alarm."""
    outputs = together(2, tmp_path, distil_on_the_way, [
        "--dataset", str(make_dataset(tmp_path / "data")), "--out", str(tmp_path / "out"),
        "--rounds", "2", "--teacher_steps", "8", "--steps_per_round", "2", "--samples", "2",
        "--batch", "6", "--micro_batch", "3", "--save_every", "3", "--device", "cpu"])
    teacher = checkpoints.load_model(tmp_path / "out/teacher.pt")[0]
    held = [[line for line in output.splitlines() if line.startswith("teachers of round")]
            for output in outputs]
    assert held[0] == held[1] and len(held[0]) == 2
    assert held[0][0] == f"teachers of round 1 {checkpoints.fingerprint(teacher)}"
    for output in outputs:
        assert "refused: the processes hold different ranks ([0, 1])" in output
        assert "refused: by the first" in output


def test_batches_of_any_number_of_processes_reach_what_is_trained_on_the_way(monkeypatch, tmp_path):
    """--batch 6 on 3 processes: judge and teacher are trained with it too, not with 32."""
    asked = []

    class Asked(Exception):
        pass

    def note(t, p, as_saved):
        asked.append((t.objective, t.batch, t.micro_batch))
        raise Asked
    monkeypatch.setattr(distill, "train", note)
    c = distill.DistillConfig(batch=6, micro_batch=2, out=str(tmp_path))
    for get in (distill.get_judge, distill.get_teacher):
        with pytest.raises(Asked):
            get(c, processes.Processes(torch.device("cpu"), 1, 3), None)
    assert asked == [("ar", 6, 2), ("mdlm", 6, 2)]


def test_run_keeps_its_micro_batches_where_other_processes_can_deal_them_out(capsys):
    """Their size decides the noise. Begun by 4 processes (8 sequences each of 32), 1 and 2 go on as
    it was, without a word; 8 cannot, and it is said; --micro_batch is what it is. Exact."""
    def run(begun):
        return checkpoints.Run(Path("teacher.pt"), 9, None, None, [], {}, micro=begun)

    def go_on(world, begun, **flags):
        c = train.TrainConfig(batch=32, **flags)
        return train.micro_batches(c, processes.Processes(torch.device("cpu"), 0, world), run(begun))
    assert go_on(1, 8) == (8, 4) and go_on(2, 8) == (8, 2) and go_on(4, 8) == (8, 1)
    assert go_on(2, None) == (16, 1) and go_on(2, None, micro_batch=4) == (4, 4)
    assert capsys.readouterr().out == ""
    assert go_on(8, 8) == (4, 1)
    assert "draws different noise" in capsys.readouterr().out


def test_two_processes_give_the_table_of_one(runs, tmp_path):
    """evaluate.py, all parts, 70 samples (three batches on two processes): every number but the
    seconds; the second process prints nothing. Exact, with one thread each."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{(i * j) % 10}" for i in range(20)) for j in (1, 3, 7)))
    found = []
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        outputs = together(world, tmp_path / f"outputs-{world}", run_small, "tools.evaluate", [
            str(runs["train.py", 1] / "teacher.pt"), str(runs["distill.py", 1] / "round1.pt"),
            "--judge", str(runs["train.py", 1].parent / "start/ar.pt"), "--samples", "70",
            "--steps", "2", "8", "--sequences", "40", "--last_word", str(text),
            "--continuations", "3", "--prompts", "15", "--device", "cpu", "--json", str(out)])
        assert all("samples; too low" in output for output in outputs[:1])
        assert outputs[1:] == [""] * (world - 1)
        found.append(json.loads(out.read_text()))
        for row in found[-1]["samples"]:
            del row["seconds"]
        del found[-1]["argv"]
    assert found[0] == found[1] and len(found[0]["samples"]) == 5
