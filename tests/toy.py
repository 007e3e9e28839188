"""A world small enough to be enumerated: a few positions, a few tokens, any joint law of the two,
and the exact posterior of that law in the shape of a model. The mask is
id V. Also the chi-square test that compares counts with a law. All numbers are float64.
"""
import hashlib
import itertools
import math
import types

import torch

import diffusion
from model import ModelConfig, Transformer


def all_sequences(V, L):
    """Every sequence of L tokens, (V^L, L), in the order of joint.flatten()."""
    return torch.cartesian_prod(*[torch.arange(V)] * L).view(-1, L)


def joint(V, L, seed):
    """Probabilities of all sequences, shape (V,) * L: correlated, without any structure."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn((V,) * L, generator=generator, dtype=torch.float64).exp()
    return p / p.sum()


def draw(joint, n):
    """n sequences from the joint, (n, L), by the global generator."""
    chosen = torch.multinomial(joint.flatten(), n, replacement=True)
    return all_sequences(joint.shape[0], joint.dim())[chosen]


def nll(joint, x):
    """-log p(x) of each whole sequence of x (B, L), in nats: (B,)."""
    return -joint[x.unbind(1)].log()


class Model:
    """f(z, at) -> logits (N, V), with at a bool (B, L), in the form that diffusion.py asks for: its
    state at a position is its prediction there."""

    def __init__(self, f):
        self.f = f

    config = types.SimpleNamespace(attention="full", masks_alike=False, causal=False)

    def hidden(self, z, at=None, rank=None):
        """f is asked about all positions, and those that are not wanted are dropped."""
        everywhere = torch.ones_like(z, dtype=torch.bool)
        states = self.f(z, everywhere).view(*z.shape, -1)
        return states if at is None else states[at]

    def head(self, h):
        return h

    def chunked_sum(self, h, f, *rows):
        return f(h, *rows).sum()

    def __call__(self, z):
        return self.hidden(z)


def states_at(model, z, at, rank=None, usual=diffusion.states_at):
    """diffusion.states_at; but a toy's f is asked about the positions `at` of all rows."""
    if isinstance(model, Model):
        where = torch.zeros(z.shape, dtype=torch.bool)
        where[at] = True
        return model.f(z, where)
    return usual(model, z, at, rank)


def exact_model(joint):
    """The perfect denoiser: logits = log p(token | the unmasked tokens), float64.

    One row per masked sequence z in a table: there are only (V + 1)^L of them."""
    V, L = joint.shape[0], joint.dim()
    x, z = all_sequences(V, L), all_sequences(V + 1, L)              # (S, L), (Z, L)
    fits = ((z[:, None] == x) | (z[:, None] == V)).all(2).double()   # (Z, S)
    is_v = torch.nn.functional.one_hot(x, V).double()                # (S, L, V)
    p = torch.einsum("zs,s,slv->zlv", fits, joint.flatten(), is_v)
    table = (p / p.sum(2, keepdim=True)).log()                       # (Z, L, V)
    place = (V + 1) ** torch.arange(L - 1, -1, -1)                   # z as a number in base V + 1

    return Model(lambda z, at: table[(z * place).sum(1)][at])


class Ordered:
    """A model in the order of reveal, or an AR one: any conditionals, each drawn at random for a
    position and the (position, token) pairs known before it, in their order. In the form that
    sample_exact asks for: its state is its prediction."""

    def __init__(self, V, causal=False, depends_on=lambda known: known):
        attention = "causal" if causal else "reveal"
        self.config = types.SimpleNamespace(attention=attention, causal=causal, masks_alike=False,
                                            vocab=V)
        self.V, self.mask_id, self.depends_on, self.table = V, V, depends_on, {}

    def conditional(self, pos, known):
        """Logits (V,) of the token at pos, after the pairs `known`, a tuple."""
        key = pos, self.depends_on(known)
        if key not in self.table:
            seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
            generator = torch.Generator().manual_seed(seed)
            self.table[key] = 2 * torch.randn(self.V, generator=generator, dtype=torch.float64)
        return self.table[key]

    def cache(self, B, slots, spare=0):
        return [{} for _ in range(B)]

    def read(self, cache, new):
        idx, *rest = [part.tolist() for part in new[:4]]
        read = []
        for row, column in new.valid.nonzero().tolist():
            pos, slot, limit = [part[row][column] for part in rest]
            read.append((row, column, pos, slot, limit))
            cache[row][slot] = pos, idx[row][column]
        states = []
        for row, column, pos, slot, limit in read:
            if column < new.wanted_from:
                continue
            if self.config.causal:       # slot 0 is the start symbol, slot j + 1 holds token j
                known = tuple((i, cache[row][i + 1][1]) for i in range(slot))
            else:
                known = tuple(cache[row][i] for i in range(limit))
            states.append(self.conditional(pos, known))
        return torch.stack(states)

    def head(self, h):
        return h

    def law(self, order, x):
        """log p of a text x, a list, one token at a time in this order of positions."""
        known, total = (), 0.0
        for pos in order:
            total += self.conditional(pos, known).log_softmax(-1)[x[pos]].item()
            known += ((pos, x[pos]),)
        return total


def ancestral_law(joint, steps, chance=None):
    """Probabilities (V^L,) of the perfect model's samples, by enumeration: each position opens in
    one of the steps, with that step's chance (steps,), or all with equal ones; those of one step
    know the earlier ones only."""
    V, L = joint.shape[0], joint.dim()
    x, model = all_sequences(V, L), exact_model(joint)               # (S, L)
    weights = {}                         # {which positions open first, second, ...: probability}
    if chance is None:
        # k steps that open something, and 0 to k - 1 in their order: there are comb(steps, k) of it
        for when in itertools.product(range(L), repeat=L):
            k = max(when) + 1
            if set(when) == set(range(k)):
                weights[when] = math.comb(steps, k) / steps ** L
    else:
        for when in itertools.product(range(steps), repeat=L):
            weights[when] = chance[list(when)].prod()
    total = torch.zeros(len(x), dtype=torch.float64)
    for when, weight in weights.items():
        when, p = torch.tensor(when), torch.ones(len(x), dtype=torch.float64)
        for i in set(when.tolist()):
            at = (when == i).expand(x.shape)
            log_p = model(torch.where(when < i, x, V))[at]           # (S * opening, V)
            p *= log_p.gather(1, x[at][:, None]).exp().view(len(x), -1).prod(1)
        total += weight * p
    return total


def network(scale=5.0, **options):
    """A small Transformer of random weights, large enough that every token matters."""
    defaults = dict(vocab=11, context=12, layers=3, heads=2, width=16, attention="reveal")
    model = Transformer(ModelConfig(**(defaults | options))).eval().requires_grad_(False)
    for w in model.parameters():
        w *= scale if w.ndim == 2 else 1
    return model


def count(x, V):
    """How often each sequence occurs in x (B, L): (V^L,), in the order of all_sequences."""
    place = V ** torch.arange(x.shape[1] - 1, -1, -1)
    return torch.bincount((x * place).sum(1), minlength=V ** x.shape[1])


def chi_square(counts, p):
    """The chance of counts (K,) at least this far from the law p (K,), by Pearson's chi-square.

    Good where every expected count is at least about 5, which is asserted; a cell of probability 0
    must be empty and is left out."""
    counts, p = counts.double().flatten(), p.double().flatten()
    assert counts[p == 0].sum() == 0, "something that cannot happen did"
    counts, p = counts[p > 0], p[p > 0]
    expected = counts.sum() * p / p.sum()
    assert expected.min() >= 5, "too few counts for a chi-square test"
    x2 = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(p) - 1) / 2).double(), x2 / 2))
