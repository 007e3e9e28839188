"""Exact sampling in few calls: its law is that of one token at a time, by enumeration of every
branch of every draw, by chi-square on a network, and token for token with shared noise.

Networks are random, with weights large enough that every token matters; float32 rounding was under
3e-6 with 20 seeds, CLOSE leaves room.
"""
import itertools
import math

import pytest
import torch

import diffusion
import exact
from cache import generate
from data.measures import mean_se
from diffusion import categorical, nelbo, sample, sharpen
from exact import couple, nll_in_order, sample_exact
from tools import likelihood
from toy import Ordered, all_sequences, chi_square, count, joint, network

CLOSE = 1e-5
LIMIT = 1e-6                     # a chi-square test fails below this chance


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def model_of(**options):
    """A network that knows places and distances, unless told otherwise."""
    return network(**(dict(positions="both") | options))


# ---- the coupling

def test_coupling_has_the_new_law_and_keeps_all_that_can_be_kept():
    """Chi-square of 40,000 draws against p; the share that stays is the sum of min(p, q) within 5
    standard errors: one in a million with another seed."""
    n = 40_000
    model = Ordered(5)
    logits = torch.randn(2, 5, dtype=torch.float64)
    q, p = logits.softmax(-1)
    h, was = logits[1].expand(n, 5), logits[0].expand(n, 5)
    x = categorical(was)
    y = couple(model, h, was, x, mask_id=5)
    assert chi_square(torch.bincount(y, minlength=5), p) > LIMIT
    most = torch.minimum(p, q).sum().item()
    error = math.sqrt(most * (1 - most) / n)
    assert abs((y == x).double().mean().item() - most) < 5 * error
    # without a guess
    y = couple(model, h, was, torch.full_like(x, 5), mask_id=5)
    assert chi_square(torch.bincount(y, minlength=5), p) > LIMIT


def test_coupling_keeps_every_guess_whose_law_did_not_change():
    """Also one that a sharper law makes certain. No chance involved."""
    h = torch.randn(200, 7)
    x = categorical(h)
    assert torch.equal(couple(Ordered(7), h, h, x, 7), x)

    def likeliest(logits):
        return sharpen(logits, 1.0, 0.01)
    x = h.argmax(-1)
    assert torch.equal(couple(Ordered(7), h, h, x, 7, likeliest), x)


def test_coupling_never_draws_what_rounding_leaves_over(monkeypatch):
    """Two laws whose sums differ by float32's rounding, so that p is nowhere above q, and a guess
    that is not kept: the draw is from p, never of a token that it forbids."""
    was = torch.tensor([[0.93980992, 0.77484882, -torch.inf]])
    h = torch.tensor([[0.93980992, 0.77484894, -torch.inf]])
    drawn = []
    rand = torch.rand
    for u in (1 - 1e-9, 1 - 1e-12, 1 - 1e-16):
        monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full_like(rand(*a, **k), u))
        for x in (0, 1):
            drawn += couple(Ordered(3), h, was, torch.tensor([x]), 3).tolist()
            drawn += couple(Ordered(3), was, h, torch.tensor([x]), 3).tolist()
    assert set(drawn) <= {0, 1}


def test_coupling_reaches_tokens_that_float32_does_not(monkeypatch):
    """Draws are float64: a token of probability 1e-9 behind likelier ones is drawn where u is within
    1e-9 of 1, which no float32 number is."""
    h = torch.tensor([[0.0, 0.0, math.log(2e-9)]])
    monkeypatch.setattr(torch, "rand", lambda *a, dtype=None, **k: torch.full(a[0], 1 - 1e-10,
                                                                              dtype=dtype))
    assert couple(Ordered(3), h, h, torch.tensor([3]), 3).tolist() == [2]


# ---- the law, by enumeration

def moves(p, q, x):
    """What couple does with a guess x ~ q that is to have the law p, {token: chance}; q None: there
    is no guess."""
    if q is None:
        return {v: float(p[v]) for v in range(len(p))}
    stays = min(1.0, float(p[x] / q[x]))
    rest = (p - q).clamp(min=0)
    chances = {x: stays}
    for v in range(len(p)):
        if stays < 1 and rest[v] > 0:
            chances[v] = chances.get(v, 0) + (1 - stays) * float(rest[v] / rest.sum())
    return chances


def all_runs(model, L, ahead, patch):
    """Run sample_exact on every branch of every draw: {(order, text): probability}, calls at most.
    """
    found, most, path = {}, 0, []
    state = {}

    def scripted(model, h, was, x, mask_id, adjust=None):
        """couple, whose draws follow the path; a draw beyond its end takes the first branch."""
        ids = []
        for i in range(len(x)):
            guess = None if x[i] == mask_id else was[i].softmax(-1)
            options = list(moves(h[i].softmax(-1), guess, int(x[i])).items())
            if state["at"] == len(path):
                path.append([0, len(options)])
            token, chance = options[path[state["at"]][0]]
            state["at"] += 1
            state["p"] *= chance
            ids.append(token)
        return torch.tensor(ids)

    patch.setattr(exact, "couple", scripted)
    z = torch.full((1, L), model.mask_id)
    while True:
        torch.manual_seed(0)             # the same order of reveal in each run
        state.update(at=0, p=1.0)
        x, calls = sample_exact(model, z, model.mask_id, ahead=ahead)
        text = tuple(x[0].tolist())
        found[text] = found.get(text, 0) + state["p"]
        most = max(most, int(calls))
        # the next path: the last draw that has another branch takes it
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return found, most
        path[-1][0] += 1


@pytest.mark.parametrize("causal", [False, True], ids=["reveal", "AR"])
@pytest.mark.parametrize("V, L, ahead", [(2, 3, None), (2, 3, 1), (3, 2, None)])
def test_law_is_that_of_one_token_at_a_time(monkeypatch, causal, V, L, ahead):
    """Every branch of every draw of every text, whose probabilities add up to the product of the
    conditionals within 1e-12, in at most as many calls as masks. No chance involved."""
    model = Ordered(V, causal)
    with monkeypatch.context() as patch:
        found, most = all_runs(model, L, ahead, patch)
    torch.manual_seed(0)
    order = list(range(L))
    if not causal:
        order = diffusion.random_order(torch.full((1, L), V), V)[0].tolist()
    for x in itertools.product(range(V), repeat=L):
        assert abs(found[x] - math.exp(model.law(order, list(x)))) < 1e-12
    assert 1 < most <= L


# ---- the law, by chi-square

def one_at_a_time(model, z, law):
    """The probabilities of all texts that fill z (1, L), one token at a time in random order, or
    from left to right for AR: (V^L,), in the order of all_sequences."""
    V, L = model.config.vocab, z.shape[1]
    x = all_sequences(V, L)                                          # (S, L)
    masks = (z[0] == V).nonzero()[:, 0].tolist()
    known = [i for i in range(L) if i not in masks]
    fits = (x[:, known] == z[0, known]).all(1)
    orders = [masks] if model.config.causal else list(itertools.permutations(masks))
    total = torch.zeros(len(x), dtype=torch.float64)
    # a prompt is revealed in random order, too
    prompts = [known] if model.config.causal else list(itertools.permutations(known))
    for prompt, order in itertools.product(prompts, orders):
        rank = torch.empty(1, L)
        rank[0, list(prompt) + list(order)] = torch.arange(L).float()
        log_p = torch.zeros(len(x), dtype=torch.float64)
        for pos in order:
            if model.config.causal:
                start = torch.full((len(x), 1), V)
                logits = model(torch.cat((start, x[:, :-1]), 1))[:, pos]
            else:
                seen = torch.where(rank < rank[0, pos], x, V)
                logits = model(seen, rank.expand(len(x), L))[:, pos]
            chances = law(logits).double().log_softmax(-1)           # (S, V)
            log_p += chances.gather(1, x[:, pos:pos + 1])[:, 0]
        total += torch.where(fits, log_p.exp(), 0.0) / len(orders) / len(prompts)
    return total


CASES = {"whole text": [3, 3, 3], "prompt": [1, 3, 3], "infilling": [3, 2, 3]}
LAWS = {"own law": (1.0, 1.0), "temperature": (0.6, 1.0), "top-p": (1.0, 0.9)}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
@pytest.mark.parametrize("attention", ["reveal", "causal"])
def test_samples_have_the_law_of_one_token_at_a_time(attention, given, law):
    """A network of 3 tokens and 3 positions, 10,000 texts, in two sizes of guesses ahead. One in a
    million per case with another seed. Stopped after one call the test fails, as it must."""
    if attention == "causal" and given == CASES["infilling"]:
        pytest.skip("AR fills no gaps")
    model = model_of(vocab=3, context=3, attention=attention, layers=2, scale=6.0)
    z = torch.tensor([given])
    p = one_at_a_time(model, z, lambda logits: sharpen(logits, *law))
    p = torch.where(p * 10_000 < 5, 0.0, p)              # rare texts are left out

    def chance(**how):
        x, calls = sample_exact(model, z.expand(10_000, 3), 3,
                                lambda logits: sharpen(logits, *law), **how)
        counts = count(x, 3)
        return chi_square(torch.where(p > 0, counts, 0), p), calls
    for ahead in (1, None):
        found, calls = chance(ahead=ahead)
        assert found > LIMIT and calls.max() <= z.eq(3).sum()
    found, calls = chance(max_calls=1)
    assert found < LIMIT and calls.max() == 1


def test_the_plain_loop_has_the_law_and_takes_at_most_a_call_for_each_slot():
    """2,500 texts of 3 slots. Chi-square over 27 sequences: one in a million with another seed.
    Stopped after the first call the law is another one, which so many texts show."""
    torch.manual_seed(0)
    law = joint(3, 3, seed=1)

    def predict(x):
        known = x.where(x < 3, 0)                        # of a slot without a token any will do
        first, second = law[known[0]], law[known[0], known[1]]
        return torch.stack((law.sum((1, 2)), first.sum(1) / first.sum(), second / second.sum()))
    found = [exact.sample_exact_plain(predict, 3, 3) for _ in range(2500)]
    x = torch.stack([x for x, _ in found])
    assert chi_square(count(x, 3), law) > LIMIT
    assert {calls for _, calls in found} <= {2, 3}

    def once(x):
        """The first call's predictions, whatever has been guessed since."""
        return predict(torch.full((3,), 3))
    x = torch.stack([exact.sample_exact_plain(once, 3, 3)[0] for _ in range(2500)])
    assert chi_square(count(x, 3), law) < LIMIT


@pytest.mark.parametrize("attention", ["reveal", "causal"])
@pytest.mark.parametrize("prompt, positions", [(0, "both"), (4, "rope"), (11, "learned")])
@pytest.mark.parametrize("ahead", [1, 8, 10 ** 30, None])
def test_text_is_that_of_one_call_per_token_with_the_same_noise(monkeypatch, attention, prompt,
                                                                positions, ahead):
    """Each slot has its own Gumbel noise, and takes the largest of logits plus noise: then the text
    is token for token the one that an uncached pass per token writes. And the states kept at the
    end are those of the final text, within CLOSE. (Two logits within 1e-5 of each other would
    differ: one seed in a thousand.)"""
    model = model_of(attention=attention, positions=positions, context=15)
    z = torch.full((6, 12), 11)
    z[:, :prompt] = torch.randint(11, (6, prompt))
    noise = -(-torch.rand(6, 12, 11).log()).log()
    kept, now = torch.zeros(6, 12, 16), {}
    ask_name = "ask_tokens" if attention == "causal" else "ask_masks"

    def ask(model, cache, order, x, call, usual=getattr(exact, ask_name)):
        now.update(order=order)
        h = usual(model, cache, order, x, call)
        now["asked"] = diffusion.listed(diffusion.span(call.begin, call.end), z.device)
        kept[now["asked"]] = h
        return h

    def largest(model, h, was, x, mask_id, adjust=None):
        return (model.head(h) + noise[now["asked"]]).argmax(-1)
    monkeypatch.setattr(exact, ask_name, ask)
    monkeypatch.setattr(exact, "couple", largest)
    x, calls = sample_exact(model, z, 11, ahead=ahead)

    expected, rows = z.clone(), torch.arange(6)
    rank = now["order"].argsort(1)
    for slot in range(prompt, 12):
        pos = now["order"][:, slot]
        if attention == "causal":
            shifted = torch.cat((torch.full((6, 1), 11), expected[:, :-1]), 1)
            h = model.hidden(shifted)[rows, pos]
        else:
            h = model.hidden(expected, rank=rank)[rows, pos]
        expected[rows, pos] = (model.head(h) + noise[:, slot]).argmax(-1)
        assert (h - kept[:, slot]).abs().max() < CLOSE
    assert torch.equal(x, expected) and calls.max() <= 12 - prompt


# ---- calls

@pytest.mark.parametrize("causal", [False, True], ids=["reveal", "AR"])
def test_calls_follow_what_depends_on_what(causal):
    """Tokens that know nothing of each other: two calls, one to guess and one that confirms (AR
    guesses the first law everywhere, so there every token has its position's law in the second,
    and a third confirms). Each token depends on the one before: at most as many calls as masks.
    Never more, and more than one text of a batch takes fewer. Calls are counted at the network,
    too."""
    z = torch.full((20, 8), 3)
    x, calls = sample_exact(Ordered(3, causal, lambda known: ()), z, 3, ahead=None)
    assert calls.max() == (3 if causal else 2)
    chain = Ordered(3, causal, lambda known: known[-1:])
    made, read = [], chain.read
    chain.read = lambda cache, new: made.append(1) or read(cache, new)
    x, calls = sample_exact(chain, z, 3, ahead=None)
    assert 2 < len(made) == calls.max() <= 8 and calls.min() < calls.max()


@pytest.mark.parametrize("attention", ["reveal", "causal"])
def test_texts_of_a_batch_do_not_disturb_each_other(attention):
    """Of a batch whose texts end at different times, each finished text's states are not asked for
    again, and with one likeliest token the batch gives what each text gives alone. Exact."""
    model = model_of(attention=attention)
    z = torch.full((8, 12), 11)
    z[:, 0] = torch.arange(8)

    def likeliest(logits):
        return sharpen(logits, 1.0, 0.01)
    if attention == "reveal":            # one order for all, whatever the batch
        order = torch.randperm(11)[None] + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exact, "random_order", lambda z, mask_id: order.repeat(len(z), 1))
            together, calls = sample_exact(model, z, 11, likeliest)
            alone = [sample_exact(model, row[None], 11, likeliest) for row in z]
    else:
        together, calls = sample_exact(model, z, 11, likeliest)
        alone = [sample_exact(model, row[None], 11, likeliest) for row in z]
        ordinary = generate(model, z[:, :1], 12, lambda logits: logits.argmax(-1))
        assert torch.equal(together, ordinary)
    assert torch.equal(together, torch.cat([x for x, _ in alone]))
    assert calls.tolist() == [int(n) for _, n in alone] and len(set(calls.tolist())) > 1


def test_watch_sees_final_tokens_that_stay():
    """What was final once never changes, there is more of it after each call, and at last all is.
    No chance involved."""
    model, seen = model_of(), []
    z = torch.full((4, 12), 11)
    z[:, 5] = 3
    x, calls = sample_exact(model, z, 11, watch=lambda z, settled: seen.append((z, settled)))
    assert len(seen) == calls.max()
    for (z0, settled0), (z1, settled1) in zip(seen, seen[1:]):
        assert (settled0 <= settled1).all() and torch.equal(z0[settled0], z1[settled0])
        assert (settled1.sum(1) > settled0.sum(1))[~settled0.all(1)].all()
    assert seen[0][1][:, 5].all() and seen[-1][1].all() and torch.equal(seen[-1][0], x)


def test_stopped_early_every_token_is_a_guess_at_least():
    """One call is one step of ordinary sampling; two are more. Nothing stays masked."""
    model = model_of()
    for calls in (1, 2, 3):
        x, made = sample_exact(model, torch.full((5, 12), 11), 11, ahead=1, max_calls=calls)
        assert (x < 11).all() and made.max() == calls


def test_prompts_of_an_ar_batch_may_differ_in_length():
    """One likeliest token each: what each text gives alone. Exact."""
    def likeliest(logits):
        return sharpen(logits, 1.0, 0.01)
    model, z = model_of(attention="causal"), torch.full((3, 12), 11)
    for row, prompt in zip(z, (0, 5, 12)):
        row[:prompt] = torch.arange(prompt) % 11
    together, calls = sample_exact(model, z, 11, likeliest)
    alone = [sample_exact(model, row[None], 11, likeliest) for row in z]
    assert torch.equal(together, torch.cat([x for x, _ in alone]))
    assert calls.tolist() == [int(n) for _, n in alone] and calls[2] == 0


def test_bfloat16_blocks_sample_and_read():
    """As on a GPU: both attentions run, and calls stay within the number of masks."""
    for attention in ("reveal", "causal"):
        model = model_of(attention=attention)
        model.bf16 = True
        x, calls = sample_exact(model, torch.full((3, 12), 11), 11)
        assert (x < 11).all() and calls.max() <= 12
    assert nll_in_order(model_of(), x, 11).isfinite().all()


def test_nothing_masked_calls_no_network():
    """And the text comes back."""
    x = torch.randint(11, (3, 12))
    out, calls = sample_exact(model_of(), x, 11)
    assert torch.equal(out, x) and not calls.any()


def test_what_cannot_be_sampled_exactly_is_refused():
    """Full attention, gaps in AR's text, unequal numbers of masks, weights that are NaN, no call or
    nothing ahead; and a likelihood in an order of a model without such orders."""
    z = torch.full((2, 12), 11)
    with pytest.raises(ValueError, match="order of reveal"):
        sample_exact(model_of(attention="full"), z, 11)
    gap = z.clone()
    gap[:, 3] = 1
    with pytest.raises(ValueError, match="no gaps"):
        sample_exact(model_of(attention="causal"), gap, 11)
    uneven = z.clone()
    uneven[0, 3] = 1
    with pytest.raises(ValueError, match="same number of masks"):
        sample_exact(model_of(), uneven, 11)
    for attention in ("reveal", "causal"):
        broken = model_of(attention=attention)
        broken.lm_head.weight[3] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            sample_exact(broken, z, 11)
    for wrong in (dict(ahead=0), dict(ahead=-1), dict(max_calls=0)):
        with pytest.raises(ValueError, match="needs a call, and a token ahead"):
            sample_exact(model_of(), z, 11, **wrong)
    for attention in ("full", "causal"):
        with pytest.raises(ValueError, match="order of reveal"):
            nll_in_order(model_of(attention=attention), z, 11)


def test_one_step_sampler_and_exact_sampler_agree_on_a_text_of_one_mask():
    """Where there is nothing to guess ahead: chi-square, one in a million with another seed."""
    model = model_of()
    z = torch.randint(11, (12,)).expand(20_000, 12).clone()
    z[:, 4] = 11
    counts = []
    for x in (sample(model, z, 1, 11), sample_exact(model, z, 11)[0]):
        counts.append(torch.bincount(x[:, 4], minlength=11))
    pooled = (counts[0] + counts[1]).double()
    keep = pooled >= 40
    for c in counts:
        assert chi_square(c[keep], pooled[keep]) > LIMIT


# ---- the likelihood in one reading

def order_of(x, patch):
    """Let random_order give known orders; returns them, (B, L)."""
    orders = torch.rand(x.shape).argsort(1)
    patch.setattr(exact, "random_order", lambda z, mask_id: orders)
    return orders


def test_likelihood_is_the_product_of_the_conditionals(monkeypatch):
    """Of a model of tables, text by text, within 1e-12; and of a network as passes without a cache
    have it, one for each token, within CLOSE. One call each. No chance involved."""
    x = torch.randint(3, (7, 5))
    orders, model = order_of(x, monkeypatch), Ordered(3)
    for nats, order, text in zip(nll_in_order(model, x, 3), orders.tolist(), x.tolist()):
        assert abs(nats.item() + model.law(order, text)) < 1e-12

    model, x = model_of(), torch.randint(11, (4, 12))
    orders, calls = order_of(x, monkeypatch), []
    model.embed.register_forward_hook(lambda module, args, out: calls.append(args[0].numel()))
    nats = nll_in_order(model, x, 11)
    assert calls == [4 * (11 + 12)]
    rank, expected = orders.argsort(1), torch.zeros(4, dtype=torch.float64)
    for slot in range(12):
        pos = orders[:, slot]
        z = torch.where(rank < slot, x, 11)
        log_p = model(z, rank)[torch.arange(4), pos].double().log_softmax(-1)
        expected -= log_p[torch.arange(4), x[torch.arange(4), pos]]
    assert (nats - expected).abs().max() < 12 * CLOSE


def test_likelihood_of_the_rest_is_the_product_of_the_others_conditionals():
    """Of orders of which a part is given, another number of tokens in each text, or the same in
    all: what the whole costs without what the part does. Of tables, within 1e-12. No chance
    involved."""
    x, orders = torch.randint(3, (7, 5)), torch.rand(7, 5).argsort(1)
    model = Ordered(3)
    for known in (torch.arange(7) % 5, 3):
        found = nll_in_order(model, x, 3, orders, known)
        each = torch.as_tensor(known).expand(7).tolist()
        for nats, order, text, n in zip(found, orders.tolist(), x.tolist(), each):
            expected = model.law(order[:n], text) - model.law(order, text)
            assert abs(nats.item() - expected) < 1e-12


def test_mean_over_orders_and_mixture_of_orders_agree_with_enumeration(monkeypatch):
    """Three positions: the mean over random orders is that of all six within 5 standard errors (one
    in a million with another seed), which are honest; the mixture of 64 orders is under it, and
    within 0.05 nats of the six's own."""
    model, text = Ordered(3), [2, 0, 1]
    every = torch.tensor([-model.law(order, text) for order in itertools.permutations(range(3))],
                         dtype=torch.float64)
    x = torch.tensor([text]).expand(500, 3)
    mean, mixture = likelihood.in_orders(model, x, 3, 64)
    value, se = mean_se(3 * mean)
    assert abs(value - every.mean().item()) < 5 * se
    assert 0.7 < se / (every.std(correction=0).item() / math.sqrt(500 * 64)) < 1.4
    truth = math.log(6) - torch.logsumexp(-every, 0).item()
    assert truth < every.mean() and (mixture <= mean + 1e-12).all()
    assert abs(3 * mixture.mean().item() - truth) < 0.05


def test_validation_of_a_reveal_model_estimates_the_bound():
    """The mean of the exact values over many orders is nelbo's, whose masks are drawn: within 5 of
    their joint standard errors, one in a million with another seed."""
    model, x = model_of(scale=3.0), torch.randint(11, (2_000, 12))
    scored = mean_se(nll_in_order(model, x, 11) / 12)
    noisy = torch.stack([nelbo(model, part, 11) for part in x.split(50)])
    noisy = mean_se(noisy)
    assert abs(scored[0] - noisy[0]) < 5 * math.hypot(scored[1], noisy[1])
    assert scored[1] < noisy[1]
