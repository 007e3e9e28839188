"""weights/: three models that come with the code, and the tool that made them."""
import dataclasses
import functools
import json
import math

import pytest
import torch

from common import ROOT
from data import checkpoints
from data.dataset import make_tokenizer
from data.processes import Processes
from data.stories import language
from distill import DistillConfig
from helpers import call, make_dataset, refused
from model import ModelConfig, Transformer
from sample import EXACT, Sampling, draw_samples
from tools import weights
from train import TrainConfig

CPU = Processes(torch.device("cpu"))
ROWS = json.loads((ROOT / "results/exact.json").read_text())["rows"]
NAMES = "ar", "teacher", "round7"


# ---- the files

def row(model, steps):
    """The row of results/exact.json, first seed, temperature 1, 8 tokens ahead."""
    found = [one for one in ROWS if one["model"] == model and one["steps"] == steps
             and one["trained_with_seed"] == 0 and one["temperature"] == 1 and one["ahead"] == 8
             and one["max_calls"] is None]
    assert len(found) == 1
    return found[0]


@functools.cache
def opened(name):
    return checkpoints.load_model(ROOT / f"weights/{name}.pt")


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_checkpoints_of_float32_models(name):
    """At most 2.1 MB, without what only training needs; half precision is gone once loaded."""
    model, content = opened(name)
    assert (ROOT / f"weights/{name}.pt").stat().st_size <= 2.1e6
    assert checkpoints.KEYS <= content.keys() and content["optimizer"] == []
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert content["tokenizer"] == dict(kind="words", items=language.VOCABULARY)
    for key, tensor in content["ema"].items():
        assert tensor.dtype == (torch.float16 if key.endswith(weights.HALVED) else torch.float32)


# what may differ from the commands of results/exact.md: places, speed, times of saving, and that
# the students, which came from a teacher with attention reveal, were not told so
FREE = {"out", "teacher", "judge", "compile", "log_every", "save_every", "attention"}


@pytest.mark.parametrize("name, config, attention", [
    ("ar", TrainConfig(objective="ar", steps=1500), "causal"),
    ("teacher", TrainConfig(objective="mdlm", attention="reveal"), "reveal"),
    ("round7", DistillConfig(samples=0), "reveal")])
def test_they_were_made_as_the_models_of_the_results(name, config, attention):
    """By the flags of the commands of results/exact.md, first seed; the student is the last."""
    model, content = opened(name)
    wanted = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    assert wanted.items() <= content["config"].items()
    assert model.config.attention == attention
    steps = config.steps_per_round if name == "round7" else config.steps
    assert content["step"] == content["steps"] == steps
    if name == "round7":
        assert (content["round"], content["sampling_steps"]) == (config.rounds, 2)
        assert row("round 7", 8)["divergence"] == content["config"]["divergence"]


def tail(k, n, p):
    """The chance of k or fewer of n, each with the chance p."""
    return sum(math.comb(n, i) * p ** i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize("name, known, steps", [
    ("ar", "ar", None), ("teacher", "teacher", EXACT), ("teacher", "teacher", 8),
    ("round7", "round 7", 8)])
def test_they_write_valid_stories_as_often_as_the_results_say(name, known, steps):
    """64 stories each, against the share in results/exact.json, moved by up to 3 of its standard
    errors. A number of valid ones fails if one so far out has a chance below 1e-5: with other seeds
    a false alarm in 50,000 at most."""
    model, content = opened(name)
    tokenizer = make_tokenizer(content["tokenizer"])
    x = draw_samples(model, 64, Sampling(steps), CPU)                # (64, L)
    valid = 0
    for ids in x.tolist():
        valid += not language.contradictions(tokenizer.decode(ids).split())
    share, error = row(known, steps)["valid"], row(known, steps)["valid_se"]
    assert tail(valid, 64, max(0, share - 3 * error)) > 1e-5
    assert tail(64 - valid, 64, max(0, 1 - share - 3 * error)) > 1e-5


# ---- the tool

@pytest.fixture
def folder(tmp_path):
    """Small models as distill.py would leave them, and their dataset. What is trained and what is
    its average differ."""
    make_dataset(tmp_path / "data")
    spec = dict(kind="words", items=[f"w{i}" for i in range(10)])
    for name, kind, attention in (("ar", "ar", "causal"), ("teacher", "mdlm", "reveal"),
                                  ("round2", "sdtt", "reveal"), ("round10", "sdtt", "reveal")):
        torch.manual_seed(len(name))
        model, ema = [Transformer(ModelConfig(10, 12, 2, 2, 32, attention=attention))
                      for _ in range(2)]
        checkpoints.save_checkpoint(
            tmp_path / "out" / f"{name}.pt", kind=kind, model_config=model.config.__dict__,
            model=model.state_dict(), ema=ema.state_dict(), optimizer=[{"m": torch.ones(9999)}],
            step=1, steps=1, seconds=1.0, tokenizer=spec, teacher=ema.state_dict(),
            config=dict(dataset=str(tmp_path / "data"), seed=0))
    return tmp_path


def test_the_averaged_weights_alone_are_kept(folder, capsys):
    """Of AR, teacher and the LAST student: the MLPs' matrices rounded, all else bit by bit; the
    file is less than a third of its source, which has two models, a teacher and an optimizer."""
    call(weights, folder / "out", "--out", folder / "small")
    said = capsys.readouterr().out.splitlines()
    names = ["ar.pt", "round10.pt", "teacher.pt"]
    assert sorted(path.name for path in (folder / "small").iterdir()) == names
    assert len(said) == 3 and all("its logits are within 0.0" in line for line in said)
    for name in names:
        source, target = folder / "out" / name, folder / "small" / name
        assert target.stat().st_size < source.stat().st_size / 3
        before = checkpoints.load_checkpoint(source)
        model, content = checkpoints.load_model(target)
        assert content["optimizer"] == [] and content["teacher"] is None
        for key, tensor in model.state_dict().items():
            kept = before["ema"][key]
            if key.endswith(weights.HALVED):
                assert not torch.equal(kept, kept.half().float())
                kept = kept.half().float()
            assert torch.equal(tensor, kept)
            assert torch.equal(content["model"][key], content["ema"][key])
        for key in ("kind", "config", "tokenizer", "model_config", "step", "steps", "seconds"):
            assert content[key] == before[key]


def test_what_it_cannot_do_is_said_before_anything_is_written(folder, capsys, monkeypatch):
    """A folder without students, one whose own checkpoints would be replaced, and models that half
    precision would change. Exact."""
    out = folder / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "would replace" in refused(capsys, weights, out, "--out", out)
    monkeypatch.setattr(weights, "LIMIT", 0)
    assert "would move the logits" in refused(capsys, weights, out, "--out", folder / "small")
    for path in out.glob("round*.pt"):
        path.unlink()
    assert "has no round file" in refused(capsys, weights, out, "--out", folder / "small")
    assert not (folder / "small").exists()
    assert all((path.read_bytes() == before[path.name]) for path in out.iterdir())
