"""The noise, the bound, one reverse step and the sampler, against worlds that can be enumerated.

Wherever chance has a part the seed is fixed, and each test says how often another seed would fail
although the code is right. LIMIT is the chance below which a chi-square test fails.
"""
import itertools
import math
import types

import pytest
import torch

import diffusion
from cache import generate
from data.measures import mean_se
from diffusion import (categorical, nelbo, q_sample, rank_prompt_first, sample, sample_plain,
                       sample_t, sharpen, unmask_step)
from model import ModelConfig, Transformer
from tools.joint import sample_joint
from toy import (Model, all_sequences, ancestral_law, chi_square, count, draw, exact_model, joint,
                 nll)

LIMIT = 1e-6


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def constant(p):
    """A model that predicts the law p (V,) everywhere."""
    return Model(lambda z, at: p.log().expand(int(at.sum()), len(p)))


class watched(Model):
    """The model; each of its calls leaves (z, at) in the list. at (B, L) is true at the positions
    asked about (all, where a call names none); of a call with one row for all B there are B rows,
    and nothing is known of which asks where."""

    def __init__(self, model, calls, B=None):
        super().__init__(self.asked)
        self.model, self.calls, self.B = model, calls, B

    def asked(self, z, at):
        self.calls.append((z.clone(), at.clone()))
        return self.model.f(z, at)

    def hidden(self, z, at=None, rank=None):
        seen = z.expand(self.B or len(z), -1)
        asked = torch.ones_like(seen, dtype=torch.bool)
        if at is not None and len(z) == len(seen):
            asked = torch.zeros_like(asked)
            asked[at] = True
        self.calls.append((seen.clone(), asked))
        return self.model.hidden(z, at)


def revelations(calls, x, mask_id):
    """What each call opened, bool (B, L) each: masked when it was made, but not at the next one,
    nor in the result x. All of it was asked about."""
    after = [z for z, _ in calls[1:]] + [x]
    opened = [(z == mask_id) & (later != mask_id) for (z, _), later in zip(calls, after)]
    assert all(bool((at | ~o).all()) for (_, at), o in zip(calls, opened))
    return opened


def within_5_sd(hits, n, p):
    """n trials of chance p (0 < p < 1) gave a likely number of hits: 1 in 1.7 million is not."""
    return abs(int(hits) - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def marginals(joint):
    """p(x_i = v) for each position, (L, V)."""
    L = joint.dim()
    return torch.stack([joint.sum([j for j in range(L) if j != i]) for i in range(L)])


# ---- the noise

def test_sample_t_has_one_time_in_each_cell():
    """One t in each of the B cells (i/B, (i + 1)/B], all at the same place of their cell. Cells are
    widened by 1e-6 for rounding (float32 near 1: 6e-8). No false alarm."""
    for B in (1, 7, 64):
        for _ in range(100):
            t = sample_t(B).sort().values
            inside = t * B - torch.arange(B)
            assert t.shape == (B,) and t.min() > 0 and t.max() <= 1
            assert inside.min() > -1e-6 * B and inside.max() < 1 + 1e-6 * B
            assert inside.max() - inside.min() < 1e-6 * B


def test_each_time_is_uniform_on_its_own():
    """The first and the last t of a batch over 4,000 batches, in 20 cells. Chi-square: two in a
    million with another seed."""
    times = torch.stack([sample_t(8) for _ in range(4000)])
    for t in (times[:, 0], times[:, -1]):
        counts = torch.bincount((t * 20).ceil().long() - 1, minlength=20)
        assert chi_square(counts, torch.full((20,), 1 / 20)) > LIMIT


@pytest.mark.parametrize("u", [0.0, 1 - 2 ** -24])
def test_times_are_above_0_and_at_most_1_at_the_ends_of_the_random_numbers(monkeypatch, u):
    """The smallest and the largest number that torch.rand can give: t = 0 would have an infinite
    weight. No chance involved."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.full(shape, u))
    for B in (1, 8, 100):
        assert sample_t(B).min() > 0 and sample_t(B).max() <= 1


def test_q_sample_masks_a_share_t_and_leaves_the_others():
    """t per sequence, also 0 and 1. Within 5 standard deviations for three values of t: two in a
    million with another seed."""
    x = torch.randint(9, (5, 100_000))
    t = torch.tensor([0.0, 0.01, 0.3, 0.9, 1.0])
    z = q_sample(x, t, 9)
    masked = z == 9
    assert torch.equal(z[~masked], x[~masked])
    assert not masked[0].any() and masked[4].all()
    for i in (1, 2, 3):
        assert within_5_sd(masked[i].sum(), 100_000, float(t[i]))


def test_q_sample_masks_positions_and_sequences_independently():
    """All 16 patterns of two positions in two sequences. Chi-square: one in a million with another
    seed."""
    z = q_sample(torch.zeros(20_000, 2, dtype=torch.long), torch.full((20_000,), 0.4), 1)
    masks = all_sequences(2, 4).sum(1)
    p = 0.4 ** masks * 0.6 ** (4 - masks)
    assert chi_square(count(z.view(-1, 4), 2), p) > LIMIT


# ---- the bound

def test_nelbo_of_a_uniform_model_is_log_V():
    """Within 3 %. A token masked at time t counts 1/t, so one token at t below 1/(0.03 n) is enough
    for an alarm, n = 2^24 tokens: chance 1 / (2 n 0.03^2), for each V one in 30,000 with another
    seed. The sum of the others has a standard deviation below sqrt(17 / n) = 0.1 %."""
    for V in (2, 5):
        model = constant(torch.full((V,), 1 / V))
        total = sum(float(nelbo(model, torch.randint(V, (2 ** 18, 8)), V)) for _ in range(8))
        assert total / 8 == pytest.approx(math.log(V), rel=0.03)


@pytest.mark.parametrize("which, error", [("likeliest", 0.05), ("unlikeliest", 0.15),
                                          ("data", 0.05)])
def test_nelbo_of_the_exact_posterior_is_the_negative_log_likelihood(which, error):
    """For one sequence, and on average over data, where it is the entropy; in nats per token. As
    above, a single token that costs c nats when it is the last mask is enough for an alarm, with
    chance c^2 / (2 n error^2), n = 2^22: the mean of c^2 is 0.04, 18 and 1.06, so that another seed
    fails once in 500,000, 10,000 and 20,000 times."""
    p = joint(3, 4, seed=0)
    if which == "data":
        x, expected = draw(p, 2 ** 20), float(-(p * p.log()).sum() / 4)
    else:
        best = p.argmax() if which == "likeliest" else p.argmin()
        x = all_sequences(3, 4)[best].expand(2 ** 20, 4)
        expected = float(nll(p, x[:1]) / 4)
    bound = float(nelbo(exact_model(p), x, 3))
    assert bound == pytest.approx(expected, abs=error)
    product = float(-marginals(p)[torch.arange(4), x].log().mean())
    assert abs(product - expected) > 2 * error   # so a model without context would be noticed


def test_nelbo_weights_by_1_over_t_and_divides_by_all_tokens():
    """The same noise again, summed by hand in float64, to 1e-5 (nelbo: float32). No false alarm."""
    x, logits = torch.randint(5, (6, 7)), torch.randn(6, 7, 5)
    torch.manual_seed(1)
    value = nelbo(Model(lambda z, at: logits[at]), x, 5)
    torch.manual_seed(1)
    t = sample_t(6)
    z = q_sample(x, t, 5)
    total = 0.0
    for b in range(6):
        for i in range(7):
            if z[b, i] == 5:
                row = logits[b, i].double().exp()
                total -= math.log(row[x[b, i]] / row.sum()) / float(t[b])
    assert 0 < int((z == 5).sum()) < 42
    assert float(value) == pytest.approx(total / 42, rel=1e-5)


def test_nelbo_asks_the_model_about_the_masks_of_q_sample_only():
    """And only once. No chance involved."""
    calls, x = [], torch.randint(3, (4, 10))
    nelbo(watched(constant(torch.full((3,), 1 / 3)), calls), x, 3)
    [(z, at)] = calls
    assert torch.equal(at, z == 3) and torch.equal(z[~at], x[~at])


# ---- the bound where some tokens are given

def test_q_sample_never_masks_what_is_given_and_the_rest_as_before():
    """Anywhere in the text. The same seed: z is what it would be, but for what is given. Exact."""
    x, keep, t = torch.randint(9, (50, 40)), torch.rand(50, 40) < 0.3, torch.rand(50)
    torch.manual_seed(1)
    free = q_sample(x, t, 9)
    torch.manual_seed(1)
    z = q_sample(x, t, 9, keep)
    assert torch.equal(z, torch.where(keep, x, free)) and bool((free == 9)[keep].any())


def nll_given(joint, x, kept):
    """-log p(the others | the tokens at the positions `kept`) of each of x (B, L): (B,)."""
    if not kept:
        return nll(joint, x)
    others = [i for i in range(joint.dim()) if i not in kept]
    return nll(joint, x) + joint.sum(others)[x[:, kept].unbind(1)].log()


@pytest.mark.parametrize("kept", [[], [0], [0, 1], [0, 1, 2], [1, 3]])
def test_nelbo_of_the_rest_is_the_conditional_likelihood(cosine, kept):
    """Of the exact posterior and 2^19 texts, whose mean of -log p(the others | those given) comes
    from enumeration, in nats per token of the others. With the cosine schedule a token's
    contribution has a standard deviation of twice its cost (with 1/t it is infinite): the error is
    0.003 at most, the alarm at 0.015, one in a million with another seed. What divides by all
    tokens, or does not look at what is given, is further off."""
    p = joint(3, 4, seed=0)
    x = draw(p, 2 ** 19)
    keep = torch.zeros(x.shape, dtype=torch.bool)
    keep[:, kept] = True
    left = 4 - len(kept)
    expected = float(nll_given(p, x, kept).mean() / left)
    assert float(nelbo(exact_model(p), x, 3, keep)) == pytest.approx(expected, abs=0.015)
    if kept:
        blind = -marginals(p)[torch.arange(4), x].log()[~keep].mean()
        assert abs(expected * left / 4 - expected) > 0.1 and abs(float(blind) - expected) > 0.05


def test_nelbo_of_prompts_of_several_lengths_counts_every_other_token_once(cosine):
    """0 to 3 tokens of each text are given: the sum of all texts' conditional costs, divided by the
    number of all that is not given. As above: one in a million with another seed."""
    p = joint(3, 4, seed=0)
    x, lengths = draw(p, 2 ** 19), torch.randint(4, (2 ** 19,))
    total = sum(nll_given(p, x[lengths == n], list(range(n))).sum() for n in range(4))
    keep = torch.arange(4) < lengths[:, None]
    expected = float(total / (4 - lengths).sum())
    assert float(nelbo(exact_model(p), x, 3, keep)) == pytest.approx(expected, abs=0.015)


def test_nelbo_of_the_rest_weights_by_1_over_t_and_asks_about_no_given_token():
    """The same noise again, summed by hand in float64, to 1e-5 (nelbo: float32), and divided by the
    tokens that are not given. The network sees these, and is asked about masks alone. No false
    alarm."""
    x, keep, logits = torch.randint(5, (6, 7)), torch.rand(6, 7) < 0.4, torch.randn(6, 7, 5)
    calls = []
    torch.manual_seed(1)
    value = nelbo(watched(Model(lambda z, at: logits[at]), calls), x, 5, keep)
    torch.manual_seed(1)
    t = sample_t(6)
    z = q_sample(x, t, 5, keep)
    log_p = logits.double().log_softmax(-1).gather(2, x[..., None])[..., 0]
    total = -(log_p / t.double()[:, None])[z == 5].sum()
    [(seen, at)] = calls
    assert torch.equal(seen, z) and torch.equal(at, z == 5) and not at[keep].any() and at.any()
    assert float(value) == pytest.approx(float(total / (~keep).sum()), rel=1e-5)


def test_ranks_put_what_is_given_first_both_parts_in_random_order():
    """Of 4 positions the second and the last are given: 2 x 2 orders, equally likely. Chi-square:
    one in a million with another seed."""
    keep = torch.tensor([False, True, False, True]).expand(20_000, 4)
    order = rank_prompt_first(keep).argsort(1)
    assert keep[0][order[:, :2]].all() and not keep[0][order[:, 2:]].any()
    kinds = 2 * (order[:, 0] == 1) + (order[:, 2] == 0)
    assert chi_square(torch.bincount(kinds, minlength=4), torch.full((4,), 1 / 4)) > LIMIT


# ---- one draw

def test_categorical_follows_the_softmax_and_never_draws_minus_infinity():
    """Impossible tokens first, in the middle and last. Chi-square: one in a million with another
    seed; chi_square refuses any draw of a token that cannot occur."""
    logits = torch.tensor([-math.inf, 0.5, -1.0, -math.inf, 2.0, -3.0, -math.inf])
    ids = categorical(logits.expand(1000, 40, 7))
    assert ids.shape == (1000, 40)
    assert chi_square(torch.bincount(ids.flatten(), minlength=7), logits.softmax(0)) > LIMIT


def test_categorical_draws_rows_independently_and_each_from_its_own_logits():
    """Pairs of rows with different laws, 3 x 3 cells. Chi-square: one in a million with another
    seed."""
    p = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    pairs = categorical(p.log().expand(20_000, 2, 3))
    assert chi_square(count(pairs, 3), p[0, :, None] * p[1]) > LIMIT


@pytest.mark.parametrize("u", [0.0, 1 - 2 ** -53])
def test_categorical_never_draws_minus_infinity_at_the_ends_of_the_random_numbers(monkeypatch, u):
    """The smallest and the largest float64 that torch.rand can give, for 1,000 laws whose first and
    last tokens are impossible. No chance involved but in the laws."""
    logits = torch.randn(1000, 9)
    logits[:, [0, -1]] = -math.inf
    monkeypatch.setattr(torch, "rand", lambda shape, dtype=torch.float32, device=None:
                        torch.full(shape, u, dtype=dtype))
    ids = categorical(logits)
    assert ids.min() >= 1 and ids.max() <= 7


def test_categorical_reaches_a_token_of_probability_1e_10(monkeypatch):
    """It lies between 0.4 and 0.4 + 1e-10 of the cumulative sum: float32 has no number in between
    (arXiv 2409.02908), so neither the sum nor the random number may be rounded to it. No chance
    involved."""
    p = torch.tensor([0.4, 1e-10, 0.6 - 1e-10], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda shape, dtype=torch.float32, device=None:
                        torch.full(shape, 0.4 + 0.5e-10, dtype=dtype))
    assert categorical(p.log()) == 1


def test_tokens_of_probability_1e_6_appear_at_their_rate_at_1024_steps():
    """100 such tokens, 2^19 positions: 52 are expected. Poisson, at least 21 and at most 94: one in
    three million with another seed. Where a step draws from {token or stay masked} in float32, such
    a token has 1e-9 per step and never appears."""
    p = torch.full((101,), 1e-6, dtype=torch.float64)
    p[50] = 1 - 1e-4
    x = sample(constant(p), torch.full((4096, 128), 101), 1024, 101)
    assert 21 <= int((x != 50).sum()) <= 94


def test_sharpen_with_1_and_1_changes_nothing():
    """Bit for bit, also where one token leaves 1e-43 to the others. No chance involved."""
    logits = torch.randn(50, 9)
    logits[0, 4] = 100.0
    assert torch.equal(sharpen(logits, 1.0, 1.0), logits)


def test_temperature_is_a_power_of_the_probabilities():
    """p^(1/T), normalised, to 1e-6 (float32). No chance involved."""
    p = torch.randn(50, 9).softmax(1)
    for T in (0.5, 0.7, 2.0):
        expected = p ** (1 / T) / (p ** (1 / T)).sum(1, keepdim=True)
        assert torch.allclose(sharpen(p.log(), T).softmax(1), expected, atol=1e-6)


@pytest.mark.parametrize("top_p, kept", [(0.01, [2]), (0.49, [2]), (0.51, [0, 2]), (0.79, [0, 2]),
                                         (0.81, [0, 2, 4]), (0.96, [0, 1, 2, 4]),
                                         (0.999, [0, 1, 2, 3, 4])])
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, kept):
    """By hand; the law keeps its proportions inside, and rows do not mix. No chance involved."""
    p = torch.tensor([0.3, 0.03, 0.5, 0.02, 0.15])                   # sorted: .5 .8 .95 .98 1
    both = torch.stack((p, p.flip(0))).log()
    q = sharpen(both, top_p=top_p).softmax(1)
    expected = torch.zeros(5)
    expected[kept] = p[kept] / p[kept].sum()
    assert torch.allclose(q, torch.stack((expected, expected.flip(0))), atol=1e-6)
    assert torch.equal(q[0] > 0, expected > 0)


def test_temperature_comes_before_top_p():
    """At T = 1/2 the law .5 .3 .2 is .66 .24 .11, so that 0.6 keeps one token instead of two. No
    chance involved."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert (sharpen(logits, 1.0, 0.6).softmax(0) > 0).sum() == 2
    assert (sharpen(logits, 0.5, 0.6).softmax(0) > 0).sum() == 1


# ---- one reverse step

def test_unmask_step_reveals_a_share_of_the_masks_per_sequence():
    """(t - s) / t of them, t and s per sequence; nothing at t = 0 or t = s, everything at s = 0.
    Within 5 standard deviations for three pairs: two in a million with another seed."""
    t = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.8, 0.03])
    s = torch.tensor([0.0, 0.5, 0.0, 0.9, 0.2, 0.01])
    z = torch.full((6, 100_000), 2)
    z_s, revealed, _ = unmask_step(constant(torch.tensor([0.7, 0.3])), z, t, s, 2)
    reveal = z_s != 2
    assert torch.equal(reveal.nonzero(), torch.stack(revealed, 1))
    assert not reveal[0].any() and not reveal[1].any() and reveal[2].all()
    for i in (3, 4, 5):
        assert within_5_sd(reveal[i].sum(), 100_000, float((t[i] - s[i]) / t[i]))


def test_unmask_step_changes_no_revealed_token_and_asks_only_where_it_opens():
    """One call, at the positions it returns; its logits are those the tokens were drawn from, here
    all weight on one token that differs by position. The input stays as it was. No false alarm."""
    calls, before = [], torch.randint(4, (8, 50))                    # id 3 is the mask
    right = torch.randint(3, (8, 50))
    sure = torch.nn.functional.one_hot(right, 3).double().log()      # 0 or -inf, (8, 50, 3)
    z = before.clone()
    model = watched(Model(lambda z, at: sure[at]), calls)
    z_s, revealed, logits = unmask_step(model, z, torch.rand(8), torch.zeros(8) + 1e-3, 3)
    [(seen, at)] = calls
    reveal = torch.zeros(8, 50, dtype=torch.bool)
    reveal[revealed] = True
    assert torch.equal(z, before) and torch.equal(seen, before) and torch.equal(at, reveal)
    assert reveal.any() and torch.equal(logits, sure[reveal])
    assert (before[reveal] == 3).all() and torch.equal(z_s[~reveal], before[~reveal])
    assert torch.equal(z_s[reveal], right[reveal])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_plain_loop_of_unmask_steps_has_the_ancestral_law(steps):
    """From t = 1 to 0, over all 27 sequences. Chi-square: one in a million per case with another
    seed. Few steps are far from the joint, which this many samples would show."""
    p = joint(3, 3, seed=1)
    z, model = torch.full((20_000, 3), 3), exact_model(p)
    z = sample_plain(model, z, steps, 3)
    assert chi_square(count(z, 3), ancestral_law(p, steps)) > LIMIT
    assert chi_square(count(z, 3), p) < LIMIT


# ---- another noise schedule: the pair of functions that a fork would write

@pytest.fixture
def cosine(monkeypatch):
    """alpha_t = cos(pi t / 2), as 1 - alpha_t = 2 sin^2(pi t / 4), and minus its derivative."""
    monkeypatch.setattr(diffusion, "mask_share", lambda t: 2 * torch.sin(math.pi / 4 * t) ** 2)
    monkeypatch.setattr(diffusion, "mask_rate",
                        lambda t: math.pi / 2 * torch.sin(math.pi / 2 * t))


def test_q_sample_masks_the_share_of_the_schedule(cosine):
    """At t = 1/3, 1 - cos(pi / 6) = 0.134 instead of a third. Five standard deviations: one in two
    million with another seed."""
    z = q_sample(torch.zeros((1, 100_000), dtype=torch.long), torch.tensor([1 / 3]), 1)
    assert within_5_sd(int(z.sum()), 100_000, 1 - math.cos(math.pi / 6))


def test_bound_of_the_exact_posterior_is_the_entropy_under_another_schedule(cosine):
    """The bound does not depend on the schedule, if its weight is that schedule's. With 1/t it would
    be 0.5 away. The standard error is 0.0007 (2^20 texts; the weight times the share has a finite
    variance here), an alarm at 0.005: never with another seed."""
    p = joint(3, 4, seed=0)
    entropy = float(-(p * p.log()).sum() / 4)
    x = draw(p, 2 ** 20)
    assert float(nelbo(exact_model(p), x, 3)) == pytest.approx(entropy, abs=0.005)


@pytest.mark.parametrize("sampler", [sample, sample_joint, sample_plain])
def test_samplers_have_the_law_of_another_schedule(cosine, sampler):
    """2 steps on 3 positions: a position is revealed in the first with chance
    cos(pi / 4) = 0.71, and all three forms of the sampler have the law that enumeration gives.
    Chi-square: one in a million each with another seed; equal steps would show."""
    p = joint(3, 3, seed=1)
    z, model = torch.full((20_000, 3), 3), exact_model(p)
    z = sampler(model, z, 2, 3)
    first = math.cos(math.pi / 4)
    chance = torch.tensor([first, 1 - first], dtype=torch.float64)
    assert chi_square(count(z, 3), ancestral_law(p, 2, chance)) > LIMIT
    assert chi_square(count(z, 3), ancestral_law(p, 2)) < LIMIT


# ---- the sampler

def test_many_steps_reproduce_the_joint():
    """All 81 sequences, 40,000 samples, 80 batches, since the sequences of one share how many open
    at once. Chi-square: one in a million with another seed; that two of 4 positions open in the
    same of 1,000 steps adds about 1 to a chi-square of 80."""
    p = joint(3, 4, seed=0)
    model = exact_model(p)
    x = torch.cat([sample(model, torch.full((500, 4), 3), 1000, 3) for _ in range(80)])
    assert chi_square(count(x, 3), p) > LIMIT


def test_one_step_gives_the_product_of_marginals():
    """And not the joint. Chi-square over all 81 sequences: one in a million with another seed."""
    p = joint(3, 4, seed=0)
    a, b, c, d = marginals(p)
    product = torch.einsum("a,b,c,d->abcd", a, b, c, d)
    counts = count(sample(exact_model(p), torch.full((40_000, 4), 3), 1, 3), 3)
    assert chi_square(counts, product) > LIMIT
    assert chi_square(counts, p) < LIMIT


def test_few_steps_have_the_ancestral_law():
    """2 steps on 3 positions, all 27 sequences, the same law as the chain of unmask_steps.
    Chi-square: one in a million with another seed."""
    p = joint(3, 3, seed=1)
    counts = count(sample(exact_model(p), torch.full((20_000, 3), 3), 2, 3), 3)
    assert chi_square(counts, ancestral_law(p, 2)) > LIMIT
    assert chi_square(counts, p) < LIMIT


def test_more_steps_than_masks_have_the_ancestral_law():
    """4 steps on 3 positions. Chi-square over 27 sequences: one in a million with another seed."""
    p = joint(3, 3, seed=1)
    x = sample(exact_model(p), torch.full((20_000, 3), 3), 4, 3)
    assert chi_square(count(x, 3), ancestral_law(p, 4)) > LIMIT


def test_infilling_follows_the_posterior_of_the_prompt():
    """The prompt is in the middle, x_1 = 2; many steps. Chi-square over the 27 others: one in a
    million with another seed."""
    p = joint(3, 4, seed=0)
    model, z = exact_model(p), torch.tensor([3, 2, 3, 3])
    x = torch.cat([sample(model, z.expand(200, 4), 1000, 3) for _ in range(50)])
    assert (x[:, 1] == 2).all()
    assert chi_square(count(x[:, [0, 2, 3]], 3), p[:, 2]) > LIMIT


def test_samples_of_one_position_follow_the_softmax():
    """L = 1, at 1 step and at 64. Chi-square: two in a million with another seed."""
    p = torch.tensor([0.05, 0.6, 0.0, 0.35])
    for steps in (1, 64):
        x = sample(constant(p), torch.full((20_000, 1), 4), steps, 4)
        assert chi_square(count(x, 4), p) > LIMIT


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 9, 1000])
def test_sample_opens_each_mask_once_and_changes_nothing_else(steps):
    """With a prompt in other places of each row: each call is asked about masks only, at least one,
    all still masked; earlier tokens stay; no mask is left; the input stays as it was. There are at
    most as many calls as steps, or as masks in a row if those are fewer. No false alarm."""
    calls, B, L, n = [], 6, 12, 8
    open_first = torch.rand(B, L).argsort(1) < n                     # n masks in each row
    before = torch.where(open_first, 5, torch.randint(5, (B, L)))
    z = before.clone()
    x = sample(watched(constant(torch.full((5,), 0.2)), calls), z, steps, 5)
    assert torch.equal(z, before)
    assert torch.equal(x[~open_first], before[~open_first]) and x.max() < 5 and x.min() >= 0
    opened = torch.zeros(B, L, dtype=torch.long)
    for (seen, _), at in zip(calls, revelations(calls, x, 5)):
        assert at.any()
        assert torch.equal(seen == 5, open_first & (opened == 0))
        assert torch.equal(seen[seen != 5], x[seen != 5])
        opened += at
    assert torch.equal(opened, open_first.long())
    assert len(calls) <= min(steps, n)


def chances_of_steps(n, steps):
    """The chances (n + 1,) that 0, 1, ..., n of so many steps open something, of n masks that each
    open in one of them: mask by mask, in a step that opens something already, or in a new one."""
    p = torch.zeros(n + 1, dtype=torch.float64)
    p[0] = 1
    used = torch.arange(n + 1)
    for _ in range(n):
        p = p * used / steps + (p * (steps - used) / steps).roll(1)
    return p


def test_the_network_is_called_as_often_as_the_longest_text_has_steps_that_open_something():
    """The mean of 200 runs, against that of the largest of 3 independent texts with 8 masks each.
    Within 5 standard errors for five cases: three in a million with another seed."""
    model, z = constant(torch.tensor([0.5, 0.5])), torch.full((3, 8), 2)
    for steps in (3, 8, 9, 16, 100):
        numbers = []
        for _ in range(200):
            calls = []
            sample(watched(model, calls, 3), z, steps, 2)
            numbers.append(len(calls))
        numbers = torch.tensor(numbers).double()
        # P(largest > k), added up over k
        expected = float((1 - chances_of_steps(8, steps).cumsum(0) ** 3).sum())
        error = float(numbers.std()) / math.sqrt(200)
        assert abs(float(numbers.mean()) - expected) <= 5 * error + 1e-3, steps


def test_one_row_is_computed_for_all_while_all_are_masks():
    """The first call, of free text; not where there are prompts. Each row has positions of its own
    there. No false alarm: 16 rows agree once in 10^14."""
    prompts = torch.full((16, 8), 5)
    prompts[:, 0] = 1
    for z, first in ((torch.full((16, 8), 5), 1), (prompts, 16)):
        asked, model = [], constant(torch.full((5,), 0.2))
        hidden = model.hidden
        model.hidden = lambda z, at: asked.append((len(z), at)) or hidden(z, at)
        sample(model, z, 2, 5)
        assert [rows for rows, at in asked] == [first, 16]
        assert asked[0][1][1].numel() >= 16                  # positions of all rows together


def test_one_position_is_computed_for_all_where_all_looks_the_same():
    """The first call only, of a text of masks only; then the same tokens as without. No chance
    involved: the same seed."""
    model, shapes = constant(torch.full((5,), 0.2)), []
    hidden = model.hidden
    model.hidden = lambda z, at=None, rank=None: shapes.append(z.shape) or hidden(z, at)
    texts, z = [], torch.full((16, 8), 5)
    for relative in (True, False):
        model.config = types.SimpleNamespace(attention="full", masks_alike=relative)
        torch.manual_seed(1)
        texts.append(sample(model, z, 2, 5))
    assert shapes == [(1, 1), (16, 8), (1, 8), (16, 8)] and torch.equal(*texts)
    model.config.masks_alike, z[:, 3] = True, 2
    sample(model, z, 2, 5)
    assert shapes[4] == (16, 8)                          # a prompt


def test_nothing_masked_calls_no_network():
    """And the text comes back. No chance involved."""
    def never(z, at):
        raise AssertionError("called")
    x = torch.randint(5, (3, 7))
    for steps in (1, 100):
        assert torch.equal(sample(Model(never), x, steps, 5), x)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_each_mask_opens_in_a_step_of_its_own_choice(steps):
    """So how many open in a step is binomial. A step that opens nothing of a text is not seen, so
    the order, ties included, of 3 masks around a prompt is compared with that of all steps^3
    equally likely choices; in pairs of texts of one batch, which must be independent. Chi-square
    over 7^2 or 13^2 pairs of orders: one in a million per case with another seed."""
    def rank(steps):
        return tuple(sorted(set(steps)).index(step) for step in steps)
    chances = {}
    for choice in itertools.product(range(steps), repeat=3):
        chances[rank(choice)] = chances.get(rank(choice), 0) + steps ** -3
    kinds = list(chances)
    calls, z = [], torch.tensor([2, 2, 0, 2]).expand(20_000, 4)
    x = sample(watched(constant(torch.tensor([0.5, 0.5])), calls, 20_000), z, steps, 2)
    assert len(calls) == min(steps, 3)
    step = sum(i * at for i, at in enumerate(revelations(calls, x, 2)))[:, [0, 1, 3]]
    kind = torch.tensor([kinds.index(rank(row)) for row in step.tolist()]).view(-1, 2)
    p = torch.tensor(list(chances.values()))
    assert chi_square(count(kind, len(kinds)), torch.outer(p, p)) > LIMIT


def test_with_very_many_steps_each_text_opens_one_mask_at_a_time_in_an_order_of_its_own():
    """6 x 6 orders of 3 masks in two sequences, at a billion steps. Chi-square: one in a million
    with another seed; and three in a million that two masks open in the same step, in any of 1,000
    runs."""
    model, z = constant(torch.tensor([0.5, 0.5])), torch.full((2, 3), 2)
    orders = list(itertools.permutations(range(3)))
    counts = torch.zeros(6, 6)
    for _ in range(1000):
        calls = []
        x = sample(watched(model, calls, 2), z, 10 ** 9, 2)
        revealed = revelations(calls, x, 2)
        assert len(calls) == 3 and all((at.sum(1) == 1).all() for at in revealed)
        first, second = zip(*[at.long().argmax(1).tolist() for at in revealed])
        counts[orders.index(first), orders.index(second)] += 1
    assert chi_square(counts, torch.full((36,), 1 / 36)) > LIMIT


@pytest.mark.parametrize("steps", [8, 16])
def test_standard_errors_cover_the_truth_with_more_steps_than_masks(steps):
    """400 times 4 batches of 32 texts of 4 tokens, all alike in every second text of the law: the
    mean of -log p, and the share of texts that are all alike, within 1.96 errors of their exact
    means in 90 to 99 of 100. (A true 95 % spreads by 1.1 %: another seed fails one time in 10,000.
    If the texts of a batch shared how many masks open in a step, it would be 73 to 82 %.)"""
    law = joint(3, 4, seed=0) / 2
    for v in range(3):
        law[v, v, v, v] += 1 / 6
    x, model, z = all_sequences(3, 4), exact_model(law), torch.full((32, 4), 3)
    p = ancestral_law(law, steps)

    def values(x):
        """(n, 2): -log p of each text, and whether it is all alike."""
        return torch.stack((nll(law, x), (x == x[:, :1]).all(1).double()), 1)
    truth = p @ values(x)
    covered = torch.zeros(2)
    for _ in range(400):
        found = values(torch.cat([sample(model, z, steps, 3) for _ in range(4)]))
        for i in range(2):
            mean, se = mean_se(found[:, i])
            covered[i] += abs(mean - truth[i]) < 1.96 * se
    assert (covered >= 0.90 * 400).all() and (covered <= 0.99 * 400).all()


def test_sample_draws_with_the_function_it_is_given():
    """An argmax takes the likeliest token everywhere. No chance involved."""
    x = sample(constant(torch.tensor([0.2, 0.3, 0.5])), torch.full((4, 20), 3), 5, 3,
               draw=lambda logits: logits.argmax(-1))
    assert (x == 2).all()


def test_uneven_numbers_of_masks_are_refused():
    """ValueError, before the network is called. No chance involved."""
    with pytest.raises(ValueError, match="same number of masks"):
        sample(None, torch.tensor([[0, 3, 3], [0, 1, 3]]), 4, 3)


# ---- numbers that are not finite

@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_categorical_gives_the_mask_where_a_row_has_no_law(bad):
    """V for a row with NaN or +infinity, or without any token; the other rows draw as before, from
    the same random numbers. Exact."""
    logits = torch.randn(5, 7)
    torch.manual_seed(0)
    expected = categorical(logits.clone())
    logits[1, 3], logits[3] = bad, -torch.inf
    torch.manual_seed(0)
    ids = categorical(logits)
    assert ids[[1, 3]].tolist() == [7, 7] and torch.equal(ids[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.parametrize("attention", ["full", "reveal", "causal", "joint"])
def test_sampler_that_meets_nan_says_so(attention):
    """Every sampler, of a network with one weight that is NaN. No false alarm."""
    torch.manual_seed(0)
    joint, attention = attention == "joint", {"joint": "full"}.get(attention, attention)
    model = Transformer(ModelConfig(7, 8, 2, 2, 16, attention=attention)).eval()
    model.blocks[1].mlp_out.weight.data[0, 0] = torch.nan
    z = torch.full((2, 8), 7)
    with pytest.raises(FloatingPointError, match="not finite"):
        if attention == "causal":
            generate(model, z[:, :0], 8, categorical)
        else:
            (sample_joint if joint else sample)(model, z, 4, 7)
