"""tools/experiments.py: its variants are real settings, and a small one runs from end to end."""
import json
import shutil
import sys

import pytest
import torch

import distill
import toy
from diffusion import q_sample
from tools import experiments


@pytest.mark.parametrize("name", experiments.variants(1))
def test_variants_are_settings_of_distill_and_share_the_plain_path(name):
    """Each makes a configuration whose schedule exists; "kld" is distill.py's default. Exact."""
    variants = experiments.variants(120)[name]
    assert variants["kld"] == {}
    for fields in variants.values():
        c = distill.DistillConfig(**fields)
        assert distill.schedule(c.teacher_steps, c.rounds, c.k)[-1] >= 1


def test_rounds_of_more_teacher_steps_have_as_many_optimizer_steps_on_the_way_to_four():
    """k = 2, 4, 8 come to a student for 4 sampling steps with 720 optimizer steps each. Exact."""
    for name, rounds in (("kld", 6), ("k4", 3), ("k8", 2)):
        c = distill.DistillConfig(steps_per_round=120) if name == "kld" else distill.DistillConfig(
            **experiments.variants(120)["rounds"][name])
        assert rounds * c.steps_per_round == 720
        assert distill.schedule(c.teacher_steps, rounds, c.k)[-1] == 4


def test_the_published_grid_replaces_the_right_one_for_its_variant_only():
    """And the right one comes back. Exact."""
    right = distill.sdtt_targets
    with experiments.grid("grid"):
        assert distill.sdtt_targets is not right
    with experiments.grid("raw"):
        assert distill.sdtt_targets is right
    assert distill.sdtt_targets is right


def test_published_targets_agree_with_the_right_ones_where_the_grid_does_not_matter():
    """With k = 1 and t = 1, w = 1: one step from t itself, no position revealed on the way. With
    k = 2 at t = 1/2 they differ: the second step starts at (1 - t)(t - 2 dt). Exact."""
    torch.manual_seed(0)
    teacher = toy.exact_model(toy.joint(3, 4, 0))
    x = toy.draw(toy.joint(3, 4, 0), 200)
    t = torch.full((200,), 0.5)
    z = q_sample(x, t, 3)
    found = []
    for targets in (distill.sdtt_targets, torch.no_grad()(experiments.published_targets)):
        torch.manual_seed(1)
        found.append([targets(teacher, z, t, 0.2, k, 3) for k in (1, 2)])
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["rounds"])
def test_an_experiment_from_end_to_end(name, tmp_path, monkeypatch, small_nano):
    """Trains, measures, and a second call measures nothing anew; the table has the shared
    teacher once, and the last student of each variant. Exact."""
    monkeypatch.chdir(tmp_path)
    for key, value in dict(EACH=[2], LAST=[2, 8], FIRST=[8, 1024], HEAT=[0.5], SAMPLES=8, PIECES=4,
                           TASKS=4, STEPS={"stories": 1}).items():
        monkeypatch.setattr(experiments, key, value)
    monkeypatch.setattr(experiments, "variants", lambda n: {"rounds": {
        "kld": dict(rounds=2), "k4": dict(k=4, rounds=1)}})
    train = experiments.train
    monkeypatch.setattr(experiments, "train", lambda c, p: train(
        experiments.dataclasses.replace(c, steps=2, batch=2), p))
    threads = torch.get_num_threads()
    experiments.train_all(name, "stories", 0)
    rows = experiments.measure_all(name, "stories", 0)
    stores = sorted(tmp_path.rglob("*.json"))
    before = [path.stat().st_mtime_ns for path in stores]
    assert experiments.measure_all(name, "stories", 0) == rows
    assert [path.stat().st_mtime_ns for path in stores] == before
    path = experiments.folder("stories", 0) / "kld" / "round2.pt"   # other weights: measured anew
    shutil.copy(path.with_name("round1.pt"), path)
    new = experiments.measure_all(name, "stories", 0)
    torch.set_num_threads(threads)
    changed = [(row["variant"], row["round"]) for row in new if row not in rows]
    assert len(new) == len(rows) and set(changed) == {("kld", 2)}
    text = experiments.summary(experiments.with_teachers(rows))
    assert [line.split()[:2] for line in text.splitlines()[3:]] == [
        ["kld", "0"], ["kld", "2"], ["k4", "1"]]
    assert json.loads(json.dumps(rows)) == rows and {row["seed"] for row in rows} == {0}


def test_rows_of_datasets_and_seeds_that_were_not_asked_for_stay_in_the_file(tmp_path, monkeypatch):
    """And those that were are replaced, not doubled. Exact."""
    def row(dataset, seed, bound):
        return {"variant": "kld", "dataset": dataset, "seed": seed, "bound": bound}
    kept = [row("stories", 0, 1), row("stories", 1, 1), row("pydoc", 1, 1)]
    (tmp_path / "sizes.json").write_text(json.dumps({"rows": [row("pydoc", 0, 1)] + kept}))
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "everywhere", lambda f, e, c: (
        [[row(d, s, 2) for d in c.datasets for s in c.seeds]] if f is experiments.measure_all
        else None))
    for name in ("with_teachers", "summary", "load_data"):
        monkeypatch.setattr(experiments, name, lambda *a: a[0])
    monkeypatch.setattr(experiments.figures, "draw_experiment", lambda *a: None)
    monkeypatch.setattr(sys, "argv", ["x", "sizes", "--datasets", "pydoc", "--seeds", "0"])
    experiments.main()
    rows = json.loads((tmp_path / "sizes.json").read_text())["rows"]
    assert rows == kept + [row("pydoc", 0, 2)]
