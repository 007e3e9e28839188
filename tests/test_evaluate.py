"""The measures of samples against definitions by hand, and the table that shows them."""
import json
import math
import types

import numpy as np
import pytest
import torch

import evaluate
from data.dataset import make_tokenizer
from data.stories import language
from model import ModelConfig, Transformer

WORDS = make_tokenizer(dict(kind="words", items=["a", "b", "c", "d"]))


def dataset(rows, oracle=None, tokenizer=WORDS):
    """What evaluate needs of a dataset whose training texts are `rows`."""
    rows = np.array(rows, np.uint16)
    return types.SimpleNamespace(train=rows.reshape(-1), stride=rows.shape[1], oracle=oracle,
                                 tokenizer=tokenizer, texts=True)


def judge(vocab=4, context=6, seed=0):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab, context, 1, 2, 16, attention="causal")).eval()
    for w in model.parameters():                     # far from uniform
        w.data *= 10
    return model


def test_mean_and_standard_error():
    """By hand: 1, 2, 3, 6 have mean 3, variance 14/3, standard error sqrt(14/12). Exact."""
    assert evaluate.mean_se(torch.tensor([1, 2, 3, 6])) == pytest.approx((3, math.sqrt(14 / 12)))


def test_standard_error_covers_the_truth_in_about_95_of_100_cases():
    """400 means of 30 uniform numbers, within 1.96 errors: 380 expected with a deviation of 4.4;
    360 to 396 is beyond 3.6 deviations, with another seed less than one in 1,000."""
    torch.manual_seed(0)
    pairs = [evaluate.mean_se(torch.rand(30)) for _ in range(400)]
    assert 360 <= sum(abs(mean - 0.5) < 1.96 * se for mean, se in pairs) <= 396


def test_generative_perplexity_is_the_exponential_of_the_judges_mean_nats():
    """Token by token with full forward passes. float32 logits: 1e-5. No chance in it."""
    model, x = judge(), torch.randint(4, (70, 6), generator=torch.Generator().manual_seed(1))
    nats = torch.zeros(70, dtype=torch.float64)
    for i in range(6):
        start = torch.full((70, 1), 4)
        log_p = model(torch.cat((start, x[:, :i]), 1))[:, -1].double().log_softmax(-1)
        nats -= log_p.gather(1, x[:, i:i + 1])[:, 0].detach() / 6
    value, se = evaluate.gen_ppl(evaluate.make_judge(model), x)
    assert value == pytest.approx(nats.mean().exp().item(), rel=1e-5)
    assert se == pytest.approx(value * nats.std().item() / math.sqrt(70), rel=1e-4)


def test_entropy_is_of_each_text_and_pooled_entropy_of_all():
    """Texts of one repeated word each: 0 within a text, log 2 and its halves over all; and the
    other way round, one text of four words twice. Exact up to float32: 1e-6."""
    same = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    assert evaluate.entropy(same, 4) == pytest.approx((0, 0), abs=1e-6)
    assert evaluate.pooled_entropy(same, 4) == pytest.approx((math.log(2), 0), abs=1e-6)
    rich = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert evaluate.entropy(rich, 4)[0] == pytest.approx(math.log(4), abs=1e-6)
    mixed = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 2]])
    p = torch.tensor([5, 1, 2]) / 8
    assert evaluate.pooled_entropy(mixed, 4)[0] == pytest.approx(-(p * p.log()).sum().item())
    within = [-(q * q.log()).sum().item() for q in (torch.tensor([.75, .25]),
                                                    torch.tensor([.5, .5]))]
    assert evaluate.entropy(mixed, 4)[0] == pytest.approx(sum(within) / 2)


def test_pooled_entropys_standard_error_is_its_spread_over_repetitions():
    """300 sets of 100 texts of 10 words: the estimated error within 15 % of the spread seen, whose
    own deviation is 4 %. With another seed a false alarm has one chance in 5,000."""
    torch.manual_seed(0)
    p = torch.tensor([0.6, 0.2, 0.15, 0.05])
    found = [evaluate.pooled_entropy(torch.multinomial(p, 1000, True).view(100, 10), 4)
             for _ in range(300)]
    values, errors = torch.tensor(found).T
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)


def test_copies_are_the_texts_that_training_holds_word_for_word():
    """A copy at a row's beginning counts, the same words across two rows do not. Exact."""
    data = dataset([[0, 1, 2], [3, 0, 0]])
    x = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 0, 0], [0, 1, 3]])
    assert evaluate.copies(x, data).tolist() == [True, False, True, False]
    data.texts = False                                   # rows, but cut out of a long one
    assert evaluate.copies(x, data) is None


def test_oracle_grades_stories():
    """Fresh stories are valid; one with another name in the second sentence is not. Exact."""
    import random
    stories = make_tokenizer(dict(kind="words", items=language.VOCABULARY))
    good = [language.generate(random.Random(i)) for i in range(4)]
    bad = [*good[0][:-1], good[0][0]]                # no full stop at the end
    data = dataset([[0] * 50], "stories", stories)
    x = torch.tensor([stories.encode(" ".join(story)) for story in [*good, bad]])
    row = evaluate.measure(x, evaluate.make_judge(judge(stories.vocab, 50)), data)
    assert row["valid"] == pytest.approx(0.8) and row["contradictions"] > 0
    assert row["samples"] == 5 and row["copies"] == 0


@pytest.mark.parametrize("attention", ["full", "causal", "reveal"])
def test_samples_depend_on_the_seed_alone(attention):
    """Also on how many are asked for only beyond whole batches. Exact; two sets of 40 random texts
    are never equal by chance."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(4, 6, 1, 2, 16, attention=attention)).eval()
    one, two, other = (evaluate.draw_samples(model, 40, 3, torch.device("cpu"), seed)
                       for seed in (0, 0, 1))
    assert one.shape == (40, 6) and int(one.max()) < 4
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(one[:32], evaluate.draw_samples(model, 32, 3, torch.device("cpu"), 0))


def test_a_judge_of_other_tokens_weighs_tokens_and_its_error_covers_the_truth():
    """Words of one to three characters under a judge of characters: texts of different lengths. The
    perplexity of 20,000 texts against those of 200 sets of 100: within 1.96 errors in 90 to 99 of
    100 (the spread of that share is 1.5 %: beyond that with one seed in 1,000)."""
    words = make_tokenizer(dict(kind="words", items=["a", "bb", "cab", "c"]))
    model = evaluate.make_judge(judge(4, 30), dict(kind="chars", items=list("abc ")), words)
    x = torch.randint(4, (20_000, 6))
    truth = evaluate.gen_ppl(model, x)[0]
    found = [evaluate.gen_ppl(model, part) for part in x.split(100)]
    assert 0.90 <= sum(abs(v - truth) < 1.96 * se for v, se in found) / 200 <= 0.99
    nats, tokens = model(x[:3])
    assert tokens.tolist() == [len(words.decode(row)) for row in x[:3].tolist()]
    assert nats.shape == (3,) and len(set(tokens.tolist())) > 1


def rows(oracle):
    value = {"valid": 0.5, "contradictions": 1.25, "copies": 0.01} if oracle else dict.fromkeys(
        ("valid", "contradictions", "copies"))
    base = {"gen_ppl": 12.345, "gen_ppl_se": 0.1, "entropy": 3.21, "entropy_se": 0.01,
            "pooled_entropy": 4.04, "pooled_entropy_se": 0.01, "samples": 8, **value}
    return [{"model": "data", "steps": None, **base},
            *[{"model": "teacher", "steps": steps, **base} for steps in (8, 4)],
            {"model": "round 1", "steps": 8, **base}]


def test_table_puts_every_number_under_its_steps():
    """Columns in order of steps, an empty cell where nothing was measured. Exact."""
    lines = evaluate.table(rows(oracle=True)).splitlines()
    assert lines[0].split() == ["steps", "4", "8"]
    assert [line.split() for line in lines[1:4]] == [
        ["data", "12.35", "3.21"], ["50%", "1.25"], ["4.04", "1%"]]
    assert lines[4].split() == ["teacher"] + ["12.35", "3.21"] * 2
    assert lines[7].split() == ["round", "1", "12.35", "3.21"]
    assert len(lines[7]) == len(lines[4]) > len(lines[1])        # round 1 has 8 steps only
    lines = evaluate.table(rows(oracle=False)).splitlines()
    assert [line.split() for line in lines[1:3]] == [["data", "12.35", "3.21"], ["4.04"]]


def test_curve_is_a_png_and_its_absence_is_said(tmp_path, monkeypatch):
    """With matplotlib a picture; without it False and no file. Exact."""
    import sys
    monkeypatch.setitem(sys.modules, "matplotlib", None)         # as if it were not installed
    assert evaluate.draw_curve(rows(True), tmp_path / "curve.png") is False
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert evaluate.draw_curve(rows(True), tmp_path / "curve.png") is True
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_plain_json(tmp_path):
    """Every number of a measured row survives writing and reading. Exact."""
    row = evaluate.measure(torch.tensor([[0, 1, 2], [1, 1, 3]]), evaluate.make_judge(judge()),
                           dataset([[0, 1, 2]]))
    evaluate.write_results(tmp_path / "results.json", {"rows": [row]})
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [row]
    assert row["copies"] == 0.5 and row["valid"] is None
