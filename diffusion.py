"""Masked diffusion as plain functions: the noise, the bound, one reverse step, and sampling
in a given number of steps. (Exact sampling, without such a number, is in exact.py.)

x: clean tokens (B, L), ids 0..V-1. z_t: the same with some tokens replaced by mask_id = V.
t in [0, 1] is the time, 1 = all masked: each token is masked with probability
mask_share(t), here t itself. (The papers write alpha_t = 1 - mask_share(t) for the share
that is left.) Time runs backward when sampling, from t to s < t.

A "model" is model.py's Transformer, or a table of probabilities, as in tests/toy.py. This
file uses its config and
    model.hidden(z, at=None, rank=None)    states (B, L, C); at = (row, pos): (B, M, C)
    model.head(h)                          logits (N, V): what it predicts from states
    model.chunked_sum(h, f, *rows)         = f(head(h), *rows).sum(), in little memory
(sample_cached needs more, see there). rank (B, L) is for attention "reveal" alone: a
lower number means revealed earlier. A token sees itself and the tokens revealed before it,
a mask itself and all tokens. So a mask's own rank does not matter, and training may simply
rank all positions at random.

The samplers' bookkeeping is on the CPU, tokens and states are on the model's device.
Randomness comes from torch's global generators.
"""
import typing

import torch

# NOT_FINITE: an error's words; Reading: what is asked of a model with a KV cache
from cache import NOT_FINITE, Reading
# in_float64: as float64, on the CPU for a device that has none; upload: a CPU tensor to a
# device, without waiting
from data.devices import in_float64, upload
from model import cross_entropy

HEAD_ROWS = 512                  # states that the head is given at a time
DRAW_ROWS = 32                   # rows of logits drawn from at a time: see draw_tokens


# ---- the noise schedule: for another one, change mask_share and mask_rate

def mask_share(t):
    """The share of tokens that are masked at times t (any shape): 0 at t = 0, 1 at t = 1.
    MDLM (arXiv 2406.07524) calls this schedule log-linear: its noise, -log alpha_t = -log(1
    - t), is the log of something linear."""
    return t


def mask_rate(t):
    """The derivative of mask_share (in the papers -alpha'_t), in the shape of t."""
    return torch.ones_like(t)


def reveal_share(t, s):
    """The chance that a mask of z_t is revealed in the step from t to s < t, in the shape
    of t. Noise only adds masks: what is masked at s still is at t. So P(masked at s |
    masked at t) = mask_share(s) / mask_share(t), here s / t. Otherwise it is revealed: with
    probability 1 - s / t = (t - s) / t (MDLM, eq. 7)."""
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
    probability mask_share(t). keep (B, L) bool: tokens that are given, such as a prompt,
    and never masked; None: there are none. Returns z_t (B, L)."""
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
    """The states (N, C) at some positions of z (B, L). where: two index tensors (N,), of
    texts and of positions, as nonzero(as_tuple=True) gives them. (Not by hidden's `at`,
    which wants equally many positions in each text.)"""
    text, position = where
    # on a CPU leave out texts of which nothing is wanted: most of them, where a step of
    # distill.py is so short that it reveals a mask in few. (On a GPU a batch of another
    # size each time is likely to cost more than that saves)
    if z.device.type == "cpu":
        rows, text = text.unique(return_inverse=True)
        z = z[rows]
        if rank is not None:
            rank = rank[rows]
    h = model.hidden(z, rank=rank)                                   # (rows, L, C)
    return h[text, position]                                         # (N, C)


def nelbo(model, x, mask_id, keep=None):
    """The training loss of a diffusion model: the negative evidence lower bound of a text,
    in nats per token (MDLM, eq. 10),

        1/L  E_{t, z_t} [ 1/t  sum over the masked tokens of  -log p(x_i | z_t) ]

    averaged over the texts of x (B, L): a scalar.

    Why 1/t: reveal the tokens one at a time in a random order; a reveal costs
    -log p(token | those revealed before it). At time t about t L masks are left, and each
    may be the next. So 1/(t L) times the sum is about the mean cost of the next reveal.
    Averaged over t and z_t "about" becomes "exactly". Take one set of k masks:

        its probability at time t is                  t^k (1 - t)^(L - k)
        times 1/t, integrated over t, this is         1 / (k (L choose k))

    which is the weight of the set's sum: 1/k makes it a mean over its masks, 1/(L choose k)
    a mean over all sets of size k. In a random order all these sets are equally likely to
    be left, and each mask of a set to be next: so this is the cost of the reveal with k
    masks left. Each k from 1 to L counts once; 1/L averages them. (In general the weight is
    mask_rate(t) / mask_share(t).)

    Why a bound: in one order the costs add up to -log p(x | order), and their mean over
    orders is at least -log p(x) of the mixture of orders (Jensen's inequality).

    keep (B, L): tokens that are given, see q_sample. Then it bounds -log p(the others |
    these), in nats per token that is not given, over all texts together (as in LLaDA, arXiv
    2502.09992)."""
    t = sample_t(x.shape[0], x.device)                               # (B,)
    z = q_sample(x, t, mask_id, keep)
    # the N masks, as indices of texts and of positions, (N,) each
    masked = (z == mask_id).nonzero(as_tuple=True)
    text, _ = masked
    weight = (mask_rate(t) / mask_share(t))[text]                    # (N,), here 1/t

    count = x.numel()                    # tokens that could be masked
    rank = None                          # for attention "reveal": any order
    if keep is not None:
        count = (~keep).sum()
        rank = rank_prompt_first(keep)
    # the network, then the loss: the head is needed at the masks only
    h = states_at(model, z, masked, rank)                            # (N, C)
    # divided by the number of all tokens (but those to keep), not of masks: the weight 1/t
    # already makes up for there being few masks at small t
    return model.chunked_sum(h, weighted_nll, x[masked], weight) / count


def weighted_nll(logits, x, weight):
    """-log p(x) of ids x (n,) under logits (n, V), times weight (n,): (n,)."""
    return weight * cross_entropy(logits, x)


# ---- drawing tokens

def categorical(logits):
    """One exact draw per row: logits (..., V) -> ids (...).
    By inverting the cumulative sum in float64. In float32 tokens under about 1e-7 would be
    out of reach, which over many steps acts as a lower temperature (arXiv 2409.02908). The
    exponentials may be float32: their error is relative, so an unlikely token's chance is
    off by 1e-7 of itself.
    A row that holds NaN gives V, the mask's id. `sample` checks for that once, at its end;
    a check here would make the CPU wait for a GPU."""
    # probabilities up to a factor (float64 from the start takes 7 times as long)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()        # (..., V)
    return draw_from(in_float64(weights)).to(logits.device)


def draw_from(weights, u=None):
    """One draw per row of weights (..., V), at least 0 and of any sum: ids (...), V where
    the sum is not finite. In place: the weights are lost. u (..., 1): uniform random
    numbers, drawn here unless given."""
    V = weights.shape[-1]
    cdf = weights.cumsum_(-1)                                        # (..., V)
    total = cdf[..., -1:]                                            # (..., 1)
    if u is None:
        u = torch.rand(total.shape, dtype=cdf.dtype, device=cdf.device)
    # the first entry above u, a share of the total
    ids = torch.searchsorted(cdf, u * total, right=True)[..., 0]     # (...)
    ids = ids.clamp(max=V - 1)           # a safeguard, should rounding take u up to total
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
    the tokens outside the smallest set that has probability top_p. 1 and 1 change nothing.
    sample.py gives `sample` a draw that sharpens first."""
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
    """One step of generation from z_t to z_s, with t and s (B,) per sequence (the papers'
    ancestral sampling from the reverse posterior; MDLM, eq. 7). Each mask is revealed with
    probability reveal_share(t, s), whatever the network says, and becomes a draw from its
    prediction. So the positions are chosen first, and the head runs at these only.
    distill.py's teacher takes such steps; `sample` has the same distribution, but draws all
    reveals beforehand, see plan.
    rank (B, L): when the tokens of z were revealed, for attention "reveal"; before another
    step the caller gives those revealed here higher numbers, as distill.py does.
    Returns (z_s, revealed, h): z_s (B, L); where something was revealed, as indices (N,) of
    texts and of positions; and the states (N, C) there, from whose predictions the tokens
    were drawn."""
    # which masks are revealed
    share = reveal_share(t, s)[:, None]                              # (B, 1)
    chosen = torch.rand(z.shape, device=z.device) < share            # (B, L)
    revealed = ((z == mask_id) & chosen).nonzero(as_tuple=True)      # N of them
    # and what they become
    h = states_at(model, z, revealed, rank)                          # (N, C)
    z_s = z.clone()
    z_s[revealed] = draw_tokens(model, h)
    return z_s, revealed, h


@torch.no_grad()
def sample_plain(model, z, steps, mask_id):
    """What `sample` does, as a plain loop: fill every mask of z (B, L) in `steps` equal
    steps from t = 1 to t = 0, one network call each. Returns ids (B, L). For full
    attention.
    `sample` has the same distribution, in less time: the tests enumerate it for both."""
    times = torch.linspace(1, 0, steps + 1, device=z.device).expand(len(z), -1)
    for i in range(steps):
        t, s = times[:, i], times[:, i + 1]                          # (B,) both
        z, _, _ = unmask_step(model, z, t, s, mask_id)
    return z


# ---- the same distribution, faster: all reveals are drawn before the network is called.
#
# The names of this part:
#     position   where a token stands in its text
#     slot       its number in the order of reveal: slot i of text b is position order[b, i]
#     order      (B, n), n masks in each text: order[b, i] is the position of slot i
#     when       (B, n): when[b, i] is the step that reveals slot i
# An example, L = 4: positions 2 and 0 are revealed in step 0, then 3 and 1 in step 1:
# order = [2, 0, 3, 1], when = [0, 0, 1, 1], and slot 1 is position 0.

def plan(z, steps, mask_id):
    """Draw when each mask is revealed, which does not depend on the network. For z (B, L)
    with n masks in each row: order (B, n), their positions shuffled, and when (B, n),
    ascending, the step in which each of these is revealed. On the CPU. Raises ValueError if
    rows have different numbers of masks.

    Each mask is revealed in the step that draw_steps draws for it, independently of all
    others. sample_plain calls the network in every step; but a step that reveals nothing of
    a text changes nothing in it, and no network is told the time: so each text drops its
    empty steps, and numbers the others 0, 1, 2, ... The steps 7, 2, 7, 5 of four masks are
    sorted to 2, 5, 7, 7 and become 0, 1, 2, 2. Call i of a batch serves the i-th step left
    of each text, whatever its time. A batch needs as many calls as its text
    with most steps, at most n, and its texts are independent of each other."""
    order = random_order(z, mask_id)
    B, n = order.shape
    # sorting loses nothing: the steps are independent draws, and order is shuffled
    when = draw_steps(steps, B, n).sort(dim=1).values                # (B, n)
    # number the steps 0, 1, 2, ... without gaps: how often `when` has changed so far
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


def draw_steps(steps, rows, n):
    """For each of (rows, n) masks the step, 0 to steps - 1, that reveals it, where `steps`
    equal steps lead from t = 1 to t = 0. A mask survives until t with probability
    mask_share(t), and is then revealed with reveal_share(t, s): together mask_share(t) -
    mask_share(s)."""
    # if mask_share(t) = t (tested on a grid) all steps are equally likely: the same as
    # below, in less time
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    if torch.equal(mask_share(grid), grid):
        return torch.randint(steps, (rows, n))

    # any other schedule: s is the time at which each step ends, `revealed` the share of the
    # masks revealed by then; a mask's step is the first whose share is above a uniform draw
    s = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps      # (steps,)
    revealed = 1 - mask_share(s)                                     # (steps,), rising to 1
    u = torch.rand((rows, n), dtype=torch.float64)
    return torch.searchsorted(revealed, u, right=True)               # the first above u


@torch.no_grad()
def sample(model, z, steps, mask_id, draw=categorical, watch=None):
    """Fill every mask of z (B, L) in `steps` equal steps.
    All that does not depend on the network is drawn before it is asked, see plan. So every
    step knows which positions it reveals: the last block, the head and the draw run there
    only. The last step ends at t = 0, where no mask is left; and a step that reveals
    nothing calls no network: 1,024 steps on 64 tokens cost at most 64 calls.

    z: masks where text is wanted, the prompt elsewhere; the same number in every row.
    draw: logits (N, V) -> ids (N,). watch: called with z after each step that reveals
    something. Returns ids (B, L). Raises ValueError on uneven rows, and FloatingPointError
    where the model's predictions are not finite numbers."""
    order, when = plan(z, steps, mask_id)                            # (B, n) both
    sampler = sample_full
    if model.config.attention == "reveal":
        sampler = sample_cached
    z = sampler(model, z.clone(), order, when, draw, watch)
    return check_filled(z, mask_id)


class Span(typing.NamedTuple):
    """Of each text a run of slots, filled up with slot 0 to the longest."""
    slot: torch.Tensor           # (B, M)
    valid: torch.Tensor          # (B, M) bool: False where it is filled up


def span(begin, end):
    """The Span of slots begin[b] to end[b] - 1 of each text b. begin, end: (B,). For
    example begin = [0, 0], end = [2, 1]: slot = [[0, 1], [0, 0]], and valid[1, 1] is False.
    """
    slot = begin[:, None] + torch.arange(int((end - begin).max()))
    valid = slot < end[:, None]
    return Span(slot.where(valid, 0), valid)


def steps_of(when):
    """The number of steps that reveal something."""
    if not when.numel():
        return 0                                         # a text without masks
    return int(when.max()) + 1


def sample_full(model, z, order, when, draw, watch=None):
    """sample with full attention: each step computes whole sequences, the last block only
    where tokens are revealed. z (B, L) is filled in place; order, when: see plan."""
    row = torch.arange(len(z), device=z.device)[:, None]             # (B, 1)
    blank = order.shape[1] == z.shape[1]         # nothing but masks: there is no prompt
    for i in range(steps_of(when)):
        # the masks revealed now, at most M in a text, N in all. As `when` ascends, they lie
        # side by side in the order
        now = span((when < i).sum(1), (when <= i).sum(1))            # (B, M)
        pos = upload(order.gather(1, now.slot), z.device)
        # what the network says there
        if i == 0 and blank:             # the same, in less time
            h = blank_states(model, z, pos)                          # (B, M, C)
        else:
            h = model.hidden(z, at=(row, pos))
        # and what is drawn from it, at text b, column `column` of h and pos
        b, column = now.valid.nonzero(as_tuple=True)                 # (N,) both
        b, column = upload(b, z.device), upload(column, z.device)
        position = pos[b, column]                                    # (N,)
        z[b, position] = draw_tokens(model, h[b, column], draw)
        if watch:
            watch(z.clone())
    return z


def check_filled(z, mask_id):
    """z itself. Raises FloatingPointError if a mask is left in it, which happens only where
    a prediction is NaN, see categorical."""
    if bool((z == mask_id).any()):
        raise FloatingPointError(NOT_FINITE)
    return z


# ---- a shortcut for the first step; skip it at a first reading

def blank_states(model, z, pos):
    """model.hidden(z, at) at positions pos (B, M), where z is nothing but masks: (B, M, C).
    All texts are then alike, so one is computed for all, at the positions of all."""
    if model.config.masks_alike:
        return blank_state(model, z).expand(*pos.shape, -1)
    text = torch.zeros(1, 1, dtype=torch.long, device=z.device)
    h = model.hidden(z[:1], at=(text, pos.reshape(1, -1)))           # (1, B M, C)
    return h.view(*pos.shape, -1)


def blank_state(model, z):
    """The state (1, C) of a mask in a text of nothing but masks, where config.masks_alike
    holds: a single mask, alone, has the state of all, as is explained there."""
    # any rank will do for a single position; without one the model would draw it
    rank = torch.zeros(1, 1, device=z.device)
    return model.hidden(z[:1, :1], rank=rank)[0]


# ---- attention in the order of reveal: the same sampler with a KV cache, which is exact.
# Skip this at a first reading; it needs cache.py, which has an example. Here the prompt has
# slots, too, the first ones, and a token is kept in the cache in the place of its slot. Of
# two tokens revealed in one step the later in the order sees the earlier; when they were
# drawn, as masks, neither saw the other. The model has two more functions, and a mask_id:
#
#     model.cache(B, L, spare=0)         an empty KV cache of L + spare places a text
#     model.read(cache, Reading(...))    stores keys and values of some positions, each in
#                                        its place; then each sees the places before its
#                                        limit, and its own. Returns the states (N, C) of
#                                        the valid positions from column wanted_from on,
#                                        text by text, as `listed` lists them

def sample_cached(model, z, order, when, draw, watch=None):
    """sample with attention in the order of reveal: a step reads the tokens revealed in the
    one before, whose keys and values stay in the cache, and the masks revealed now. So each
    position is read at most twice, whatever the number of steps. z (B, L) is what to fill;
    order, when: see plan. In the example above plan, step 0 reads the masks of slots 0 and
    1 (unless the shortcut serves); step 1 reads the tokens of slots 0 and 1, and the masks
    of 2 and 3."""
    B, L = z.shape
    n = order.shape[1]                                               # masks of a text
    cache = model.cache(B, L)
    # from here on the slots include the prompt, as if it were revealed in step -1
    order = prompt_first(order, L)                                   # (B, L)
    when = torch.cat((torch.full((B, L - n), -1), when), 1)          # (B, L)
    order_z = upload(order, z.device)    # order, on z's device
    x = z.gather(1, order_z)             # (B, L), masks too: x[b, i] = z[b, order[b, i]]

    cached = torch.zeros(B, dtype=torch.long)            # tokens in the cache, of each text
    for i in range(steps_of(when)):
        known, end = (when < i).sum(1), (when <= i).sum(1)           # (B,) both
        # the N masks revealed now. The network reads them, and with them the tokens that
        # it has not read yet
        masks = span(known, end)
        if i == 0 and n == L and model.config.masks_alike:
            # no prompt: nothing to store yet, and all masks have the same state
            h = blank_state(model, z).expand(int(masks.valid.sum()), -1)         # (N, C)
        else:
            # a mask sees the known tokens; its key and value lie in its slot's place until
            # its token's replace them
            limit = known[:, None].expand_as(masks.slot)
            new = make_reading(model, x, order, span(cached, known), masks, limit,
                               place=masks.slot)
            h = model.read(cache, new)                               # (N, C)
            cached = known
        # and what is drawn from it
        x[listed(masks, z.device)] = draw_tokens(model, h, draw)                 # (N,)
        if watch:
            watch(by_position(x, order_z))
    return by_position(x, order_z)


def make_reading(model, x, order, tokens, masks, limit, place):
    """The Reading of some tokens (B, T), then some masks (B, M), each a Span of x (B, L),
    which is by slot. A token is kept in the place of its slot, and sees the slots before
    it. limit, place (B, M): of the masks."""
    slot = torch.cat((tokens.slot, masks.slot), 1)                   # (B, T + M)
    valid = torch.cat((tokens.valid, masks.valid), 1)
    T = tokens.slot.shape[1]             # the masks' first column
    idx = x.gather(1, upload(slot, x.device))
    idx[:, T:] = model.mask_id           # in exact.py guesses may stand there
    limit = torch.cat((tokens.slot, limit), 1)
    place = torch.cat((tokens.slot, place), 1)
    return Reading(idx=idx, pos=order.gather(1, slot), place=place, limit=limit,
                   valid=valid, wanted_from=T)


def prompt_first(order, L):
    """order (B, n) of the masks in texts of L positions, with the prompt's positions before
    it, in random order, as in training: (B, L)."""
    B, n = order.shape
    is_mask = torch.zeros(B, L, dtype=torch.bool).scatter_(1, order, True)
    # sort random keys in [0, 1), with the masks' keys, 2, behind them
    prompt = torch.rand(B, L).masked_fill(is_mask, 2).argsort(1)[:, :L - n]
    return torch.cat((prompt, order), 1)


def listed(slots, device):
    """The N valid slots of a Span, as indices (N,) of texts and of slots, on the device."""
    b, column = slots.valid.nonzero(as_tuple=True)
    return upload(b, device), upload(slots.slot[b, column], device)


def by_position(x, order):
    """What is in the order of slots, x (B, L), in that of positions again: (B, L)."""
    return torch.empty_like(x).scatter_(1, order, x)
