"""Samplers whose every step is one compiled call, its draw included: AR's, and diffusion's,
which then has few shapes.

diffusion.sample computes just the positions that a step needs, a number that differs from
step to step; what is around the blocks is plain PyTorch. For few and short texts and a
small model most of its time goes into starting operations. Here, instead, each step of a
run has M places in each text, at least the most that any text reveals in one step; the rest
of them are gaps, which point to a spare position behind the text, where nothing is ever
read for the result. So the whole step (blocks, head, draw, writing into the text) has one
of two shapes (see trial_sizes; a rare plan needs another), and is compiled as one piece.
The law is that of diffusion.sample; the gaps are wasted work, so that for many positions
diffusion.sample is faster.

bench.py times this in place of diffusion.sample where pays_for says so.

Names are those of diffusion.plan and cache.py: slot i of a text is the i-th position to be
revealed, and its place in the KV cache; order (B, L) has the position of each slot, when
(B, L) the step that reveals it. An example: L = 4, order 2 0 3 1, when 0 0 1 2, M = 2 (not
rounded up). The spare place, and position, is L = 4:

    step     reads tokens of slots    reveals slots    at positions
    0        4 4                      0 1              2 0
    1        0 1                      2 4              3 4
    2        2 4                      3 4              1 4
"""
import functools
import typing

import torch
import torch.nn.functional as F

from cache import decode, for_each_block, generate
from data.devices import float64_device, upload
from diffusion import draw_from, plan, prompt_first, span, steps_of, without_masks
from tools.machine import compiled_decode

# multiplications of a call that computes all positions, up to which this is faster on two
# CPU cores: measured with nano at 50 tokens. Without the cache 8 texts gain; with it 8 gain
# in 32 steps, but not in 8, and 16 lose. On a GPU it may be far too low
FEW = 3e8
GRAIN = 4                # M is rounded up to a multiple of this, but to L at most
PLANS = 64               # trial plans that are drawn to find M


def pays_for(model, B, L):
    """Whether B texts of L tokens are little enough work for gaps not to matter (and the
    device can draw)."""
    config = model.config
    weights = 12 * config.layers * config.width ** 2     # of the blocks
    return B * L * weights <= FEW and can_draw(model.embed.weight.device)


def can_draw(device):
    """Whether `draw` can run on the device: it needs float64."""
    return float64_device(device) == device


def draw(logits, u):
    """diffusion.categorical in a form that compiles: logits (..., V) -> ids (...). u (...,
    1): uniform random numbers in float64. (Compiled code would draw them itself in float32,
    whatever it is asked for, and unlikely tokens would be too rare.)"""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return draw_from(weights.double(), u)


def decode_and_draw(model, token, place, cache, extent, numbers):
    """cache.decode, then a draw from its logits: ids (B,) of the next token. place (1,): of
    this token in the cache; extent: how many places attention is given. numbers (L, B, 1):
    uniform random numbers, those of this step in row `place`."""
    logits = decode(model, token, place, cache, extent)
    return draw(logits, numbers.index_select(0, place)[0])


def keep_in_place(*tensors):
    """Tell the compiler that these stay where they are, as CUDA graphs need them at fixed
    addresses."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def ar_sampler(model, B, L, compiler=None):
    """cache.generate for B texts of L tokens, as a function without arguments. compiler:
    another one is for tests."""
    device = model.embed.weight.device
    step = (compiler or compiled_decode)(device, B, decode_and_draw)
    prompt = torch.zeros((B, 0), dtype=torch.long, device=device)    # nothing is given
    # all runs share one cache, which need not be emptied: places that are not filled yet
    # are hidden
    cache = model.cache(B, L)
    keep_in_place(*cache.k, *cache.v)
    # attention reads the cache up to a multiple of grain: fewer shapes to compile
    grain = 128 if device.type == "cuda" else 16
    numbers = torch.empty((L, B, 1), dtype=torch.float64, device=device)
    step = functools.partial(step, numbers=numbers)

    def run():
        numbers.uniform_()
        # the step has drawn already: what generate takes for logits are ids
        return generate(model, prompt, L, draw=lambda ids: ids, step=step, grain=grain,
                        cache=cache)
    return run


# ---- one step, of full attention and with a KV cache. z (B, L + 1): ids, the last column
# is the spare one. Everything is written in place

def full_step(model, z, pos, u, draw):
    """Reveal positions pos (B, M), L in the gaps, by random numbers u (B, M, 1)."""
    text = torch.arange(len(z), device=z.device)[:, None]            # (B, 1)
    L = z.shape[1] - 1
    # a gap asks for the last position, and its draw goes into the spare column
    h = model.hidden(z[:, :L], at=(text, pos.clamp(max=L - 1)))      # (B, M, C)
    z.scatter_(1, pos, draw(model.head(h), u))


def cached_step(model, z, cache, reading, u, draw):
    """reading (3, B, 2 M): pos, place and limit of cache.Reading. Read the tokens at the
    first half of pos, which the step before revealed, and reveal the positions of the
    second half, by random numbers u (B, M, 1). Gaps have the spare place L, which no limit
    lets a real position see."""
    pos, place, limit = reading                                      # (B, 2 M) each
    M = pos.shape[1] // 2
    L = z.shape[1] - 1
    idx = z.gather(1, pos)                                           # (B, 2 M)
    idx[:, M:] = model.mask_id
    # who sees whom
    places = torch.arange(cache.places, device=z.device)
    sees = (places < limit[..., None]) | (places == place[..., None])    # (B, 2 M, L + 1)
    attends = for_each_block(see_places, cache, where=Where(place, sees))
    # the states of the masks alone
    at = slice(None), slice(M, None)
    h = model.run(idx, pos.clamp(max=L - 1), attends, at)            # (B, M, C)
    z.scatter_(1, pos[:, M:], draw(model.head(h), u))


class Where(typing.NamedTuple):
    """Places of W positions of each text."""
    place: torch.Tensor          # (B, W) where key and value are stored
    sees: torch.Tensor           # (B, W, S) bool: which places each sees


def see_places(q, k, v, keys, values, where, at=None):
    """cache.see_cache for a whole rectangle, whose gaps are computed, too: q, k, v (B, W,
    H, D) -> the same shape, or only the outputs at `at`. keys, values (B, H, S, D)."""
    place, sees = where
    # store the new ones; scatter_ wants an index for each number of k: (B, H, W, D)
    index = place[:, None, :, None].expand(-1, k.shape[2], -1, k.shape[3])
    keys.scatter_(2, index, k.transpose(1, 2))
    values.scatter_(2, index, v.transpose(1, 2))
    # and look at the places that are seen
    if at is not None:
        q, sees = q[at], sees[at]
    q = q.transpose(1, 2)                                            # (B, H, W, D)
    y = F.scaled_dot_product_attention(q, keys, values, sees[:, None])
    return y.transpose(1, 2)                                         # (B, W, H, D)


# ---- the samplers

class StaticSampler:
    """diffusion.sample for B texts of L masks, as a function without arguments. calls: of
    its last run, how many positions each call computed, the gaps included. (The cache is
    not emptied between runs: each place that is seen was written in this run.) draw,
    backend: other ones are for tests."""

    def __init__(self, model, B, L, steps, draw=draw, backend="inductor"):
        device = model.embed.weight.device
        self.model, self.steps, self.draw = model, steps, draw
        self.blank = torch.full((B, L), model.mask_id)               # on the CPU
        self.z = torch.full((B, L + 1), model.mask_id, device=device)
        self.sizes = self.trial_sizes()
        self.calls = []
        self.cache = None
        step = full_step
        if model.config.attention == "reveal":
            self.cache = model.cache(B, L, spare=1)
            step = cached_step
            keep_in_place(*self.cache.k, *self.cache.v)
        keep_in_place(self.z)
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
            needed = sorted(largest(self.plan()[1]) for _ in range(PLANS))
        sizes = set()
        for most in needed[3 * PLANS // 4], needed[-1]:
            rounded_up = -(-most // GRAIN) * GRAIN
            sizes.add(min(rounded_up, self.blank.shape[1]))
        return sorted(sizes)

    def warm_up(self):
        """Run once with each value of M, which compiles it."""
        for M in self.sizes:
            order, when = self.plan()
            while largest(when) > M:
                order, when = self.plan()
            self.run(order, when, M)

    def __call__(self):
        order, when = self.plan()
        # a plan may need more than the largest M: another shape, compiled anew (by bench.py
        # run uncompiled)
        needed = largest(when)
        enough = [M for M in self.sizes if M >= needed] or [needed]
        return self.run(order, when, enough[0])

    @torch.no_grad()
    def run(self, order, when, M):
        """The texts (B, L) of a plan, in steps of M places."""
        self.z.fill_(self.model.mask_id)
        self.calls.clear()
        if self.cache is None:
            self.run_full(order, when, M)
        else:
            self.run_cached(order, when, M)
        # raises FloatingPointError if a mask is left
        return without_masks(self.z[:, :-1].clone(), self.model.mask_id)

    def run_full(self, order, when, M):
        """Fill self.z by the plan of reveals, M at most in a step."""
        B, L = order.shape
        all_pos = []
        for i in range(steps_of(when)):
            slots = padded(span((when < i).sum(1), (when <= i).sum(1)), M, L)
            all_pos.append(with_spare(order).gather(1, slots))       # (B, M)
        all_pos = upload(torch.stack(all_pos), self.z.device)
        for pos, u in zip(all_pos, self.uniform(len(all_pos), M)):
            self.step(self.model, self.z, pos, u, self.draw)
            self.calls.append(B * L)

    def uniform(self, steps, M):
        """The random numbers of all draws, (steps, B, M, 1)."""
        return torch.rand((steps, len(self.z), M, 1), dtype=torch.float64,
                          device=self.z.device)

    def run_cached(self, order, when, M):
        """run_full for attention in the order of reveal."""
        B, L = order.shape
        # order stays as it is; but sample_cached draws random numbers here, too, and the
        # tests compare both from one seed
        order = prompt_first(order, L)
        everything = []
        cached = torch.zeros(B, dtype=torch.long)
        for i in range(steps_of(when)):
            known, end = (when < i).sum(1), (when <= i).sum(1)       # (B,)
            tokens = padded(span(cached, known), M, L)
            masks = padded(span(known, end), M, L)
            place = torch.cat((tokens, masks), 1)                    # (B, 2 M)
            pos = with_spare(order).gather(1, place)
            # a token sees the places before its own, a mask all tokens; a gap among the
            # tokens itself alone, one among the masks whatever masks see
            limit = torch.cat((tokens.masked_fill(tokens == L, 0),
                               known[:, None].expand(B, M)), 1)
            everything.append(torch.stack((pos, place, limit)))
            cached = known
        everything = upload(torch.stack(everything), self.z.device)  # (steps, 3, B, 2 M)
        for reading, u in zip(everything, self.uniform(len(everything), M)):
            self.step(self.model, self.z, self.cache, reading, u, self.draw)
            self.calls.append(B * 2 * M)


def largest(when):
    """The most positions that a text reveals in one step; when: see diffusion.plan."""
    return int(F.one_hot(when).sum(1).max())             # (B, n, steps) -> (B, steps)


def padded(slots, M, spare):
    """The slots of a Span, (B, M), with `spare` in the gaps."""
    slot = slots.slot.masked_fill(~slots.valid, spare)
    return F.pad(slot, (0, M - slot.shape[1]), value=spare)


def with_spare(order):
    """order (B, L) with the spare position L behind it: (B, L + 1)."""
    return F.pad(order, (0, 1), value=order.shape[1])
