"""Masked diffusion as pure functions: the noise, the bound, one reverse step, the samplers.

x: clean tokens (B, L), ids 0..V-1. z_t: the same with some tokens replaced by mask_id = V.
t in [0, 1] is the time, 1 = all masked: each token is masked with probability
mask_share(t), here t itself. (The papers write alpha_t = 1 - mask_share(t) for the share
that is left.) Time runs backward when sampling, from t to s < t.

A "model" is model.py's Transformer, or a table of probabilities, as in tests/toy.py. This
file uses its config and
    model.hidden(z, at=None, rank=None)    states (B, L, C); at = (row, pos): (B, M, C)
    model.head(h)                          logits (N, V): what it predicts from states
    model.chunked_sum(h, f, *rows)         = f(head(h), *rows).sum(), in little memory
    model.cache(B, L, spare=0)             an empty KV cache of L + spare places a text
    model.read(cache, Reading(...))        puts keys and values of some positions in their
                                           places; then each sees the places before its
                                           limit, and itself: states (N, C), text by text
Attention "reveal": a token sees itself and the tokens revealed before it, a mask itself and
all tokens. So when a mask would be revealed does not matter, and in training any random
order fits any masks.

Names for when tokens are revealed: order (B, n), where order[b, i] is the position that is
revealed i-th; when (B, n), where when[b, i] is the step in which that happens; rank (B, L),
where rank[b, l] says how late position l is revealed: only the comparison of these numbers
counts (where none are given the model draws them). Slot i is the i-th place in the order;
where there is a KV cache, the prompt's positions come first: see prompt_first. An example,
L = 4: position 2 is revealed first, with 0, then 3 and 1: order = [2, 0, 3, 1], when = [0,
0, 1, 1], rank = [1, 3, 0, 2], and slot 1 is position 0.
Bookkeeping, such as order, is on the CPU, tokens and states on the model's device.
Randomness comes from torch's global generators.
"""
import typing

import torch

# upload: a CPU tensor to a device, without waiting; float64_device: the device, or the CPU
# for one that has no float64; in_float64: moved there, as float64
from data.devices import float64_device, in_float64, upload
from model import NOT_FINITE, Reading, cross_entropy

HEAD_ROWS = 512                  # states that the head is given at a time
DRAW_ROWS = 32                   # rows of logits drawn from at a time: see draw_tokens
COUPLE_SIZE = 2 ** 20            # numbers in one of couple's tables (n, V): 8 MB


# ---- the noise schedule: for another one, change mask_share and mask_rate

def mask_share(t):
    """1 - alpha_t, the share of tokens that are masked at times t (any shape): 0 at t = 0,
    1 at t = 1. Here the schedule that MDLM (arXiv 2406.07524) calls log-linear, after the
    noise -log alpha_t; alpha_t = 1 - t itself is linear."""
    return t


def mask_rate(t):
    """The derivative of mask_share, -alpha'_t, in the shape of t."""
    return torch.ones_like(t)


def reveal_share(t, s):
    """The chance that a mask of z_t is revealed in the step from t to s < t, in the shape
    of t: (alpha_s - alpha_t) / (1 - alpha_t), here (t - s) / t (MDLM, eq. 7)."""
    masked_t, masked_s = mask_share(t), mask_share(s)
    # where no token is masked, as at t = 0, there is nothing to reveal
    return torch.where(masked_t > 0, (masked_t - masked_s) / masked_t, 0.0)


# ---- the forward process and the bound

def sample_t(B, device=None):
    """B times in (0, 1], (B,): one uniform draw plus an even grid, so that every batch
    covers the whole range. Each t is uniform on its own (MDLM, section 3.3: low-discrepancy
    sampler)."""
    grid = torch.arange(B, device=device) / B                        # (B,)
    u = torch.rand(1, device=device) + grid
    return 1 - u % 1                                     # never 0, where nothing is masked


def q_sample(x, t, mask_id, keep=None):
    """The forward process q(z_t | x) at times t (B,): each token of x (B, L) is masked with
    probability 1 - alpha_t. keep (B, L) bool: tokens that are given, such as a prompt, and
    never masked; None: there are none. Returns z_t (B, L)."""
    share = mask_share(t)[:, None]                                   # (B, 1)
    masked = torch.rand(x.shape, device=x.device) < share            # (B, L)
    if keep is not None:
        masked &= ~keep
    return torch.where(masked, mask_id, x)


def rank_prompt_first(keep):
    """A random order of reveal, as ranks (B, L), in which the tokens to keep (B, L) come
    before all others, as they do in sampling: see prompt_first."""
    rank = torch.rand(keep.shape, device=keep.device)
    return torch.where(keep, rank - 1, rank)


def states_at(model, z, where, rank=None):
    """The states (N, C) at the N positions of z (B, L) where the bool `where` (B, L) is
    true, row by row. (hidden(z, at) would compute less in its last block, but N differs
    from call to call, which a compiler handles badly.)"""
    # on a CPU skip sequences of which nothing is wanted; on a GPU a batch that changes its
    # size, and may be empty, costs more than that saves
    if z.device.type == "cpu":
        rows = where.any(1)                                          # (B,)
        z, where = z[rows], where[rows]
        if rank is not None:
            rank = rank[rows]
    h = model.hidden(z, rank=rank)                                   # (rows, L, C)
    return h[where]                                                  # (N, C)


def nelbo(model, x, mask_id, keep=None):
    """Negative evidence lower bound of x (B, L), a scalar in nats per token (MDLM, eq. 10):

        1/L  E_t [ 1/t  sum over the masked tokens of  -log p(x_i | z_t) ]

    Why 1/t: about t L tokens are masked, and each may be the next one revealed. So 1/(t L)
    times the sum estimates the cost of one reveal; averaged over t it is the mean cost of a
    token over random orders. That is exact: a given set of k masks has the probability t^k
    (1 - t)^(L - k), and 1/t times that, integrated over t and summed over all sets of k,
    gives 1/k. So each k from 1 to L counts once, with the mean loss of a mask among k.
    (In general the weight is -alpha'_t / (1 - alpha_t).)
    Why a bound: in one order the costs add up to -log p(x | order), and their mean over
    orders is at least -log p(x) of the mixture of orders (Jensen's inequality).
    keep (B, L): tokens that are given, see q_sample. Then it is the bound of -log p(the
    others | these), in nats per token of the others (as in LLaDA, arXiv 2502.09992)."""
    t = sample_t(x.shape[0], x.device)                               # (B,)
    z = q_sample(x, t, mask_id, keep)
    masked = z == mask_id                                            # (B, L), N of them
    weight = mask_rate(t) / mask_share(t)                            # (B,), log-linear: 1/t
    weight = weight[:, None].expand_as(x)[masked]                    # (N,)

    count = x.numel()                    # tokens that could be masked
    rank = None                          # for attention "reveal": any order
    if keep is not None:
        count = (~keep).sum()
        rank = rank_prompt_first(keep)
    # the network, then the loss: the head is needed at the masks only
    h = states_at(model, z, masked, rank)                            # (N, C)
    # over all B L tokens (but those to keep), not over the masks: that there are few of
    # them at small t is what the weight 1/t makes up for
    return model.chunked_sum(h, weighted_nll, x[masked], weight) / count


def weighted_nll(logits, x, weight):
    """-log p(x) of ids x (n,) under logits (n, V), times weight (n,): (n,)."""
    return weight * cross_entropy(logits, x)


# ---- drawing tokens

def categorical(logits, dtype=torch.float64):
    """One exact draw per row: logits (..., V) -> ids (...).
    By inverting the cumulative sum in float64. In float32 tokens under about 1e-7 would be
    out of reach, which over many steps acts as a lower temperature (arXiv 2409.02908). The
    exponentials may be float32: that is a relative error, 1e-7 of each probability.
    A row that holds NaN gives V, the mask's id. The samplers check for that once, at their
    end; a check here would make the CPU wait for a GPU."""
    # probabilities up to a factor (float64 from the start takes 7 times as long)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()        # (..., V)
    weights = weights.to(float64_device(logits.device)).to(dtype)
    return draw_from(weights).to(logits.device)


def draw_from(weights):
    """One draw per row of weights (..., V), at least 0 and of any sum: ids (...). In place:
    the weights are lost."""
    V = weights.shape[-1]
    cdf = torch.cumsum(weights, -1, out=weights)                     # (..., V)
    total = cdf[..., -1:]                                            # (..., 1)
    # the first entry above a uniform draw
    u = torch.rand(total.shape, dtype=cdf.dtype, device=cdf.device) * total
    ids = torch.searchsorted(cdf, u, right=True)[..., 0]             # (...)
    ids = ids.clamp(max=V - 1)                         # u may have been rounded up to total
    return torch.where(total[..., 0].isfinite(), ids, V)


def draw_tokens(model, h, draw=categorical):
    """draw(logits) at each of the states h (N, C): ids (N,).
    To save memory, logits are computed for HEAD_ROWS states at a time. On a CPU, where
    fresh memory is slow, DRAW_ROWS of these are drawn from at a time, which is 6 times as
    fast; a GPU would be mostly idle with so few."""
    rows = DRAW_ROWS if h.device.type == "cpu" else HEAD_ROWS
    ids = []
    for states in h.split(HEAD_ROWS):
        for logits in model.head(states).split(rows):                # (rows, V)
            ids.append(draw(logits))
    return torch.cat(ids)


def sharpen(logits, temperature=1.0, top_p=1.0):
    """Logits (..., V) of a sharper distribution: divided by the temperature, then without
    the tokens outside the smallest set that has probability top_p. 1 and 1 change
    nothing."""
    logits = logits / temperature
    if top_p >= 1:
        return logits
    p, likeliest = in_float64(logits).softmax(-1).sort(dim=-1, descending=True)
    # a token is outside if those likelier than it have top_p; the likeliest always stays
    outside = p.cumsum(-1) - p >= top_p                      # (..., V), likeliest first
    outside = outside.scatter(-1, likeliest, outside)        # in the order of ids again
    return logits.masked_fill(outside.to(logits.device), -torch.inf)


# ---- the reverse process

def unmask_step(model, z, t, s, mask_id, rank=None):
    """One ancestral step from z_t to z_s, with t and s (B,) per sequence (MDLM, eq. 7).
    The reverse posterior reveals each mask with probability reveal_share(t, s), whatever
    the network says: so that comes first, and the head is needed at those positions only.
    distill.py's teacher takes such steps; `sample` has the same distribution, but draws all
    reveals beforehand, see plan.
    rank (B, L): when the tokens of z were revealed, for attention "reveal".
    Returns z_s (B, L), the bool reveal (B, L), and the states (N, C) at the revealed
    positions, from whose predictions the tokens were drawn."""
    # which masks are revealed
    share = reveal_share(t, s)[:, None]                              # (B, 1)
    chosen = torch.rand(z.shape, device=z.device) < share            # (B, L)
    reveal = (z == mask_id) & chosen                                 # (B, L), N of them
    # and what they become
    h = states_at(model, z, reveal, rank)                            # (N, C)
    z_s = z.clone()
    z_s[reveal] = draw_tokens(model, h)
    return z_s, reveal, h


@torch.no_grad()
def sample_plain(model, z, steps, mask_id):
    """What `sample` does, as a plain loop: fill every mask of z (B, L) in `steps` equal
    steps from t = 1 to t = 0, with as many calls. Returns ids (B, L). For full attention.
    `sample` has the same distribution, in less time: the tests enumerate it for both."""
    times = torch.linspace(1, 0, steps + 1, device=z.device).expand(len(z), -1)
    for i in range(steps):
        t, s = times[:, i], times[:, i + 1]                          # (B,) both
        z, _, _ = unmask_step(model, z, t, s, mask_id)
    return z


def plan(z, steps, mask_id):
    """Draw when each mask is revealed, which does not depend on the network. For z (B, L)
    with n masks in each row: order (B, n), their positions shuffled, and when (B, n),
    ascending, the step in which each of these is revealed. On the CPU. Raises ValueError if
    rows have different numbers of masks.

    sample_plain calls the network in every step. But which masks a step reveals does not
    depend on the network, so that can be drawn first: each mask is revealed in the step
    that draw_steps draws for it, independently of all others. A step that reveals nothing
    of a text changes nothing in it, and no network is told the time: so each text drops its
    empty steps, and numbers the others 0, 1, 2, ... The steps 7, 2, 7, 5 of four masks are
    sorted to 2, 5, 7, 7 and become 0, 1, 2, 2. Call i of a batch does step i of every text,
    although these steps may be at different times. A batch needs as many calls as its text
    with most steps, at most n, and its texts are independent of each other."""
    order = random_order(z, mask_id)
    B, n = order.shape
    # sorting loses nothing: the steps are independent draws, and order is shuffled
    when = draw_steps(steps, B, n).sort(dim=1).values                # (B, n)
    # number the steps 0, 1, 2, ... without gaps: how often they changed so far
    changes = torch.diff(when, dim=1, prepend=when[:, :1]) != 0      # (B, n)
    return order, changes.cumsum(1)


def random_order(z, mask_id):
    """The positions of the n masks in each row of z (B, L), shuffled: (B, n), on the CPU.
    Raises ValueError if rows have different numbers of masks."""
    masked = (z == mask_id).cpu()
    n = int(masked[0].sum())
    if bool((masked.sum(1) != n).any()):
        raise ValueError("every sequence of a batch must have the same number of masks")
    # sort random keys, with the prompt's keys behind them
    key = torch.rand(z.shape, dtype=torch.float64).masked_fill(~masked, 2)   # (B, L)
    return key.argsort(dim=1)[:, :n]


def prompt_first(order, L):
    """order (B, n) of the masks in texts of L positions, with the prompt's positions before
    it, in random order, as in training: (B, L)."""
    B, n = order.shape
    is_mask = torch.zeros(B, L, dtype=torch.bool).scatter_(1, order, True)
    prompt = torch.rand(B, L).masked_fill(is_mask, 2).argsort(1)[:, :L - n]
    return torch.cat((prompt, order), 1)


def draw_steps(steps, rows, n):
    """For each of (rows, n) masks the step, 0 to steps - 1, that reveals it, where `steps`
    equal steps lead from t = 1 to t = 0. A mask survives until t with probability
    mask_share(t), and is then revealed with reveal_share(t, s): together mask_share(t) -
    mask_share(s)."""
    # where mask_share(t) = t (tested on a grid of times) all steps are equally likely: the
    # same as below, in less time
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    if torch.equal(mask_share(grid), grid):
        return torch.randint(steps, (rows, n))

    # any other schedule: invert the share that is revealed by s, where each step ends
    s = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps      # (steps,)
    revealed = 1 - mask_share(s)                                     # (steps,), rising to 1
    u = torch.rand((rows, n), dtype=torch.float64)
    return torch.searchsorted(revealed, u, right=True)               # the first above u


@torch.no_grad()
def sample(model, z, steps, mask_id, draw=categorical, watch=None):
    """Ancestral sampling in `steps` equal steps: fill every mask of z (B, L).
    All that does not depend on the network is drawn before it is asked, see plan. So every
    step knows which positions it reveals: the last block, the head and the draw run there
    only. No mask is left at the end, no extra pass follows, and a step that reveals nothing
    calls no network: 1,024 steps on 64 tokens cost at most 64 calls.

    z: masks where text is wanted, the prompt elsewhere; the same number in every row.
    draw: logits (N, V) -> ids (N,). watch: called with z after each step that reveals
    something. Returns ids (B, L). Raises ValueError on uneven rows, and FloatingPointError
    where the model's predictions are not finite numbers."""
    order, when = plan(z, steps, mask_id)                            # (B, n) both
    sampler = sample_full
    if model.config.attention == "reveal":
        sampler = sample_cached
    z = sampler(model, z.clone(), order, when, draw, watch)
    return without_masks(z, mask_id)


def sample_full(model, z, order, when, draw, watch=None):
    """sample with full attention: each step computes whole sequences, the last block only
    where tokens are revealed. z (B, L) is filled in place; order, when: see plan."""
    row = torch.arange(len(z), device=z.device)[:, None]             # (B, 1)
    for i in range(steps_of(when)):
        # the masks revealed now, at most M in a text, N in all. As `when` ascends, they lie
        # side by side in the order
        now = span((when < i).sum(1), (when <= i).sum(1))            # (B, M)
        pos = upload(order.gather(1, now.slot), z.device)
        # what the network says there
        if i == 0:                       # the same, in less time
            h = first_states(model, z, row, pos)                     # (B, M, C)
        else:
            h = model.hidden(z, at=(row, pos))
        # and what is drawn from it, without the gaps (h has columns, not slots)
        b, column = now.valid.nonzero(as_tuple=True)                 # (N,) both
        b, column = upload(b, z.device), upload(column, z.device)
        h = h[b, column]                                             # (N, C)
        z[b, pos[b, column]] = draw_tokens(model, h, draw)
        if watch:
            watch(z.clone())
    return z


class Span(typing.NamedTuple):
    """Some slots of each text, side by side. Texts with fewer have gaps, of slot 0."""
    slot: torch.Tensor           # (B, M)
    valid: torch.Tensor          # (B, M) bool: False in the gaps


def span(begin, end):
    """The Span of slots begin[b] to end[b] - 1 of each text b. begin, end: (B,)."""
    slot = begin[:, None] + torch.arange(int((end - begin).max()))
    valid = slot < end[:, None]
    return Span(slot.where(valid, 0), valid)


def listed(slots, device):
    """The N slots of a Span as a pair of ids (N,), of texts and of slots, on the device."""
    b, column = slots.valid.nonzero(as_tuple=True)
    return upload(b, device), upload(slots.slot[b, column], device)


def sample_cached(model, z, order, when, draw, watch=None):
    """sample with attention in the order of reveal, and its exact KV cache: a step reads
    the tokens revealed in the one before, whose keys and values stay in the cache, and the
    masks that are revealed now. So each position is read twice, whatever the number of
    steps. z (B, L) is what to fill; order, when: see plan."""
    B, L = z.shape
    n = order.shape[1]                                               # masks of a text
    cache = model.cache(B, L)
    # from now on all is by slot, the prompt first, as if revealed in step -1: x is z in
    # the order of slots
    order = prompt_first(order, L)                                   # (B, L)
    when = torch.cat((torch.full((B, L - n), -1), when), 1)          # (B, L)
    order_z = upload(order, z.device)
    x = z.gather(1, order_z)                                         # (B, L)

    cached = torch.zeros(B, dtype=torch.long)            # tokens in the cache, of each text
    for i in range(steps_of(when)):
        known, end = (when < i).sum(1), (when <= i).sum(1)           # (B,) both
        # the N masks revealed now, and what the network says there; it reads, too, the
        # tokens that it has not read yet
        masks = span(known, end)
        if i == 0 and n == L and model.config.relative:
            # no prompt: nothing to store yet, and all masks have the same state
            h = blank_state(model, z).expand(int(masks.valid.sum()), -1)         # (N, C)
        else:
            # a mask has the place that its token will have, which then overwrites it
            new = make_reading(model, x, order, span(cached, known), masks, known,
                               place=masks.slot)
            h = model.read(cache, new)                               # (N, C)
            cached = known
        # and what is drawn from it
        x[listed(masks, z.device)] = draw_tokens(model, h, draw)                 # (N,)
        if watch:
            watch(by_position(x, order_z))
    return by_position(x, order_z)


def make_reading(model, x, order, tokens, masks, filled, place):
    """The Reading of some tokens (B, T) of x (B, L), which is by slot, and of some masks
    (B, M), a Span each. limit: a token of slot s sees the slots before s; a mask of slot s
    those of them that hold a token, the first min(s, filled), filled (B,). place (B, M):
    where in the cache the masks are kept; a token is kept in the place of its slot."""
    slot = torch.cat((tokens.slot, masks.slot), 1)                   # (B, T + M)
    valid = torch.cat((tokens.valid, masks.valid), 1)
    first = tokens.slot.shape[1]                                     # T, masks begin here
    idx = x.gather(1, upload(slot, x.device))
    idx[:, first:] = model.mask_id
    limit = torch.cat((tokens.slot, masks.slot.minimum(filled[:, None])), 1)
    place = torch.cat((tokens.slot, place), 1)
    return Reading(idx=idx, pos=order.gather(1, slot), place=place, limit=limit,
                   valid=valid, wanted_from=first)


def by_position(x, order):
    """What is in the order of slots, x (B, L), in that of positions again: (B, L)."""
    return torch.empty_like(x).scatter_(1, order, x)


def steps_of(when):
    """The number of steps that reveal something."""
    if not when.numel():
        return 0                                         # a text without masks
    return int(when.max()) + 1


def without_masks(z, mask_id):
    """z itself. Raises FloatingPointError if a mask is left in it, which draws leave only
    where predictions are NaN."""
    if bool((z == mask_id).any()):
        raise FloatingPointError(NOT_FINITE)
    return z


# ---- a shortcut for the first step; skip it at a first reading

def first_states(model, z, row, pos):
    """model.hidden(z, at=(row, pos)) of the first step, without computing twice what is
    alike: texts without a prompt are nothing but masks."""
    alike = bool((z == z[:1]).all())                     # all texts are equal
    # one of them has a mask at least, so if its ids are equal all are masks
    if alike and bool((z[0] == z[0, 0]).all()) and model.config.relative:
        return blank_state(model, z).expand(*pos.shape, -1)
    if alike:
        # one text, at the positions of all (1, B M)
        h = model.hidden(z[:1], at=(row[:1], pos.reshape(1, -1)))
        return h.view(*pos.shape, -1)
    return model.hidden(z, at=(row, pos))


def blank_state(model, z):
    """The state (1, C) of a mask in a text of nothing but masks, where config.relative
    holds: a single mask, alone, has the state of all, as ModelConfig.relative explains."""
    # any rank will do for a single position; without one the model would draw it
    rank = torch.zeros(1, 1, device=z.device)
    return model.hidden(z[:1, :1], rank=rank)[0]


# ---- exact sampling: the distribution of one token at a time, in a handful of calls
#
# The first `final` slots of a text keep their tokens, those up to `guessed` hold guesses,
# the rest nothing yet. A call asks for the slots from `final` to `end` - 1; c is the first
# of them that changes. One call (left to right, to be read; a diffusion model's order is
# shuffled):
#
#     slot       0     1     2     3     4     5     6
#     old        one   day   tom   lost  his   hat         final = 2, guessed = 6; end = 7
#     new        one   day   tom   lost  her   bag   .     c = 4: final = 5, guessed = 7
#
# The call predicts each of the slots 2 to 6 from the old tokens in the slots before it: 4
# from "one day tom lost", 5 from "one day tom lost his". Each guess becomes a draw from its
# prediction, one that equals the guess as often as possible (couple); a slot without a
# guess becomes a plain draw. Slots 2 and 3 stayed, so slot 4 was predicted from tokens that
# stand: 2, 3 and 4 are final. Slot 5 was predicted from "his", which is gone: "bag" is a
# guess. In the first call there are no guesses, and
# only the first slot becomes final; in each call at least one does. Once the early slots
# settle the story, most later guesses stay: then one call makes many final.
#
# Why one call is enough: with attention "reveal" a token sees itself and the tokens in the
# slots before it, a mask itself and those tokens, and nothing sees another mask. So a mask
# asked at each slot gives that slot's prediction from just the tokens before it. (So does
# the token before it, in AR.)
#
# Why it is exact: fix all draws at the slots before a slot s. They alone decide the
# predictions p1, p2, ... at s, and the call K that makes s final: the first that changes
# none of them. By couple the token at s after call k is a draw from pk, for every k; and K
# does not depend on that token. So the final one is a draw from pK, its prediction from
# final tokens. (If s were final once its own guess stayed, K would depend on the token, and
# tokens likely in two predictions would come too often.)
# Fixed points: arXiv 2002.03629; the coupling: 2211.17192.

def couple_rows(p, q, guess, mask_id):
    """Guesses (n,) are draws from q (n, V). Returns draws from p (n, V) that equal them as
    often as possible: a guess x stays with probability min(1, p(x) / q(x)), and otherwise
    is drawn from what p has more than q, max(p - q, 0) (speculative sampling, arXiv
    2211.17192). As min(p, q) + max(p - q, 0) = p, the result is a draw from p. Where guess
    is mask_id there is none, and the draw is from p. q is lost."""
    has_guess = guess != mask_id                                     # (n,)
    q[~has_guess] = 0                            # then max(p - q, 0), below, is p
    # p and q of the guess itself (n,); where there is none any token will do
    token = guess.where(has_guess, 0)[:, None]                       # (n, 1)
    p_guess, q_guess = p.gather(1, token)[:, 0], q.gather(1, token)[:, 0]
    # it stays with probability min(1, p / q)
    u = torch.rand_like(p_guess)
    stays = has_guess & (u * q_guess < p_guess)
    # the others are drawn anew; if p - q rounds to nothing positive, from p
    others, = (~stays).nonzero(as_tuple=True)                        # (m,)
    p, q = p[others], q[others]                                      # (m, V) both
    rest = (p - q).clamp_(min=0)
    empty = rest.amax(1, keepdim=True) == 0
    drawn = guess.clone()
    drawn[others] = draw_from(torch.where(empty, p, rest))
    return drawn


def sample_exact_plain(predict, L, mask_id):
    """sample_exact as a plain loop: one text, left to right, all slots asked in each call,
    and no cache. predict(x (L,)) -> probabilities (L, V), those of slot s given the tokens
    before it, x[:s]. Returns ids (L,) and the number of calls."""
    x = torch.full((L,), mask_id)
    q = None                             # what the guesses were drawn from
    final, calls = 0, 0
    while final < L:
        p = predict(x).double()                                      # (L, V), one call
        if q is None:
            q = torch.zeros_like(p)                                  # no guesses yet
        calls += 1
        # each guess becomes a draw from its new prediction
        new = x.clone()                                              # (L,)
        new[final:] = couple_rows(p[final:], q[final:], x[final:], mask_id)
        # the first slot that changed is final, like all before it
        changed, = (new != x).nonzero(as_tuple=True)                 # slots
        final = L
        if len(changed):
            final = int(changed[0]) + 1
        x, q = new, p
    return x, calls


def couple(model, h, h_old, x, mask_id, adjust=None):
    """couple_rows for guesses x (N,), with q what the states h_old (N, C) predict, and p
    what h (N, C) predicts: (N,). adjust: see sample_exact."""
    def probabilities(states):
        """What states (n, C) predict: (n, V). The softmax may be float32: as in
        categorical, that is a relative error, 1e-7 of each probability."""
        logits = model.head(states)
        if adjust:
            logits = adjust(logits)
        return in_float64(logits.softmax(-1))

    ids = []
    # some at a time, as in draw_tokens: never all (N, V)
    size = max(DRAW_ROWS, COUPLE_SIZE // model.config.vocab)
    for new, old, guess in zip(h.split(size), h_old.split(size), x.split(size)):
        p, q = probabilities(new), probabilities(old)                # (n, V) both
        ids.append(couple_rows(p, q, guess.to(p.device), mask_id))
    return torch.cat(ids).to(x.device)


@torch.no_grad()
def sample_exact(model, z, mask_id, adjust=None, ahead=8, max_calls=None, watch=None):
    """Fill every mask of z (B, L), in few calls, with exactly the distribution of revealing
    one token at a time, as told above: for attention in the order of reveal, and for AR
    models, whose order is left to right. sample_exact_plain is the same without the cache.
    adjust: logits (N, V) -> logits, such as sharpen; None: the model's own.
    ahead: with f slots final a call asks for the next ahead + f: few at first, when far
    guesses are mostly wrong; None: all.
    max_calls: stop there and leave the guesses as they are, which is not exact.
    watch: called after each call with z and the bool (B, L) of its final tokens.
    Returns ids (B, L) and the calls that each text took (B,); a batch takes as many as its
    slowest text. Raises ValueError (see how_to_ask), and FloatingPointError at predictions
    of NaN."""
    B, L = z.shape
    ahead = L if ahead is None else min(ahead, L)
    # ask: ask_masks or ask_tokens; order (B, L): the positions of slots
    ask, order = how_to_ask(model, z, mask_id)
    order_z = upload(order, z.device)
    x = z.gather(1, order_z)             # (B, L), tokens by slot; a mask where no guess is

    # of each text, (B,): slots 0 to final - 1 are done, at first the prompt's; those up to
    # guessed - 1 hold guesses, and the rest masks
    final = (x != mask_id).sum(1).cpu()
    guessed = final
    # the first slot whose token is not yet in the cache, or is an old one there; -1: AR's
    # start symbol, too
    unread = torch.full_like(final, -1)
    cache = model.cache(B, L, spare=L)
    states = None                        # (B, L, C): what each slot's token was drawn from
    calls, made = torch.zeros(B, dtype=torch.long), 0
    while bool((final < L).any()) and made != max_calls:
        made += 1
        calls += final < L
        # what is asked: the slots from `final` to `end` - 1 (B,), N together; of a finished
        # text none. `end` never falls, so every guess is asked again
        end = final + (ahead + final)
        if made == max_calls:
            end = end + L                                # no slot may stay without a guess
        end = end.clamp(max=L)
        h = ask(model, cache, order, x, unread, guessed, (final, end))           # (N, C)
        if states is None:
            states = h.new_zeros(B, L, h.shape[1])

        # each guess becomes a draw from its new prediction; h has the rows of `listed`
        at = listed(span(final, end), z.device)          # (N,) text, slot
        old, x = x, x.clone()
        x[at] = couple(model, h, states[at], old[at], mask_id, adjust)
        states[at] = h
        # c (B,): the first slot that changed, or `end` if none did, which then is L. (A
        # slot without a guess held a mask, so it has changed: all behind it stay guesses)
        changed = (x != old).cpu()
        c = torch.where(changed, torch.arange(L), end[:, None]).amin(1)
        final = (c + 1).minimum(end)
        guessed = end
        # the call has read what stayed, but not the new token at c; the old keys behind c
        # are overwritten by the next call, which reads all guesses again
        unread = final - 1
        if watch:
            done = torch.arange(L) < final[:, None]      # (B, L), by slot
            watch(by_position(x, order_z), by_position(done, order))
    return without_masks(by_position(x, order_z), mask_id), calls


# ---- how one call asks: the states (N, C) that predict slots `begin` to `end` - 1, each
# from the tokens before it. What follows is how the cache makes that one call

def how_to_ask(model, z, mask_id):
    """What differs between models in sample_exact: (ask_masks or ask_tokens, order (B, L)).
    Raises ValueError for full attention; AR: if z has gaps; "reveal": if its rows differ in
    their number of masks."""
    B, L = z.shape
    if model.config.causal:
        if bool(((z[:, 1:] != mask_id) & (z[:, :-1] == mask_id)).any()):
            raise ValueError("an AR model goes on from a prompt, and fills no gaps")
        return ask_tokens, torch.arange(L).repeat(B, 1)
    if model.config.attention != "reveal":
        raise ValueError("exact sampling needs attention in the order of reveal")
    return ask_masks, prompt_first(random_order(z, mask_id), L)


def ask_masks(model, cache, order, x, unread, guessed, asked):
    """One call of a model with attention in the order of reveal: the states (N, C) of masks
    at the slots from begin to end - 1, with asked = begin, end, (B,) both; N together. It
    reads, first, the tokens of x (B, L) that the cache lacks, from slot `unread` (B,) on;
    then the masks. Both the token of slot s and its mask see the tokens of the slots before
    s that have one. The cache keeps the token of slot s in place s, and its mask in place
    L + s: in place s it would overwrite the guess there, which this call reads, too."""
    begin, end = asked
    masks = span(begin, end)
    # the token of the last slot asked is not read: nothing that is asked comes after it
    tokens = span(unread.clamp(min=0), (end - 1).minimum(guessed))
    place = masks.slot + x.shape[1]
    new = make_reading(model, x, order, tokens, masks, guessed, place)
    return model.read(cache, new)


def ask_tokens(model, cache, order, x, unread, guessed, asked):
    """ask_masks of an AR model, which predicts slot s at the token of slot s - 1, so that
    no masks are needed (skip this at a first reading):

        place in the cache     0       1     2     3
        what is there          start   one   day   tom       the token of slot place - 1
        what it predicts       slot 0  1     2     3

    Slots beyond the guesses cannot be predicted yet. Their states are 0, so their first
    guesses are arbitrary draws, from head(0); couple corrects them, as it does any."""
    B, L = x.shape
    start = torch.full((B, 1), model.mask_id, device=x.device)
    shifted = torch.cat((start, x[:, :-1]), 1)                       # (B, L)
    # from the place of slot `unread`'s token to the place that predicts the last slot
    # asked; a text that is finished asks for nothing
    begin, end = asked
    last = (end - 1).minimum(guessed).where(begin < end, unread)
    places = span(unread + 1, last + 1)                              # (B, M)
    idx = shifted.gather(1, upload(places.slot, x.device))
    new = Reading(idx=idx, pos=places.slot, place=places.slot, limit=places.slot,
                  valid=places.valid)
    h = model.read(cache, new)
    states = h.new_zeros(B, L, h.shape[1])
    states[listed(places, x.device)] = h
    return states[listed(span(begin, end), x.device)]                # (N, C)


# ---- the same call on a given text: its likelihood

@torch.no_grad()
def nll_in_order(model, x, mask_id, order=None, known=0):
    """-log p(x | order) of each text of x (B, L), exactly and in one call, in nats: (B,).
    For attention in the order of reveal. order (B, L): positions, on the CPU; random ones
    unless given. known: the first so many slots, a number or (B, 1), are given and cost
    nothing.
    The same reading as in sample_exact, with the text itself as the guess: a mask at each
    slot says what the token costs given those before it. The mean over orders is at least
    -log p(x), see nelbo, which estimates it with much more noise: here neither t nor masks
    are drawn, and every token counts."""
    B, L = x.shape
    if order is None:
        order = random_order(torch.full_like(x, mask_id), mask_id)   # (B, L)
    by_slot = x.gather(1, upload(order, x.device))                   # (B, L)
    # all slots are guessed and no token is in the cache; asked are those that are not known
    unread, end = torch.zeros(B, dtype=torch.long), torch.full((B,), L)
    begin = torch.as_tensor(known).reshape(-1).expand(B)             # (B,)
    cache = model.cache(B, L, spare=L)
    h = ask_masks(model, cache, order, by_slot, unread, end, (begin, end))       # (N, C)
    asked = span(begin, end)
    of_asked = nats_of(model, h, by_slot[listed(asked, x.device)])   # (N,)
    nats = of_asked.new_zeros(B, L)              # on the device that has float64
    nats[listed(asked, nats.device)] = of_asked
    return nats.sum(1)                                               # (B,)


def nats_of(model, h, ids):
    """-log p of ids (N,) under what the states h (N, C) predict: (N,), float64. The head is
    given some states at a time, see draw_tokens."""
    nats = []
    for states, some in zip(h.split(HEAD_ROWS), ids.split(HEAD_ROWS)):
        nats.append(in_float64(cross_entropy(model.head(states), some)))
    return torch.cat(nats)
