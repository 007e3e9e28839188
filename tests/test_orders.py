"""The surest tokens first: another law than the model's, against enumeration of it, and where it
is offered, refused and named.

Chi-square tests fail with another seed one time in a million, LIMIT, unless they say otherwise.
"""
import itertools
import json
from collections import Counter

import pytest
import torch

import diffusion
import sample
from data.orders import even_counts, sample_confident
from data.processes import Processes
from diffusion import categorical, sharpen
from helpers import call, make_dataset, refused
from model import ModelConfig, Transformer
from sample import Sampling
from test_evaluate import random_model, save
from tools import evaluate, figures
from toy import Model, ancestral_law, chi_square, count, exact_model, joint

LIMIT = 1e-6
CPU = Processes(torch.device("cpu"))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def confident_law(p, counts):
    """Probabilities (V^L,) by enumeration, for the perfect model of a law p: in each step every
    choice of a token for each mask, of which the counts[step] likeliest stay."""
    V, L = p.shape[0], p.dim()
    model, law = exact_model(p), {(V,) * L: 1.0}                     # {z: its probability}
    for n in counts:
        after = Counter()
        for z, chance in law.items():
            masks = [i for i in range(L) if z[i] == V]
            predicted = model(torch.tensor([z]))[0].exp().tolist()   # (L, V)
            for tokens in itertools.product(range(V), repeat=len(masks)):
                drawn = [(predicted[i][v], i, v) for i, v in zip(masks, tokens)]
                filled, weight = list(z), chance
                for probability, _, _ in drawn:
                    weight *= probability
                for _, i, v in sorted(drawn, reverse=True)[:n]:
                    filled[i] = v
                after[tuple(filled)] += weight
        law = after
    return torch.tensor([law[x] for x in itertools.product(range(V), repeat=L)],
                        dtype=torch.float64)


class Recorded(Model):
    """A model that says the same whatever it sees, log p (L, V) of its positions; it keeps the
    texts that it is shown, with all their rows."""

    def __init__(self, p):
        super().__init__(lambda z, at: p.log().expand(*at.shape, -1)[at])
        self.seen = []

    def hidden(self, z, at=None, rank=None):
        self.seen.append(z.clone())
        return super().hidden(z, at)


# ---- the law

@pytest.mark.parametrize("steps, counts", [(2, [2, 1]), (3, [1, 1, 1]), (1000, [1, 1, 1])])
def test_texts_have_the_law_by_enumeration_which_is_not_the_models(steps, counts):
    """All 27 texts of 3 tokens, 40,000 samples; ancestral sampling's law, in as many steps or in
    very many, is excluded, also with one token a step. Chi-square."""
    p = joint(3, 3, seed=2)
    x = sample_confident(exact_model(p), torch.full((40_000, 3), 3), steps, 3)
    law = confident_law(p, counts)
    assert abs(law.sum() - 1) < 1e-12
    assert chi_square(count(x, 3), law) > LIMIT
    assert chi_square(count(x, 3), p) < LIMIT
    assert chi_square(count(x, 3), ancestral_law(p, 2)) < LIMIT


def test_one_step_has_the_law_of_ordinary_sampling():
    """Nothing is chosen then: the product of the marginals, as by enumeration (1e-12). Chi-square
    over 81 texts."""
    p = joint(3, 4, seed=0)
    law = ancestral_law(p, 1)
    assert (confident_law(p, [4]) - law).abs().max() < 1e-12
    x = sample_confident(exact_model(p), torch.full((40_000, 4), 3), 1, 3)
    assert chi_square(count(x, 3), law) > LIMIT


def test_temperature_acts_on_the_draw_and_confidence_is_the_models_own():
    """At temperature 0.1 position 0 is drawn from two tokens of 50 and 48 %, position 1 is nearly
    certain of one of 45 %: still 0 comes first. (By sharpened probabilities it would be 1.) With
    another seed one of the 50 texts differs one time in 5,000."""
    p = torch.tensor([[0.5, 0.48, 0.005, 0.005, 0.005, 0.005], [0.45] + [0.11] * 5])
    model, z = Recorded(p), torch.full((50, 2), 6)

    def draw(logits):
        return categorical(sharpen(logits, 0.1))
    x = sample_confident(model, z, 2, 6, draw)
    assert (model.seen[1] != 6).tolist() == [[True, False]] * 50
    assert (x[:, 1] == 0).all() and 5 < int(x[:, 0].sum()) < 45


def test_sampling_with_this_order_draws_this_law():
    """draw_samples, in batches: 12,000 texts. Chi-square over 0.001, the chance of another seed to
    fail."""
    p = joint(3, 3, seed=2)
    model = exact_model(p)
    model.config = ModelConfig(3, 3, positions="both")
    model.mask_id, model.run = 3, None
    x = sample.draw_samples(model, 12_000, Sampling(2, order="confidence"), CPU)
    assert chi_square(count(x, 3), confident_law(p, [2, 1])) > 0.001


# ---- steps, prompts, memory

@pytest.mark.parametrize("steps, counts", [(1, [8]), (3, [3, 3, 2]), (8, [1] * 8), (99, [1] * 8)])
def test_each_step_reveals_as_many_and_the_prompt_stays(steps, counts):
    """8 masks around prompts in other places of each row: what each call still sees masked; no
    token changes once it is there, no mask is left, and the input stays as it was. Exact."""
    masked = torch.rand(6, 12).argsort(1) < 8
    before = torch.where(masked, 5, torch.randint(5, (6, 12)))
    z, model = before.clone(), Recorded(torch.rand(12, 5))
    x = sample_confident(model, z, steps, 5)
    assert even_counts(8, steps) == counts and torch.equal(z, before)
    assert torch.equal(x[~masked], before[~masked]) and int(x.max()) < 5
    left = 8
    for seen, revealed in zip(model.seen, counts, strict=True):
        assert ((seen == 5).sum(1) == left).all() and torch.equal(seen[seen != 5], x[seen != 5])
        left -= revealed
    assert left == 0


def test_the_surest_come_first_and_equals_in_random_order():
    """With an argmax for a draw nothing else is left to chance: positions by their highest
    probability. Of four equal ones each comes first equally often: chi-square over 4,000 texts."""
    sure = torch.tensor([0.7, 0.9, 0.6, 0.8])
    model = Recorded(torch.stack((sure, 1 - sure), 1))
    sample_confident(model, torch.full((3, 4), 2), 4, 2, lambda logits: logits.argmax(-1))
    for pos, now, later in zip((1, 3, 0), model.seen, model.seen[1:]):
        assert ((now == 2) & (later != 2)).tolist() == [[i == pos for i in range(4)]] * 3
    model = Recorded(torch.full((4, 2), 0.5))
    sample_confident(model, torch.full((4_000, 4), 2), 4, 2)
    first = (model.seen[1] != 2).long().argmax(1)
    assert chi_square(torch.bincount(first, minlength=4), torch.full((4,), 0.25)) > LIMIT


def test_never_all_logits_at_once(monkeypatch):
    """2,000 masks: the head is given HEAD_ROWS states at a time, a draw DRAW_ROWS logits. Exact."""
    model, heads, draws = Recorded(torch.rand(50, 5)), [], []
    monkeypatch.setattr(model, "head", lambda h: heads.append(len(h)) or h)
    sample_confident(model, torch.full((40, 50), 5), 1, 5,
                     lambda logits: draws.append(len(logits)) or categorical(logits))
    assert sum(heads) == sum(draws) == 2000
    assert max(heads) == diffusion.HEAD_ROWS and max(draws) == diffusion.DRAW_ROWS


def test_nothing_masked_uneven_rows_and_nan():
    """The text itself without a call; ValueError; FloatingPointError. No chance involved."""
    x = torch.randint(5, (3, 7))
    assert torch.equal(sample_confident(None, x, 4, 5), x)
    with pytest.raises(ValueError, match="same number of masks"):
        sample_confident(None, torch.tensor([[0, 3, 3], [0, 1, 3]]), 4, 3)
    model = Transformer(ModelConfig(7, 8, 2, 2, 16)).eval()
    model.blocks[1].mlp_out.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_confident(model, torch.full((2, 8), 7), 4, 7)


# ---- the flag

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a dataset, a teacher, one with attention reveal, and a judge."""
    top = tmp_path_factory.mktemp("orders")
    make_dataset(top / "data")
    for name, kind, attention in (("teacher", "mdlm", "full"), ("reveal", "mdlm", "reveal"),
                                  ("ar", "ar", "causal")):
        save(top / f"{name}.pt", kind, random_model(attention), top / "data")
    return top


CONFIDENCE = ["--order", "confidence"]


def test_sample_takes_the_order_with_a_prompt_and_gaps(made, capsys):
    """As many words as asked for, the prompt's among them, other texts than in random order. The
    same seed gives the same texts; 4 texts of 10 random words are never equal by chance."""
    texts = []
    for argv in (CONFIDENCE, CONFIDENCE, []):
        call(sample, made / "teacher.pt", "--infill", "w1 _4_ w2 _", "--steps", 3, *argv)
        texts.append(capsys.readouterr().out)
    lines = [line.split() for line in texts[0].splitlines()]
    assert [(len(line), line[0], line[5]) for line in lines] == [(7, "w1", "w2")] * 4
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("module", [sample, evaluate])
@pytest.mark.parametrize("name, argv, words", [
    ("reveal.pt", [], "reveal.pt has attention reveal"),
    ("ar.pt", [], "ar.pt has attention causal"),
    ("reveal.pt", ["--steps", "exact"], "--order confidence"),
    ("teacher.pt", ["--steps", "exact"], "full attention"),
    ("ar.pt", ["--steps", "exact"], "--order confidence")])
def test_models_that_keep_an_order_are_refused(made, capsys, module, name, argv, words):
    """And exact sampling, of any model: a sentence each."""
    assert words in refused(capsys, module, made / name, *CONFIDENCE, *argv)


def test_tables_are_refused_where_one_model_cannot_or_draws_are_joint(made, capsys, tmp_path):
    """One of several checkpoints, and --joint; nothing is written."""
    argv = ["--json", tmp_path / "e.json", "--order", "random", "confidence"]
    assert "reveal.pt" in refused(capsys, evaluate, made / "teacher.pt", made / "reveal.pt", *argv)
    assert "--joint" in refused(capsys, evaluate, made / "teacher.pt", "--joint", *argv)
    assert not (tmp_path / "e.json").exists()


def test_every_row_says_its_order_and_the_table_that_it_is_another_law(made, capsys, tmp_path):
    """Samples, frontier and continuations of both orders, a row each; nfe is what even counts need:
    12 tokens in 5 steps are 5 calls. Without the flag nothing is said. Exact."""
    argv = [made / "teacher.pt", "--samples", 8, "--steps", 5, "--sequences", 4, "--json",
            tmp_path / "e.json"]
    more = ["--temperature", 0.9, 1.0, "--continuations", 3, "--prompts", 2]
    call(evaluate, *argv, *more, "--order", "random", "confidence")
    shown, results = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert [(row["model"], row["order"], row["temperature"]) for row in results["samples"]] == [
        ("data", None, None), *[("teacher", order, T) for order in ("random", "confidence")
                                for T in (0.9, 1.0)]]
    assert [row["nfe"] for row in results["samples"][3:]] == [5, 5]
    assert [row["order"] for row in results["frontier"]] == ["random", "confidence"]
    assert [row["order"] for row in results["continuations"]] == [None, "random", "confidence"]
    assert "another law than the model's" in shown.split("likelihood")[0]
    assert len([line for line in shown.splitlines() if line.startswith("teacher  ")
                and "confidence" in line]) == 2 + 2 + 1 + 1
    call(evaluate, *argv)
    assert "confidence" not in capsys.readouterr().out


def test_the_measure_of_entropy_is_the_teachers_own_order():
    """A row of few steps is compared with the teacher's in random order, not with the teacher's own
    surest tokens, whose entropy is lower; a frontier, too. Exact."""
    def row(model, order, entropy, T=1.0):
        return {"model": model, "steps": 8, "order": order, "temperature": T, "gen_ppl": 9.0 * T,
                "gen_ppl_se": 0.0, "entropy": entropy * T, "entropy_se": 0.0,
                "pooled_entropy": 4.0, "pooled_entropy_se": 0.0}
    rows = [row("teacher", "confidence", 3.0), row("teacher", "random", 3.8),
            row("student", "random", 3.5)]
    figures.mark(rows, "teacher")
    assert [row["low"] for row in rows] == ["text", "", "text"]
    rows += [row("teacher", order, entropy, T) for order, entropy in (
        ("confidence", 3.0), ("random", 3.8)) for T in (0.5, 1.5)]
    found = {(row["model"], row["order"]): row for row in figures.frontier(rows, "teacher")}
    assert {row["entropy"] for row in found.values()} == {3.8}
    assert found["teacher", "random"]["at_entropy"] == pytest.approx(9.0)
    assert found["teacher", "confidence"]["at_entropy"] > 9.0
