"""Bounds and word probabilities against enumeration, on laws small enough for it; the reading of
passages."""
import itertools
import json
import math
import types

import pytest
import torch

import toy
from data.dataset import make_tokenizer
from data.files import UserError
from data.lambada.prepare import parse_lambada
from data.measures import mean_se
from model import ModelConfig, Transformer
from tools import likelihood

V, L = 3, 4


def of_joint(seed=0):
    """A law, its perfect model in the form that likelihood.py asks for, and all sequences."""
    law = toy.joint(V, L, seed)
    model = toy.exact_model(law)
    model.config, model.mask_id = types.SimpleNamespace(causal=False, attention="full"), V
    return law, model, toy.all_sequences(V, L)


def crooked(seed=0):
    """A model whose predictions are no posterior of any law: they depend on the order of reveal."""
    table = torch.randn((V + 1,) * L + (L, V), dtype=torch.float64,
                        generator=torch.Generator().manual_seed(seed))
    model = toy.Model(lambda z, at: table[tuple(z.T)][at])
    model.config, model.mask_id = types.SimpleNamespace(causal=False, attention="full"), V
    return model


@pytest.mark.parametrize("estimate", [likelihood.bound, likelihood.any_order])
@pytest.mark.parametrize("draws", [1, 3])
def test_both_estimates_of_the_perfect_models_bound_are_the_likelihood(estimate, draws):
    """A single text has -log p on average whatever the order of reveal: 20,000 draws for each of
    three, within 4 standard errors (another seed fails one time in 2,600)."""
    torch.manual_seed(0)
    law, model, _ = of_joint()
    for x in ([0, 1, 2, 0], [2, 2, 1, 0], [1, 1, 1, 1]):
        x = torch.tensor([x])
        value, se = mean_se(estimate(model, x.expand(20_000, L), V, draws))
        assert abs(value - toy.nll(law, x).item() / L) < 4 * se < 0.05


@pytest.mark.parametrize("estimate", [likelihood.bound, likelihood.any_order])
def test_both_estimates_of_any_models_bound_agree_with_enumeration(estimate):
    """The mean over all orders of -log p, by enumeration, where the order matters; 20,000 draws,
    within 4 standard errors (another seed fails one time in 8,000)."""
    torch.manual_seed(0)
    model, x = crooked(), torch.tensor([[0, 1, 2, 0]])
    truth = 0.0
    for order in itertools.permutations(range(L)):
        z = torch.full_like(x, V)
        for i in order:
            truth -= model(z)[0, i].log_softmax(-1)[x[0, i]].item() / math.factorial(L) / L
            z[0, i] = x[0, i]
    value, se = mean_se(estimate(model, x.expand(20_000, L), V, 1))
    assert abs(value - truth) < 4 * se < 0.05


@pytest.mark.parametrize("estimate", [likelihood.bound, likelihood.any_order])
def test_standard_errors_of_the_bounds_cover_the_truth(estimate):
    """200 times 60 texts of the law, whose entropy is the truth: within 1.96 errors in 90 to 99 of
    100 (a true 95 % spreads by 1.5 %: another seed fails one time in 200)."""
    torch.manual_seed(0)
    law, model, x = of_joint()
    truth = (law.flatten() * toy.nll(law, x)).sum().item() / L
    found = [mean_se(estimate(model, toy.draw(law, 60), V, 2)) for _ in range(200)]
    assert 0.90 <= sum(abs(v - truth) < 1.96 * se for v, se in found) / 200 <= 0.99


@pytest.mark.parametrize("estimate", [likelihood.bound, likelihood.any_order])
@pytest.mark.parametrize("draws", [1, 8])
@pytest.mark.parametrize("end", ["lowest", "highest", "lowest, then highest"])
def test_bounds_are_numbers_at_the_ends_of_the_random_numbers(estimate, draws, end, monkeypatch):
    """0 and the largest number below 1, for times, masks, or both: in float32 that largest number
    rounded to a time of 0, whose weight 1/t made NaN of a text without masks. Exact."""
    law, model, x = of_joint()
    asked = []

    def ends(*shape, dtype=torch.float32, device=None):
        asked.append(shape)
        if end == "lowest" or end == "lowest, then highest" and len(asked) % 2:
            return torch.zeros(*shape, dtype=dtype)
        return torch.full(*shape if len(shape) == 1 else (shape,),
                          1 - torch.finfo(dtype).eps / 2, dtype=dtype)
    monkeypatch.setattr(torch, "rand", ends)
    assert estimate(model, x, V, draws).isfinite().all() and len(asked) == 2 * draws


def test_any_order_of_the_end_is_the_conditional_likelihood():
    """Of the last two tokens given the first two, for the perfect model: -log p(end | begin) from
    the law. 20,000 draws, within 4 standard errors."""
    torch.manual_seed(0)
    law, model, _ = of_joint()
    x = torch.tensor([[0, 1, 2, 0]])
    truth = (law[0, 1].sum() / law[0, 1, 2, 0]).log().item() / 2
    value, se = mean_se(likelihood.any_order(model, x.expand(20_000, L), V, 1, known=2))
    assert abs(value - truth) < 4 * se < 0.05


# ---- last words

@pytest.mark.parametrize("w", [1, 2, 3, 4])
def test_the_perfect_models_word_has_the_laws_probability(w):
    """-log p(word | passage) for all 81 texts: all orders agree. Exact in float64: 1e-9."""
    law, model, x = of_joint()
    given = law.sum(tuple(range(L - w, L)))              # the passage's own probability
    truth = toy.nll(law, x) + (given[tuple(x[:, :L - w].T)].log() if w < L else 0)
    assert torch.allclose(likelihood.word_nats(model, x, w, V), truth, atol=1e-9)


@pytest.mark.parametrize("w", [2, 3])
def test_a_words_probability_is_the_mean_over_all_orders_of_reveal(w):
    """For a model whose orders disagree: -log of the mean over orders of the product, one text at a
    time. Exact in float64: 1e-9."""
    model = crooked()
    x = toy.all_sequences(V, L)[::7]
    for row, nats in zip(x, likelihood.word_nats(model, x, w, V)):
        each = []
        for order in itertools.permutations(range(L - w, L)):
            z, p = row.clone()[None], 1.0
            z[0, L - w:] = V
            for i in order:
                p *= model(z)[0, i].softmax(-1)[row[i]].item()
                z[0, i] = row[i]
            each.append(p)
        assert nats.item() == pytest.approx(-math.log(sum(each) / len(each)), abs=1e-9)


def test_a_long_word_gets_the_bound(monkeypatch):
    """Beyond LONGEST tokens, not less than -log p: 3 of 4 tokens with LONGEST 2, the perfect model,
    where the bound is -log p on average: 4,000 draws, within 4 standard errors."""
    torch.manual_seed(0)
    monkeypatch.setattr(likelihood, "LONGEST", 2)
    law, model, _ = of_joint()
    x = torch.tensor([[0, 1, 2, 0]])
    truth = (law[0].sum() / law[0, 1, 2, 0]).log().item()
    value, se = mean_se(likelihood.word_nats(model, x.expand(4000, L), 3, V))
    assert abs(value - truth) < 4 * se < 0.05


def test_the_three_protocols_by_hand():
    """Two positions whose likeliest pair is not the pair of likeliest tokens: p(00) = .4, p(11) =
    .35, p(12) = .25. In one pass the second token is 0 and the first 1; left to right 1 comes
    first and then 1; the most certain first is the 1 too (.6 against .4). Then, with p(00) = .3,
    p(10) = .3, p(21) = .4: the second is more certain (.6 for 0) and leaves a tie, left to right
    begins with 2. Exact."""
    def law(table):
        p = torch.full((3, 3), 1e-9, dtype=torch.float64)
        for (i, j), value in table.items():
            p[i, j] = value
        model = toy.exact_model(p / p.sum())
        return lambda protocol: likelihood.complete(model, torch.tensor([[0, 0]]), 2, 3,
                                                    protocol).tolist()
    one = law({(0, 0): 0.4, (1, 1): 0.35, (1, 2): 0.25})
    assert one("one_pass") == [[1, 0]] and one("left") == [[1, 1]] == one("confident")
    two = law({(0, 0): 0.31, (1, 0): 0.29, (2, 1): 0.4})
    assert two("left") == [[2, 1]] and two("confident") == [[0, 0]]
    assert two("one_pass") == [[2, 0]]


def transformer(attention):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(V, 6, 2, 2, 16, attention=attention)).eval()
    for w in model.parameters():                         # far from uniform
        w.data *= 8
    return model


def test_ar_answers_are_its_own_greedy_tokens_and_likelihood():
    """Token by token with full forward passes, 16 texts. float32 logits: 1e-4."""
    model = transformer("causal")
    x = torch.randint(V, (16, 6), generator=torch.Generator().manual_seed(1))
    found = likelihood.answer(model, x, 2)
    for row, right, nats in zip(x, found["left"], found["nats"]):
        given, truth = torch.cat((torch.tensor([V]), row[:4])), 0.0
        said = given
        for i in (4, 5):
            said = torch.cat((said, model(said[None])[0, -1].argmax()[None]))
            truth -= model(given[None])[0, -1].log_softmax(-1)[row[i]].item()
            given = torch.cat((given, row[i][None]))
        assert right.item() == (said[-2:].tolist() == row[-2:].tolist())
        assert nats.item() == pytest.approx(truth, abs=1e-4)
    assert set(found) == {"left", "nats"} and 0 < found["left"].sum() < 16


def test_reveal_attention_reads_the_passage_in_one_order():
    """With attention in the order of reveal the passage comes first, then the word's tokens as they
    are revealed: for 5-token passages, the mean over the word's two orders of products, with masks
    written out by hand. float32 logits: 1e-4."""
    model = transformer("reveal")
    x = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    nats = likelihood.word_nats(model, x, 2, V)
    torch.manual_seed(5)
    order = likelihood.rank_of(model, x, 2)
    assert (order[:, :4] < 1).all() and (order[:, 4:] >= 1).all()
    each = []
    for first, second in ((4, 5), (5, 4)):
        z = x.clone()
        z[:, 4:] = V
        p = model(z, rank=order)[range(3), [first] * 3].log_softmax(-1)[range(3), x[:, first]]
        z[:, first] = x[:, first]
        later = order.clone()
        later[:, first] = 5.0
        q = model(z, rank=later)[range(3), [second] * 3].log_softmax(-1)[range(3), x[:, second]]
        each.append(p + q)
    truth = math.log(2) - torch.logsumexp(torch.stack(each).double(), 0)
    assert torch.allclose(nats, truth, atol=1e-4)


# ---- passages

WORDS = make_tokenizer(dict(kind="words", items="a b c d .".split()))
CHARS = make_tokenizer(dict(kind="chars", items=sorted(set("abcd .\n!'"))))


def test_a_task_ends_with_the_last_word_and_nothing_after_it():
    """Stops are dropped, an apostrophe belongs to the word, a space to the word after it. Exact."""
    assert likelihood.make_tasks(["a b c d ."], WORDS, 9) == [([0, 1, 2], [3])]
    (before, word), = likelihood.make_tasks(["ab cd'a!."], CHARS, 20)
    assert (CHARS.decode(before), CHARS.decode(word)) == ("ab", " cd'a")
    (before, word), = likelihood.make_tasks(["ab\ncd"], CHARS, 20)
    assert (CHARS.decode(before), CHARS.decode(word)) == ("ab\n", "cd")


def test_a_passage_that_is_too_long_is_refused_or_loses_its_beginning():
    """Refused by its number; with cut, the end stays. Exact."""
    with pytest.raises(UserError, match="passage 2 has 4 tokens.*context of 3"):
        likelihood.make_tasks(["a b c", "a b c d"], WORDS, 3)
    assert likelihood.make_tasks(["a b c d"], WORDS, 3, cut=True) == [([1, 2], [3])]


def test_passages_are_paragraphs_of_enough_words():
    """Those with 20 words; without any, a sentence that says so. Exact."""
    long = "word " * 19 + "end."
    assert likelihood.passages(f"short one\n\n{long}\n \n{long}!") == [long, long + "!"]
    with pytest.raises(UserError, match="no passage of 20 words"):
        likelihood.passages("short one\n\nanother")


@pytest.mark.parametrize("line", ["{", '{"words": "a"}', '["a"]', '{"text": 3}', '{"text": "..."}'])
def test_a_bad_line_of_lambada_is_named_by_its_number(line):
    """Exact."""
    good = json.dumps({"text": "a b"}) + "\n\n"
    with pytest.raises(UserError, match="there, line 3: not a JSON object with a \"text\""):
        parse_lambada(good + line + "\n", "there")
    assert parse_lambada(good, "there") == ["a b"]
    with pytest.raises(UserError, match="there has no passages"):
        parse_lambada("\n", "there")


def test_batches_hold_tasks_of_one_shape_and_lose_none():
    """Random tasks: every number once, with its own tokens. Exact."""
    generator = torch.Generator().manual_seed(0)
    tasks = [(torch.randint(4, (int(a),), generator=generator).tolist(), [1] * int(b)) for a, b in
             torch.randint(1, 4, (50, 2), generator=generator)]
    seen = {}
    for numbers, x, w in likelihood.batches(tasks, 5):
        assert len(numbers) <= 5
        seen |= {i: (row[:-w], row[-w:]) for i, row in zip(numbers, x.tolist())}
    assert seen == dict(enumerate(tasks))


def test_last_word_row_has_accuracies_and_perplexity():
    """By hand, two batches. Exact."""
    answers = [{"left": torch.tensor([True, False]), "nats": torch.tensor([0.0, 1.0])},
               {"left": torch.tensor([True]), "nats": torch.tensor([2.0])}]
    row = likelihood.last_word(answers, [([0], [1])] * 2 + [([0], [1] * 6)])
    assert row["left"] == pytest.approx(2 / 3) and row["word_ppl"] == pytest.approx(math.e)
    assert row["one_pass"] is None and (row["tasks"], row["by_bound"]) == (3, 1)


def test_only_a_line_feed_ends_a_line_of_json():
    """U+2028, U+2029, U+0085 and others may stand within a text; CRLF is no text. Exact."""
    text = "one\u2028two\u2029three\x85four\x1cfive six"
    content = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in (text, "a b"))
    assert parse_lambada(content, "x") == [text, "a b"]


@pytest.mark.parametrize("word", ["cafe\u0301", "naïve", "हिन्दी", "don't", "Zoe\u0308's", "well-known"])
def test_the_last_word_keeps_its_combining_marks(word):
    """Composed or not: the task's word is the whole word. Exact."""
    text = f"she said {word}."
    tokenizer = make_tokenizer(dict(kind="chars", items=sorted(set(text))))
    (before, ids), = likelihood.make_tasks([text], tokenizer, 100)
    assert tokenizer.decode(ids) == f" {word}" and tokenizer.decode(before) == "she said"


def test_word_perplexity_beyond_what_a_float_holds_is_infinite():
    """Not a traceback."""
    answers = [{"left": torch.tensor([True, False]), "nats": torch.tensor([900.0, 800.0])}]
    row = likelihood.last_word(answers, [([1], [2])] * 2)
    assert row["word_ppl"] == math.inf and row["left"] == 0.5
