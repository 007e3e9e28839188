"""Training where the beginning of each row is given: from the files of a dataset to the weights.

That the bound is the conditional likelihood is proved in test_diffusion.py, test_reveal.py and
test_exact.py. Nothing here is left to chance: no test has a false alarm.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import distill
import train
from data import checkpoints, dataset, files, processes
from helpers import call, make_dataset, refused
from model import Transformer

pytestmark = pytest.mark.usefixtures("small_nano")

CPU = processes.Processes(torch.device("cpu"))
TURNS = [0, 3, 8]                                        # lengths of prompts, in turn
FLAGS = ["--batch", 4, "--micro_batch", 2, "--device", "cpu", "--log_every", 1, "--save_every", 2]


@pytest.fixture(scope="module")
def made(small_nano, tmp_path_factory):
    """Datasets of the same rows: plain, with prompts of several lengths, and of 4 tokens each; and
    models of the plain one: ar.pt, teacher.pt and reveal/teacher.pt."""
    top = tmp_path_factory.mktemp("made")
    make_dataset(top / "plain")
    make_dataset(top / "prompts", TURNS)
    make_dataset(top / "four", 4)
    flags = ["--dataset", top / "plain", *FLAGS, "--steps", 2]
    call(train, *flags, "--out", top, "--objective", "ar")
    call(train, *flags, "--out", top)
    call(train, *flags, "--out", top / "reveal", "--attention", "reveal")
    return top


def load(folder):
    return dataset.load_data(str(folder), CPU)


# ---- what a folder says of its prompts

def test_a_batch_hands_on_how_much_of_each_row_is_given(made):
    """Rows are found by their words, which are random: none comes twice. Without prompts there is
    nothing to hand on, and the rows are the same. Exact."""
    plain, data = load(made / "plain"), load(made / "prompts")
    for split in ("train", "val"):
        rows = getattr(data, split).reshape(-1, 12).tolist()
        torch.manual_seed(0)
        x, keep = data.batch(split, 64, 12, "cpu")
        numbers = [rows.index(row) for row in x.tolist()]
        first = 0 if split == "train" else 200 % 3
        assert keep.sum(1).tolist() == [TURNS[(first + n) % 3] for n in numbers]
        assert (keep[:, 1:] <= keep[:, :-1]).all() and len(set(numbers)) > 20
        torch.manual_seed(0)
        same, nothing = plain.batch(split, 64, 12, "cpu")
        assert torch.equal(same, x) and nothing is None


def test_fingerprints_know_the_prompts_and_are_as_before_without(made):
    """The last is that of older checkpoints, which must go on. Exact."""
    found = [load(made / name).fingerprint for name in ("plain", "prompts", "four")]
    assert len(set(found)) == 3 and found[0] == "806996923001"


def test_dataset_that_is_written_again_without_prompts_has_none(tmp_path):
    """Nor is anything of the old ones left. Exact."""
    make_dataset(tmp_path, TURNS)
    assert load(tmp_path).prompts
    make_dataset(tmp_path)
    assert load(tmp_path).prompts is None
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("lengths, said", [
    ([3] * 199, "train_prompts.bin has 398 bytes, but train.bin 200 rows"),
    ([3] * 201, "train_prompts.bin has 402 bytes, but train.bin 200 rows"),
    (b"\1\0\1", "train_prompts.bin has 3 bytes"),
    ([], "train_prompts.bin has 0 bytes"),
    ([12] * 200, "a prompt of 12 tokens, which leaves nothing of a row of 12"),
    ([3] * 199 + [60_000], "a prompt of 60,000 tokens"),
    (None, "train_prompts.bin cannot be read (No such file or directory)")])
def test_prompts_that_do_not_fit_the_rows_are_refused_by_their_file(tmp_path, capsys, lengths,
                                                                    said):
    """One sentence and status 2, and nothing is written: too few, too many, half a number, none,
    too long, and those of one split only. No false alarm."""
    path = make_dataset(tmp_path / "data", 3) / "train_prompts.bin"
    content = lengths
    if isinstance(lengths, list):
        content = np.array(lengths, np.uint16).tobytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    assert said in refused(capsys, train, "--dataset", tmp_path / "data", "--out", out, *FLAGS)
    assert not out.exists()


def test_prompts_beside_running_text_are_refused(tmp_path, capsys):
    """Which has no rows that they could begin. No false alarm."""
    words = dict(kind="words", items=["a", "b"])
    dataset.write_data(tmp_path, [0, 1] * 99, [1, 0] * 99, {"train": [1], "val": [1]},
                       tokenizer=words)
    said = refused(capsys, train, "--dataset", tmp_path, "--out", tmp_path / "out", *FLAGS)
    assert "running text" in said and "stride" in said and not (tmp_path / "out").exists()


# ---- training

@pytest.fixture
def seen(monkeypatch):
    """A list that gets what every network reads in training, ids and ranks (rows, L)."""
    found, hidden = [], Transformer.hidden

    def note(model, idx, at=None, rank=None):
        found.append((idx.clone(), rank))
        return hidden(model, idx, at, rank)
    monkeypatch.setattr(Transformer, "hidden", note)
    return found


@pytest.mark.parametrize("init, attention", [("teacher.pt", "full"),
                                             ("reveal/teacher.pt", "reveal")])
def test_prompts_are_never_masked_in_training_and_distilling(made, tmp_path, seen, init, attention):
    """Four tokens of each row, which come first in the order; of the others many are. Through both
    scripts, from --init on. The rounds' table would be of texts without prompts, so there is none.
    Exact."""
    flags = ["--dataset", made / "four", *FLAGS, "--attention", attention, "--out", tmp_path]
    call(train, *flags, "--init", made / init, "--steps", 2)
    trained = len(seen)
    call(distill, *flags, "--teacher", tmp_path / "teacher.pt", "--rounds", 1, "--samples", 0,
         "--teacher_steps", 4, "--steps_per_round", 2)
    assert trained >= 4 and len(seen) > trained + 4
    # full attention has no order, and ignores one that it is given
    if attention == "reveal":
        rank = torch.cat([rank for _, rank in seen])
        assert (rank[:, :4].amax(1) < rank[:, 4:].amin(1)).all()
    masked = torch.cat([ids for ids, _ in seen]) == 10
    assert not masked[:, :4].any() and (masked[:, 4:].double().mean(0) > 0.3).all()


def test_distilling_with_prompts_has_no_table(made, tmp_path, capsys):
    """And says so before anything is trained. No false alarm."""
    said = refused(capsys, distill, "--dataset", made / "four", *FLAGS, "--out", tmp_path / "out")
    assert "--samples 0" in said and "prompts" in said and not (tmp_path / "out").exists()


def log_of(path):
    """The (step, loss, val_loss) of a run."""
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["val_loss"]) for line in lines]


@pytest.mark.parametrize("objective, init, attention", [
    ("ar", "ar.pt", []), ("mdlm", "teacher.pt", []),
    ("mdlm", "reveal/teacher.pt", ["--attention", "reveal"])])
def test_training_with_prompts_goes_on_where_it_stopped(made, tmp_path, monkeypatch, objective,
                                                        init, attention):
    """Stopped in the fourth of 5 steps, then the same command again: the losses, which differ from
    those without prompts, and the weights of an uninterrupted run. Exact."""
    argv = [*FLAGS, *attention, "--objective", objective, "--init", made / init, "--steps", 5]
    given = argv + ["--dataset", made / "prompts"]
    call(train, *given, "--out", tmp_path / "whole")
    call(train, *argv, "--dataset", made / "plain", "--out", tmp_path / "plain")
    calls = []

    def stop(*args, update=common.ema_update):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(*args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "ema_update", stop)
        call(train, *given, "--out", tmp_path / "parts")
    name = train.FILES[objective]
    assert checkpoints.load_checkpoint(tmp_path / "parts" / name)["step"] == 2
    call(train, *given, "--out", tmp_path / "parts")
    models = [checkpoints.load_model(tmp_path / part / name)[0] for part in ("whole", "parts")]
    assert checkpoints.fingerprint(models[0]) == checkpoints.fingerprint(models[1])
    logs = [log_of(tmp_path / part / name) for part in ("whole", "parts", "plain")]
    assert logs[0] == logs[1] != logs[2] and len(logs[0]) == 5


@pytest.mark.parametrize("first, then", [("plain", "prompts"), ("prompts", "plain"),
                                         ("prompts", "four")])
def test_run_is_bound_to_its_prompts(made, tmp_path, capsys, first, then):
    """A run that began with prompts does not go on without, or with others, nor the other way
    round. No false alarm."""
    argv = [*FLAGS, "--out", tmp_path, "--steps", 2, "--dataset"]
    call(train, *argv, made / first)
    assert "other text or prompts" in refused(capsys, train, *argv, made / then)


def test_first_weights_must_read_rows_of_the_same_length(made, tmp_path, capsys):
    """As a prompt is the beginning of a row, which a longer context would run over. No false
    alarm."""
    short = tmp_path / "short"
    rows = np.fromfile(made / "four/train.bin", np.uint16).tolist()
    dataset.write_data(short, rows[:960], rows[960:1440], {"train": [2] * 160, "val": [2] * 80},
                       stride=6, tokenizer=load(made / "four").tokenizer.spec)
    argv = ["--dataset", short, *FLAGS, "--out", tmp_path / "out"]
    said = refused(capsys, train, *argv, "--init", made / "teacher.pt")
    assert "reads 12 tokens" in said and "has 6" in said and not (tmp_path / "out").exists()
    with pytest.raises(files.UserError, match="writes 12"):
        checkpoints.load_for(load(short), made / "teacher.pt", "cpu", ("mdlm",))


# ---- what it gains

def test_page_says_what_its_file_holds():
    """The shares of valid endings before, after, and after as much training on whole stories."""
    root = Path(common.__file__).resolve().parent
    rows = json.loads((root / "results/endings.json").read_text())["continuations"]
    said = {}
    for steps in ("exact", 32):
        for place in ("stories-nano-reveal", "endings-nano-reveal", "longer"):
            [row] = [row for row in rows if row["model"] == f"{place}/teacher"
                     and row["steps"] == steps and row["prompts"] == 1000]
            said[steps, place] = f"{100 * row['valid']:.0f} ± {100 * row['valid_se']:.0f} %"
    exact = [text for (steps, _), text in said.items() if steps == "exact"]
    shorter = [text for (steps, _), text in said.items() if steps == 32]
    page = " ".join((root / "data/README.md").read_text().split())
    assert (f"{exact[0]} are valid before, {exact[1]} after 300 steps, and {exact[2]} after 300 "
            f"steps on whole stories (32 sampling steps: {', '.join(shorter)};") in page
