"""results/lesson.py prints its two examples from a folder of stories, and says what it needs."""
import dataclasses
import sys

import torch

import common
import distill
from data.stories import language
from helpers import call, make_dataset, refused
from model import ModelConfig, Transformer

sys.path.insert(0, str(common.ROOT / "results"))
import lesson                                                        # noqa: E402

STORIES = dict(kind="words", items=language.VOCABULARY)


def save(path, dataset="stories", kind="sdtt", **more):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(len(language.VOCABULARY), 50, 1, 2, 16))
    common.save_checkpoint(
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
    assert "from t = 0.75 to 0.742188 opens" in shown
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
