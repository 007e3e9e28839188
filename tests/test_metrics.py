"""The measures of samples against definitions by hand, slow references and well-kept libraries."""
import functools
import json
import math
import random
import sys
import types

import numpy as np
import pytest
import torch

import toy
from data import dataset as datasets
from data import measures, results
from data.dataset import make_tokenizer, retokenise
from data.files import write_json
from data.processes import Processes
from data.stories import language
from helpers import make_dataset
from model import ModelConfig, Transformer, nll
from tools import metrics

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
    assert measures.mean_se(torch.tensor([1, 2, 3, 6])) == pytest.approx((3, math.sqrt(14 / 12)))
    assert measures.mean_se(torch.tensor([2])) == (2, None)
    assert measures.mean_se(torch.tensor([])) == (None, None)


def test_standard_error_covers_the_truth_in_about_95_of_100_cases():
    """400 means of 30 uniform numbers, within 1.96 errors: 380 expected with a deviation of 4.4;
    360 to 396 is beyond 3.6 deviations, with another seed less than one in 1,000."""
    torch.manual_seed(0)
    pairs = [measures.mean_se(torch.rand(30)) for _ in range(400)]
    assert 360 <= sum(abs(mean - 0.5) < 1.96 * se for mean, se in pairs) <= 396


def test_generative_perplexity_is_the_exponential_of_the_judges_mean_nats():
    """Token by token with full forward passes. float32 logits: 1e-5. No chance in it."""
    model, x = judge(), torch.randint(4, (70, 6), generator=torch.Generator().manual_seed(1))
    nats = torch.zeros(70, dtype=torch.float64)
    for i in range(6):
        start = torch.full((70, 1), 4)
        log_p = model(torch.cat((start, x[:, :i]), 1))[:, -1].double().log_softmax(-1)
        nats -= log_p.gather(1, x[:, i:i + 1])[:, 0].detach() / 6
    value, se = measures.gen_ppl(measures.make_judge(model), x)
    assert value == pytest.approx(nats.mean().exp().item(), rel=1e-5)
    assert se == pytest.approx(value * nats.std().item() / math.sqrt(70), rel=1e-4)


def test_entropy_is_of_each_text_and_pooled_entropy_of_all():
    """Texts of one repeated word each have 0 within a text; texts of four words log 4. Pooled: two
    texts (0001, 0022) have the entropy of 5, 1 and 2 of 8, twice, less the mean of what one text has
    without the other; a text that is there many times has its own. Up to float32: 1e-6."""
    def of(*p):
        return sum(-q * math.log(q) for q in p)
    same = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    assert measures.entropy(same, 4) == pytest.approx((0, 0), abs=1e-6)
    rich = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert measures.entropy(rich, 4)[0] == pytest.approx(math.log(4), abs=1e-6)
    mixed = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 2]])
    alone = of(0.75, 0.25), of(0.5, 0.5)
    assert measures.entropy(mixed, 4)[0] == pytest.approx(sum(alone) / 2)
    value, se = measures.pooled_entropy(mixed, 4)
    assert value == pytest.approx(2 * of(5 / 8, 1 / 8, 2 / 8) - sum(alone) / 2)
    assert se == pytest.approx(abs(alone[0] - alone[1]) / 2)
    assert measures.pooled_entropy(rich[:1].repeat(50, 1), 4) == pytest.approx((math.log(4), 0))
    assert measures.pooled_entropy(mixed[:1], 4) == (pytest.approx(alone[0]), None)


@pytest.mark.parametrize("measure", ["pooled_entropy", "choice_entropy"])
def test_entropies_of_few_and_of_many_texts_agree(measure):
    """2,048 stories together, and in 16 and 8 parts of 128 and 256, whose mean value must be that of
    all: within half an error of all (0.001 and 0.02 nats), which is more than values of the same
    texts differ by chance. Uncorrected, those of 128 are 0.0073 and 0.21 lower. Seed fixed."""
    rng = random.Random(0)
    tokenizer = make_tokenizer(dict(kind="words", items=language.VOCABULARY))
    stories = [language.generate(rng) for _ in range(2048)]
    if measure == "pooled_entropy":
        texts = torch.tensor([tokenizer.encode(" ".join(story)) for story in stories])
        f = functools.partial(measures.pooled_entropy, vocab=tokenizer.vocab)
    else:
        texts = [language.choices(story) for story in stories]
        f = measures.choice_entropy
    value, se = f(texts)
    for n in (128, 256):
        parts = [f(texts[i:i + n])[0] for i in range(0, 2048, n)]
        assert abs(sum(parts) / len(parts) - value) < se / 2


def test_pooled_entropys_standard_error_is_its_spread_over_repetitions():
    """300 sets of 100 texts of 10 words: the estimated error within 15 % of the spread seen, whose
    own deviation is 4 %. With another seed a false alarm has one chance in 5,000."""
    torch.manual_seed(0)
    p = torch.tensor([0.6, 0.2, 0.15, 0.05])
    found = [measures.pooled_entropy(torch.multinomial(p, 1000, True).view(100, 10), 4)
             for _ in range(300)]
    values, errors = torch.tensor(found).T
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)


def test_choice_entropy_adds_up_what_each_choice_varies():
    """By hand: a choice of 2 and 1 texts has that entropy thrice, less twice the mean of what two of
    them have; one that two of three texts made, both alike, 0. Its error, over 400 repetitions of
    500 texts: within 15 %. And a story's own choices: as many as there are sentences and words
    drawn. Seed fixed."""
    texts = [{"hero": "tom", "end": "x"}, {"hero": "mia", "end": "x"}, {"hero": "tom"}]
    whole = math.log(3) - 2 * math.log(2) / 3
    mean = (2 * math.log(2) + 0) / 3
    assert measures.choice_entropy(texts)[0] == pytest.approx(3 * whole - 2 * mean)
    assert measures.choice_entropy(texts[:1] * 9) == pytest.approx((0, 0))
    assert measures.choice_entropy([{}, {}]) == (0, 0)
    generator, p = torch.Generator().manual_seed(0), torch.tensor([0.6, 0.3, 0.1])
    values, errors = [], []
    for _ in range(400):
        drawn = torch.multinomial(p, 1000, replacement=True, generator=generator).view(500, 2)
        chosen = [{"a": a, "b": b} for a, b in drawn.tolist()]
        value, se = measures.choice_entropy(chosen)
        values.append(value)
        errors.append(se)
    assert torch.tensor(values).std().item() == pytest.approx(
        torch.tensor(errors).mean().item(), rel=0.15)
    words = ("one sunny day tom went to the park . he took his red ball along . he met anna under a "
             "tree .").split()
    assert set(language.choices(words)) == {"opening", "WEATHER", "NAME", "PLACE", "thing", "COLOUR",
                                            "THING", "friend", "FRIEND"}
    assert language.choices(words)["FRIEND"] == "anna"


def test_copies_are_the_texts_that_training_holds_word_for_word():
    """A copy at a row's beginning counts, the same words across two rows do not. Exact."""
    data = dataset([[0, 1, 2], [3, 0, 0]])
    x = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 0, 0], [0, 1, 3]])
    assert datasets.copies(x, data).tolist() == [True, False, True, False]
    data.texts = False                                   # rows, but cut out of a long one
    assert datasets.copies(x, data) is None


def test_copies_are_as_many_as_expected_where_stories_are_fresh_whether_likely_or_not():
    """2,000 fresh stories beside 10,000 to train on; and the likeliest half of them, which has about
    twice as many: the share of copies is within 4 standard errors of the expected one (another seed
    fails one time in 8,000). A model that had learned a tenth of its texts by heart shows. A story
    with a fault is expected never, a single possible one always: exact."""
    rng = random.Random(3)
    tokenizer = make_tokenizer(dict(kind="words", items=language.VOCABULARY))

    def told(n):
        return [tokenizer.encode(" ".join(language.generate(rng))) for _ in range(n)]
    data = dataset(told(10_000), "stories", tokenizer)
    fresh = torch.tensor(told(2000))
    log_p = torch.tensor([language.log_prob(tokenizer.decode(row).split()) for row in fresh.tolist()])
    likely = fresh[log_p.argsort(descending=True)[:1000]]
    shares = []
    for x in (fresh, likely):
        row = measures.measure(x, None, data)
        error = math.sqrt(row["copies_expected"] / len(x))
        assert abs(row["copies"] - row["copies_expected"]) < 4 * error
        shares.append(row["copies_expected"])
    assert shares[1] > 1.5 * shares[0] > 0.003
    known = torch.from_numpy(data.train.reshape(-1, 50)[:200].astype(int))
    row = measures.measure(torch.cat((fresh[:1800], known)), None, data)
    error = math.sqrt(row["copies_expected"] / 2000)
    assert row["copies"] - row["copies_expected"] > 10 * error
    law = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
    assert datasets.copies_expected(law, data).tolist() == [0, 1]


def test_oracle_grades_stories():
    """Fresh stories are valid; one with another name in the second sentence is not. Exact."""
    stories = make_tokenizer(dict(kind="words", items=language.VOCABULARY))
    good = [language.generate(random.Random(i)) for i in range(4)]
    bad = [*good[0][:-1], good[0][0]]                # no full stop at the end
    data = dataset([[0] * 50], "stories", stories)
    x = torch.tensor([stories.encode(" ".join(story)) for story in [*good, bad]])
    row = measures.measure(x, measures.make_judge(judge(stories.vocab, 50)), data)
    assert row["valid"] == pytest.approx(0.8) and row["contradictions"] > 0
    assert row["samples"] == 5 and row["copies"] == 0


def test_a_judge_of_other_tokens_weighs_tokens_and_its_error_covers_the_truth():
    """Words of one to three characters under a judge of characters: texts of different lengths. The
    perplexity of 20,000 texts against those of 200 sets of 100: within 1.96 errors in 90 to 99 of
    100 (the spread of that share is 1.5 %: beyond that with one seed in 1,000)."""
    words = make_tokenizer(dict(kind="words", items=["a", "bb", "cab", "c"]))
    model = measures.make_judge(judge(4, 30), dict(kind="chars", items=list("abc ")), words)
    x = torch.randint(4, (20_000, 6))
    truth = measures.gen_ppl(model, x)[0]
    found = [measures.gen_ppl(model, part) for part in x.split(100)]
    assert 0.90 <= sum(abs(v - truth) < 1.96 * se for v, se in found) / 200 <= 0.99
    nats, tokens = model(x[:3])
    assert tokens.tolist() == [len(words.decode(row)) for row in x[:3].tolist()]
    assert nats.shape == (3,) and len(set(tokens.tolist())) > 1


def test_special_tokens_go_from_tokenizer_to_tokenizer_as_such():
    """<end> of ours becomes the other's end, or is left out where there is none; the text between
    is read anew, piece by piece; the word "<end>" in a text stays text. By hand, exact."""
    letters = dict(kind="bpe", pattern=r".", items=[chr(i) for i in range(256)])
    pairs = letters | {"pattern": r"[a-z]+|.", "items": letters["items"] + ["ab"]}
    ours, other = make_tokenizer(letters), make_tokenizer(pairs)
    chars = make_tokenizer(dict(kind="chars", items=list("abc")))
    a, b, c, end, ab = 97, 98, 99, 256, 256
    row = [end, a, b, end, end, b, a, b]
    assert retokenise(row, ours, other) == [257, ab, 257, 257, b, ab]
    assert retokenise(row, ours, chars) == [0, 1, 1, 0, 1]
    assert retokenise([ab, c, 257], other, ours) == [a, b, c, end]
    assert retokenise([0, 1, 2], chars, other) == [ab, c]
    assert retokenise([], ours, other) == [] and retokenise(row, ours, ours) == row
    word = ours.encode("<end>")
    assert len(word) == 5 and retokenise(word, ours, other) == word
    model = judge(258, 8)
    nats, tokens = measures.make_judge(model, pairs, ours)(torch.tensor([row]), skip=3)
    expected = nll(model, torch.tensor([[257, ab, 257, 257, b, ab]]))[0, 2:].sum()
    assert tokens.tolist() == [4] and nats.item() == pytest.approx(expected.item(), rel=1e-5)


def test_perplexity_beyond_what_a_float_holds_is_infinite():
    """Not a traceback: 800 nats a token."""
    assert measures.perplexity(torch.tensor([800.0, 810.0]), torch.tensor([1, 1]))[0] == math.inf


def test_results_are_plain_json(tmp_path):
    """Every number of a measured row survives writing and reading. Exact."""
    row = measures.measure(torch.tensor([[0, 1, 2], [1, 1, 3]]), measures.make_judge(judge()),
                           dataset([[0, 1, 2]]))
    write_json(tmp_path / "results.json", {"rows": [row]})
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [row]
    assert row["copies"] == 0.5 and row["valid"] is None


def test_rows_are_kept_until_texts_or_measures_change(tmp_path, monkeypatch, capsys):
    """What fill_rows finds of the same version stays as it is; of an older one it is measured anew.
    Exact."""
    data = datasets.load_data(make_dataset(tmp_path / "data"), Processes(torch.device("cpu")))
    config = types.SimpleNamespace(samples=4, seed=0, folder=tmp_path)
    found = {"rows": [], "models": {}}
    exam = results.Exam(config, Processes(torch.device("cpu")), data, found, 12, [8],
                        judge=lambda x: (torch.ones(len(x)), torch.ones(len(x))),
                        judged_by="nobody")
    monkeypatch.setattr(results, "summary", lambda row: "")
    results.fill_rows(exam, "data", None, "data")
    row, = found["rows"]
    row["entropy"] = -1.0
    results.fill_rows(exam, "data", None, "data")
    assert found["rows"] == [row]
    monkeypatch.setattr(results, "VERSION", measures.VERSION + 1)
    results.fill_rows(exam, "data", None, "data")
    assert len(found["rows"]) == 1 and found["rows"][0]["entropy"] > 0


# ---- diversity

def texts(n=12, L=20, V=30, seed=0):
    """Random texts, some tokens much more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(V, generator=generator) ** 4
    return torch.multinomial(p, n * L, True, generator=generator).view(n, L)


@pytest.mark.filterwarnings("ignore")                # nltk warns where no 4-gram is shared
def test_self_bleu_is_nltks():
    """The mean of its sentence BLEU against all other texts, without smoothing. Exact in float64:
    1e-9 (where nothing is shared, nltk has 1e-77 for 0)."""
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    for seed in range(3):
        rows = texts(seed=seed).tolist()
        for order, (value, _) in enumerate(metrics.self_bleu(texts(seed=seed)), 1):
            each = [bleu.sentence_bleu(rows[:i] + rows[i + 1:], rows[i], [1 / order] * order)
                    for i in range(len(rows))]
            assert value == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_self_bleu_4_is_sacrebleus():
    """The same of sacrebleu, in its percent. Exact in float64: 1e-9."""
    sacrebleu = pytest.importorskip("sacrebleu")
    bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", effective_order=False)
    rows = [" ".join(map(str, row)) for row in texts().tolist()]
    each = [bleu.sentence_score(row, rows[:i] + rows[i + 1:]).score for i, row in enumerate(rows)]
    assert metrics.self_bleu(texts())[3][0] == pytest.approx(sum(each) / len(each) / 100, abs=1e-9)


def test_errors_of_self_bleu_and_distinct_come_from_leaving_out_each_text():
    """The jackknife with everything computed anew. Exact in float64: 1e-9."""
    x = texts()
    for f in (metrics.self_bleu, metrics.distinct):
        without = [f(torch.cat((x[:i], x[i + 1:]))) for i in range(len(x))]
        for order in range(4):
            values = torch.tensor([w[order][0] for w in without], dtype=torch.float64)
            variance = (len(x) - 1) / len(x) * (values - values.mean()).square().sum()
            assert f(x)[order][1] == pytest.approx(variance.sqrt().item(), abs=1e-9)


def test_texts_that_are_all_the_same_have_self_bleu_1():
    """Also with one text that shares nothing, whose BLEU is 0. Exact."""
    same = torch.arange(8).repeat(4, 1)
    assert [value for value, _ in metrics.self_bleu(same)] == [1, 1, 1, 1]
    other = torch.cat((same, torch.arange(8)[None] + 8))
    assert metrics.self_bleu(other)[3][0] == pytest.approx(4 / 5)


def test_distinct_is_the_share_of_different_n_grams():
    """By hand, two texts. Exact."""
    x = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert [value for value, _ in metrics.distinct(x)] == [4 / 8, 4 / 6, 4 / 4, 2 / 2]


def test_distinct_is_nltks():
    """Against its n-grams, on random text. Exact."""
    nltk = pytest.importorskip("nltk.util")
    x = texts()
    for n, (value, _) in enumerate(metrics.distinct(x), 1):
        grams = [gram for row in x.tolist() for gram in nltk.ngrams(row, n)]
        assert value == len(set(grams)) / len(grams)


def test_repetition_counts_n_grams_that_were_there_before():
    """a b c d a b c d: 5 4-grams, one of them twice; the other text has none. Exact."""
    x = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert metrics.repetition(x)[0] == pytest.approx((1 / 5 + 0) / 2)


@pytest.mark.parametrize("texts_", [True, False])
def test_seen_is_the_share_of_pieces_that_training_holds(texts_, monkeypatch):
    """Against a search by hand, in blocks that cut pieces; where rows are texts, a piece across two
    of them does not count. Exact (two pieces of one hash: 1e-15)."""
    monkeypatch.setattr(metrics, "GRAM", 3)
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(8, (50, 10), generator=generator)
    x = torch.randint(8, (20, 6), generator=generator)
    data = dataset(train.tolist())
    data.texts, data.stride = texts_, 10 if texts_ else None
    runs = train.tolist() if texts_ else [train.flatten().tolist()]
    held = {tuple(run[i:i + 3]) for run in runs for i in range(len(run) - 2)}
    share = sum(tuple(row[i:i + 3]) in held for row in x.tolist() for i in range(4)) / 80
    assert 0 < share < 1 and metrics.seen(x, data)[0] == pytest.approx(share)
    monkeypatch.setattr(metrics, "BLOCK", 20)
    assert metrics.seen(x, data)[0] == pytest.approx(share)
    data.train = data.train[:0]
    assert metrics.seen(x, data) == (None, None)


def test_oracles_log_probability_is_of_valid_stories():
    """The mean over those without fault; without any there is none. Exact."""
    stories = make_tokenizer(dict(kind="words", items=language.VOCABULARY))
    good = [language.generate(random.Random(i)) for i in range(4)]
    data = dataset([[0] * 50], "stories", stories)
    x = torch.tensor([stories.encode(" ".join(story)) for story in good] + [[0] * 50])
    row = measures.measure(x, None, data)
    assert row["log_p"] == pytest.approx(sum(map(language.log_prob, good)) / 4)
    assert row["gen_ppl"] is None
    assert measures.measure(x[-1:].repeat(2, 1), None, data)["log_p"] is None


# ---- the whole on a toy: exact samples, and a model that repeats itself

def toy_judge(p):
    """A judge that knows a joint law, in the form of make_judge."""
    return lambda x, skip=0: (toy.nll(p, x), torch.full((len(x),), x.shape[1]))


def test_generative_perplexity_of_exact_samples_is_exp_of_the_cross_entropy():
    """Under the law itself: exp of its entropy per token, by enumeration; 20,000 samples, within 4
    standard errors: one seed in 16,000."""
    torch.manual_seed(0)
    p, q = toy.joint(3, 4, 0), toy.joint(3, 4, 1)
    for law in (p, q):
        truth = -(p * law.log()).sum() / 4
        value, se = measures.gen_ppl(toy_judge(law), toy.draw(p, 20_000))
        assert abs(value - truth.exp().item()) < 4 * se < 0.05


@pytest.mark.parametrize("measure", ["gen_ppl", "text_ppl", "entropy", "pooled_entropy",
                                     "choice_entropy", "self_bleu", "distinct", "repetition"])
def test_standard_errors_cover_the_truth(measure):
    """200 repetitions of 50 texts of 4 tokens from a law of 3 tokens, of unlike frequency (where an
    entropy is at its maximum, no first-order error is right), and 4 positions: within 1.96 errors
    of the mean of all in 90 to 99 of 100 (the share of a true 95 % spreads by 1.5 %: another seed
    fails one time in 200); of the corrected entropies the law's own, by enumeration. Self-BLEU's and
    distinct-n's error is known to be on the safe side."""
    torch.manual_seed(0)
    p = toy.joint(3, 4, 0)
    for i in range(4):
        p = p * torch.tensor([8.0, 3.0, 1.0]).view([3 if j == i else 1 for j in range(4)])
    p /= p.sum()
    f = {"gen_ppl": lambda x: measures.gen_ppl(toy_judge(p), x),
         "text_ppl": lambda x: measures.mean_se((toy.nll(p, x) / 4).exp()),
         "entropy": lambda x: measures.entropy(x, 3),
         "pooled_entropy": lambda x: measures.pooled_entropy(x, 3),
         "choice_entropy": lambda x: measures.choice_entropy([dict(enumerate(row))
                                                              for row in x.tolist()]),
         "self_bleu": lambda x: metrics.self_bleu(x, 2)[1],
         "distinct": lambda x: metrics.distinct(x, 3)[2],
         "repetition": lambda x: metrics.repetition(x, 2)}[measure]
    found = [f(toy.draw(p, 50)) for _ in range(200)]
    truth = sum(value for value, _ in found) / 200
    margins = torch.stack([p.sum([j for j in range(4) if j != i]) for i in range(4)])    # (4, 3)
    if measure == "pooled_entropy":
        truth = torch.special.entr(margins.mean(0)).sum().item()
    if measure == "choice_entropy":
        truth = torch.special.entr(margins).sum().item()
    share = sum(abs(value - truth) < 1.96 * se for value, se in found) / 200
    assert 0.90 <= share <= (1 if measure in ("self_bleu", "distinct") else 0.99)


def test_mauve_gets_features_of_each_text_and_the_papers_settings(monkeypatch):
    """With a package that only looks: rows of the last hidden state, scaling factor 5, five seeds.
    Exact."""
    calls = []
    fake = types.SimpleNamespace(compute_mauve=lambda **given: (
        calls.append(given), types.SimpleNamespace(mauve=0.5 + 0.1 * given["seed"]))[1])
    monkeypatch.setitem(sys.modules, "mauve", fake)
    model = judge()
    x, y = texts(4, 6, 4), texts(5, 6, 4, seed=1)
    assert metrics.mauve((model, WORDS), x.tolist(), y.tolist(), WORDS)[0] == pytest.approx(0.7)
    assert len(calls) == 5 and {one["mauve_scaling_factor"] for one in calls} == {5}
    wanted = model.norm(model.hidden(y)[:, -1]).detach().numpy()
    assert np.allclose(calls[0]["q_features"], wanted, atol=1e-5)
    assert calls[0]["p_features"].shape == (4, 16)


def test_mauve_tells_like_from_unlike():
    """With the package: texts of one law are more alike than other ones, which repeat a word. No
    chance in it but its own seeds; the two values were 0.998 and 0.008 here."""
    pytest.importorskip("mauve")
    model, x = (judge(), WORDS), texts(120, 6, 4)
    same, unlike = (metrics.mauve(model, x[:60].tolist(), other.tolist(), WORDS, seeds=2,
                                  num_buckets=4)[0]
                    for other in (x[60:], torch.zeros_like(x[60:])))
    assert unlike < 0.5 < same
