"""Diffusion samplers in which a whole step, the draw included, is one compiled call.

diffusion.sample computes just the positions that a step needs, a number that differs from
step to step; its head, its draw and its bookkeeping are plain PyTorch. For few and short
texts and a small model most of its time goes into starting operations. Here, instead, each
step of a run has room for M reveals in each text: M is at least the most that any text
needs in one step, and room that is not needed is filled with *gaps*. A gap points to one
spare position behind the text, whose content never enters the result. So all steps of a run
have one shape, and each (network, head, draw, writing into the text) is compiled as one
piece. M has one or two values (see trial_sizes), or, for a rare plan, another. The
distribution is that of diffusion.sample. Gaps are wasted work, so for many positions
diffusion.sample is faster: bench.py asks pays_for.

Names are those of diffusion.plan and cache.py: slot i of a text is the i-th position to be
revealed, and its place in the KV cache; order (B, L) has the position of each slot, when
(B, L) the step in which each slot is revealed. An example with the cache: L = 4, order
2 0 3 1, when 0 0 1 2, M = 2 (not rounded up). Gaps have slot, place and position 4:

    step     reads tokens of slots    reveals slots    at positions
    0        4 4                      0 1              2 0
    1        0 1                      2 4              3 4
    2        2 4                      3 4              1 4
"""
import torch
import torch.nn.functional as F

from cache import for_each_block
from data.devices import upload
from diffusion import check_filled, plan, span, steps_of
from tools.compiled_ar import draw, keep_in_place

# the most work, in multiplications of one pass over all positions, for which this is
# faster. nano, 50 tokens, two CPU cores: 8 texts gain (with the cache in 8 steps hardly),
# 16 lose with the cache. For a GPU the limit may be far too low
FEW = 3e8
MULTIPLE_OF = 4          # M is rounded up to a multiple of this, but to L at most
PLANS = 64               # trial plans that are drawn to find M


def pays_for(model, B, L):
    """Whether B texts of L tokens are so little work that gaps do not matter."""
    config = model.config
    size = 12 * config.layers * config.width ** 2        # weights of the blocks
    return B * L * size <= FEW


# ---- one step, of full attention and with a KV cache. z (B, L + 1): ids, the last column
# is the spare one. Everything is written in place

def full_step(model, z, pos, u, draw):
    """Reveal positions pos (B, M), where L is a gap, by random numbers u (B, M, 1)."""
    row = torch.arange(len(z), device=z.device)[:, None]             # (B, 1)
    L = z.shape[1] - 1
    # a gap asks for the last position, and its draw goes into the spare column
    h = model.hidden(z[:, :L], at=(row, pos.clamp(max=L - 1)))       # (B, M, C)
    z.scatter_(1, pos, draw(model.head(h), u))


def cached_step(model, z, cache, stacked, u, draw):
    """Read the tokens that the step before revealed, and reveal M positions more, by random
    numbers u (B, M, 1). stacked (3, B, 2 M): pos, place and limit, see cache.Reading, of M
    tokens, then of M masks. Gaps have place L, which is beyond every limit."""
    pos, place, limit = stacked                                      # (B, 2 M) each
    M = pos.shape[1] // 2
    L = z.shape[1] - 1
    idx = z.gather(1, pos)                                           # (B, 2 M)
    idx[:, M:] = model.mask_id
    # who sees whom
    places = torch.arange(cache.places, device=z.device)
    sees = (places < limit[..., None]) | (places == place[..., None])    # (B, 2 M, L + 1)
    attends = for_each_block(see_places, cache, where=(place, sees))
    # the states of the masks alone
    at = slice(None), slice(M, None)
    h = model.run(idx, pos.clamp(max=L - 1), attends, at)            # (B, M, C)
    z.scatter_(1, pos[:, M:], draw(model.head(h), u))


def see_places(q, k, v, keys, values, where, at=None):
    """cache.see_cache for W = 2 M positions of every text, gaps included: q, k, v (B, W, H,
    D) -> the same shape, or with `at` only the M there. keys, values (B, H, S, D), S = L +
    1 places. where: place (B, W), in which the new keys and values are stored, and sees (B,
    W, S) bool, which places each position sees."""
    place, sees = where
    # store them, heads first: k and the index both (B, H, W, D)
    index = place[:, None, :, None].expand(-1, k.shape[2], -1, k.shape[3])
    keys.scatter_(2, index, k.transpose(1, 2))
    values.scatter_(2, index, v.transpose(1, 2))
    # and look at the places that are seen
    if at is not None:
        q, sees = q[at], sees[at]
    q = q.transpose(1, 2)                                            # (B, H, W or M, D)
    y = F.scaled_dot_product_attention(q, keys, values, sees[:, None])
    return y.transpose(1, 2)                                         # (B, W or M, H, D)


# ---- the samplers

class StaticSampler:
    """diffusion.sample for B texts of L masks, as a function without arguments; the first
    run compiles. calls: of its last run, how many positions each call computed, the gaps
    included. (The cache is not emptied between runs: each place that matters was written in
    this run.) draw, backend: others only in tests."""

    def __init__(self, model, B, L, steps, draw=draw, backend="inductor"):
        device = model.embed.weight.device
        self.model, self.steps, self.draw = model, steps, draw
        self.blank = torch.full((B, L), model.mask_id)   # on the CPU, for the plans
        self.z = torch.full((B, L + 1), model.mask_id, device=device)
        self.sizes = self.trial_sizes()
        self.calls = []
        self.compiled = False
        keep_in_place(self.z)
        self.cached = model.config.attention == "reveal"
        if self.cached:
            cache = model.cache(B, L, spare=1)                       # S = L + 1 places
            keep_in_place(*cache.k, *cache.v)
            step, self.inputs_of = cached_step, cached_steps
            self.works_on = model, self.z, cache         # a step's first arguments
        else:
            step, self.inputs_of = full_step, full_steps
            self.works_on = model, self.z
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.step = torch.compile(step, fullgraph=True, dynamic=False, mode=mode,
                                  backend=backend)

    def plan(self):
        """diffusion.plan for these texts."""
        return plan(self.blank, self.steps, self.model.mask_id)

    def trial_sizes(self):
        """The values of M: one that is enough for three quarters of PLANS trial plans, and
        one for all. These plans leave the random state as it was."""
        with torch.random.fork_rng(devices=[]):
            needed = sorted(most_revealed(self.plan()[1]) for _ in range(PLANS))
        sizes = set()
        for most in (needed[3 * PLANS // 4], needed[-1]):
            rounded_up = -(-most // MULTIPLE_OF) * MULTIPLE_OF
            sizes.add(min(rounded_up, self.blank.shape[1]))
        return sorted(sizes)

    def warm_up(self):
        """Run once with each value of M, which compiles it; the CPU's random state stays as
        it was."""
        self.compiled = True
        with torch.random.fork_rng(devices=[]):
            for M in self.sizes:
                # a plan that M is enough for
                order, when = self.plan()
                while most_revealed(when) > M:
                    order, when = self.plan()
                self.run(order, when, M)

    def __call__(self):
        if not self.compiled:
            self.warm_up()
        order, when = self.plan()
        needed = most_revealed(when)
        enough = [M for M in self.sizes if M >= needed]
        if not enough:
            # a rare plan: another shape, which is compiled now (in bench.py run uncompiled)
            enough = [needed]
        return self.run(order, when, enough[0])

    @torch.no_grad()
    def run(self, order, when, M):
        """The texts (B, L) of a plan, in steps of M columns."""
        self.z.fill_(self.model.mask_id)
        self.calls.clear()
        # all that does not depend on the network comes first
        B, L = order.shape
        device = self.z.device
        inputs = upload(self.inputs_of(order, when, M), device)      # of each step
        numbers = torch.rand((len(inputs), B, M, 1), dtype=torch.float64, device=device)
        # positions that a call computes: M tokens and M masks of each text, or all
        cost = B * 2 * M if self.cached else B * L
        for given, u in zip(inputs, numbers):
            self.step(*self.works_on, given, u, self.draw)
            self.calls.append(cost)
        # raises FloatingPointError if a mask is left
        return check_filled(self.z[:, :-1].clone(), self.model.mask_id)


# ---- a plan as the steps are given it

def full_steps(order, when, M):
    """pos of each full_step, (steps, B, M), for a plan order, when (B, L)."""
    L = order.shape[1]
    order = with_spare(order)                                        # (B, L + 1)
    all_pos = []
    for i in range(steps_of(when)):
        known, end = (when < i).sum(1), (when <= i).sum(1)           # (B,)
        slots = padded(span(known, end), M, L)                       # (B, M)
        all_pos.append(order.gather(1, slots))
    return torch.stack(all_pos)


def cached_steps(order, when, M):
    """`stacked` of each cached_step, (steps, 3, B, 2 M), for a plan order, when (B, L)."""
    B, L = order.shape
    order = with_spare(order)                                        # (B, L + 1)
    stacked = []
    cached = torch.zeros(B, dtype=torch.long)
    for i in range(steps_of(when)):
        known, end = (when < i).sum(1), (when <= i).sum(1)           # (B,)
        tokens = padded(span(cached, known), M, L)                   # (B, M)
        masks = padded(span(known, end), M, L)
        place = torch.cat((tokens, masks), 1)                        # (B, 2 M)
        pos = order.gather(1, place)
        # a token sees the places before its own, a mask all tokens that are known (what a
        # gap sees does not matter)
        limit = torch.cat((tokens, known[:, None].expand(B, M)), 1)
        stacked.append(torch.stack((pos, place, limit)))
        cached = known
    return torch.stack(stacked)


def most_revealed(when):
    """The most positions that a text reveals in one step; when: see diffusion.plan."""
    return int(F.one_hot(when).sum(1).max())             # (B, L, steps) -> (B, steps)


def padded(some, M, spare):
    """The slots of a Span, (B, M), with `spare` in the gaps."""
    slot = some.slot.masked_fill(~some.valid, spare)
    return F.pad(slot, (0, M - slot.shape[1]), value=spare)


def with_spare(order):
    """order (B, L) with the spare position L behind it: (B, L + 1)."""
    return F.pad(order, (0, 1), value=order.shape[1])
