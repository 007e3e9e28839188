"""lesson.py prints its two examples, precision.py its table."""
import dataclasses
import json

import torch

import distill
from data import checkpoints
from data.stories import language
from helpers import call, make_dataset, refused
from model import ModelConfig, Transformer
from tools import lesson, precision

STORIES = dict(kind="words", items=language.VOCABULARY)


def save(path, dataset="stories", kind="sdtt", **more):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(len(language.VOCABULARY), 50, 1, 2, 16))
    checkpoints.save_checkpoint(
        path, kind=kind, model_config=model.config.__dict__, model=model.state_dict(),
        ema=model.state_dict(), optimizer=[], step=1, steps=1, seconds=1.0, tokenizer=STORIES,
        config=dataclasses.asdict(distill.DistillConfig(dataset=str(dataset))), **more)


def test_both_examples_are_printed(tmp_path, capsys):
    """A text with the oracle's reasons, and a step of the last round's size, 1/128 for round 2 of
    256 teacher steps, with three predictions at two positions. Exact."""
    save(tmp_path / "teacher.pt", kind="mdlm")
    for r in (1, 2):
        save(tmp_path / f"round{r}.pt", round=r)
    call(lesson, tmp_path)
    shown = capsys.readouterr().out
    assert "from t = 0.75 to 0.742188 reveals" in shown
    assert "    - " in shown.split("A step of the teacher")[0]
    for who in ("teacher, first step", "teacher, second step", "student, one step"):
        assert shown.count(who) == 2
    assert shown.count("z_t") == 3 and shown.count("position ") == 2


def test_what_it_needs_is_said(tmp_path, capsys):
    """Two rounds, of the dataset stories. Exact."""
    save(tmp_path / "round1.pt", round=1)
    assert "fewer than two round files" in refused(capsys, lesson, tmp_path)
    other = make_dataset(tmp_path / "data")
    for name in ("teacher", "round1", "round2"):
        save(tmp_path / f"{name}.pt", other, "mdlm" if name == "teacher" else "sdtt", round=2)
    assert "the examples need stories" in refused(capsys, lesson, tmp_path)


def test_a_law_is_drawn_exactly_but_in_float32_with_many_steps(monkeypatch, tmp_path, capsys):
    """tools/precision.py in small: 300 tokens, 8 steps, where nothing is lost: all three draws
    have the law's mean of -log p within 4 standard errors (another seed fails one time in 5,000),
    and the table has their four rows."""
    c = precision.PrecisionConfig(tokens=300, length=640, steps=8)
    law, *found = precision.rows_of(c)
    for row in found:
        assert abs(row["nats"] - law["nats"]) < 4 * row["nats_se"] < 0.5
        assert (row["tokens"], row["steps"]) == (640, 8)
    monkeypatch.setattr(precision, "rows_of", lambda c: [law, *found])
    monkeypatch.setattr(precision, "ROOT", tmp_path)
    call(precision)
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert len(json.loads((tmp_path / "results/precision.json").read_text())["rows"]) == 4
