"""Masked diffusion as pure functions: the noise, the bound, one reverse step, the samplers.

x: clean tokens (B, L), ids 0..V-1. z_t: the same with some tokens replaced by mask_id = V.
t in [0, 1] is the time, 1 = all masked: each token survives with probability alpha_t, by
default 1 - t, see mask_share. Time runs backward when sampling, from t to s < t.

A "model" is anything that has a config (of which attention and relative are read here) and
    model.hidden(z, at=None, rank=None) -> states (B, L, C), or (N, C) at the N positions `at`
    model.head(h) -> logits (N, V)         what it predicts from such states
    model.chunked_sum(h, f, *rows)         = f(head(h), *rows).sum(), in little memory
as model.py's Transformer, or a law in a table, as in tests/toy.py.

Two names for when a token is revealed: order (B, n), order[b, i] is the position that is revealed
i-th; rank (B, L), rank[b, l] is when position l is revealed. Randomness comes from torch's global
generators.
"""
import torch
import torch.nn.functional as F

from model import NOT_FINITE

ROWS, FEW = 512, 32              # logits (ROWS, V) at a time, and in one draw


# ---- the noise schedule: for another one, change mask_share and mask_rate

def mask_share(t):
    """1 - alpha_t, the share of tokens that are masked at times t (any shape): 0 at t = 0, 1 at
    t = 1. Here the log-linear schedule of MDLM (arXiv 2406.07524), alpha_t = 1 - t."""
    return t


def mask_rate(t):
    """The derivative of mask_share, -alpha'_t, in the shape of t."""
    return torch.ones_like(t)


def reveal_share(t, s):
    """The chance that a mask of z_t is revealed in the step from t to s < t, in the shape of t:
    (alpha_s - alpha_t) / (1 - alpha_t), which is (t - s) / t (MDLM, eq. 7)."""
    masked_t, masked_s = mask_share(t), mask_share(s)
    # where no token is masked, as at t = 0, there is nothing to reveal
    return torch.where(masked_t > 0, (masked_t - masked_s) / masked_t, 0.0)


# ---- the forward process and the bound

def sample_t(B, device=None):
    """B times in (0, 1], (B,): one uniform draw plus an even grid, so that every batch covers the
    whole range. Each t is uniform on its own (MDLM, section 3.3: low-discrepancy sampler)."""
    u = torch.rand(1, device=device) + torch.arange(B, device=device) / B
    return 1 - u % 1


def q_sample(x, t, mask_id):
    """The forward process q(z_t | x) at times t (B,): each token of x (B, L) is masked with
    probability 1 - alpha_t. Returns z_t (B, L)."""
    masked = torch.rand(x.shape, device=x.device) < mask_share(t)[:, None]   # (B, L)
    return torch.where(masked, mask_id, x)


def states_at(model, z, at, rank=None):
    """The states (N, C) at the N positions of z (B, L) where the bool `at` is true, row by row.
    Sequences without any are not computed."""
    rows = at.any(1)                                                 # (B,)
    if rank is not None:
        rank = rank[rows]
    return model.hidden(z[rows], rank=rank)[at[rows]]


def nelbo(model, x, mask_id):
    """Negative evidence lower bound of x (B, L), a scalar in nats per token (MDLM, eq. 10):
    E_t (1/t) sum over the masked tokens of -log p(x_i | z_t). The weight is
    -alpha'_t / (1 - alpha_t) = 1/t: t masks a share t of the tokens, so with it every t counts
    alike. Divided by all B * L tokens, not by the number of masked ones: that would not be a
    bound."""
    t = sample_t(x.shape[0], x.device)                               # (B,)
    z = q_sample(x, t, mask_id)
    masked = z == mask_id                                            # (B, L), N of them
    weight = mask_rate(t) / mask_share(t)                            # (B,), log-linear: 1/t
    weight = weight[:, None].expand_as(x)[masked]                    # (N,)

    # the network, then the loss: the head is needed at the masks only
    h = states_at(model, z, masked)                                  # (N, C)
    return model.chunked_sum(h, weighted_nll, x[masked], weight) / x.numel()


def weighted_nll(logits, x, weight):
    """-log p(x) of ids x (n,) under logits (n, V), times weight (n,): (n,)."""
    return weight * F.cross_entropy(logits, x, reduction="none")


# ---- drawing tokens

def categorical(logits, dtype=torch.float64):
    """One exact draw per row: logits (..., V) -> ids (...).
    By inverting the cumulative sum in float64. In float32 tokens under about 1e-7 would be out of
    reach, which over many steps acts as a lower temperature (arXiv 2409.02908). The exponentials
    may be float32: that is a relative error, 1e-7 of each probability. A row that holds NaN has no
    law: it gives V, the mask's id, for which the samplers look at their end (here it would wait
    for a GPU)."""
    cdf = (logits - logits.amax(-1, keepdim=True)).exp_().to(dtype)
    torch.cumsum(cdf, -1, out=cdf)           # with dtype=float64 instead, 7 times as long
    total = cdf[..., -1:]                                            # (..., 1)
    u = torch.rand(total.shape, dtype=dtype, device=cdf.device) * total
    ids = torch.searchsorted(cdf, u, right=True)[..., 0]             # first entry above u
    V = cdf.shape[-1]
    ids = ids.clamp(max=V - 1)                                       # u may round up to the total
    return torch.where(total[..., 0].isfinite(), ids, V)


def draw_tokens(model, h, draw=categorical):
    """draw(logits) at each of the states h (N, C): ids (N,). For memory ROWS have logits at a time,
    and FEW of them are drawn at a time: 6 times as fast where fresh memory costs (CPU)."""
    ids = []
    for part in h.split(ROWS):
        for few in model.head(part).split(FEW):
            ids.append(draw(few))
    return torch.cat(ids)


def sharpen(logits, temperature=1.0, top_p=1.0):
    """Logits (..., V) of another, sharper law: divided by the temperature, then without the tokens
    outside the smallest set that has probability top_p. 1 and 1 change nothing."""
    logits = logits / temperature
    if top_p >= 1:
        return logits
    p, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    outside = p.cumsum(-1) - p >= top_p                              # the most likely always stays
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)


# ---- the reverse process

def unmask_step(model, z, t, s, mask_id, rank=None):
    """One ancestral step from z_t to z_s, with t and s (B,) per sequence (MDLM, eq. 7).
    The reverse posterior reveals each mask with probability reveal_share(t, s), whatever the
    network says: so that comes first, and the network's head is needed at those positions only.
    rank (B, L): when the tokens of z were revealed, for attention "reveal".
    Returns z_s (B, L), the bool reveal (B, L), and the states (N, C) at the revealed positions,
    from whose predictions the tokens were drawn."""
    chosen = torch.rand(z.shape, device=z.device) < reveal_share(t, s)[:, None]  # (B, L)
    reveal = (z == mask_id) & chosen                                 # (B, L), N of them
    h = states_at(model, z, reveal, rank)
    z_s = z.clone()
    z_s[reveal] = draw_tokens(model, h)
    return z_s, reveal, h


def plan(z, steps, mask_id):
    """What a sample is before the network is asked. For z (B, L) with n masks in each row: order
    (B, n), their positions shuffled, and when (B, n), ascending, the step in which each of these
    is revealed. Steps that reveal nothing are left out. On the CPU. Raises ValueError if rows have
    different numbers of masks.

    Each mask is revealed in the step that draw_steps draws for it, independently of the others
    and of the network. With more steps than masks the sequences of a batch share how many are
    revealed in each step (not which): for a sequence by itself that is the same law, and most
    steps call no network. With fewer steps they share nothing: their quality would go together,
    and the mean of a batch vary much more."""
    masked = (z == mask_id).cpu()
    B, n = len(z), int(masked[0].sum())
    if bool((masked.sum(1) != n).any()):
        raise ValueError("every sequence of a batch must have the same number of masks")
    key = torch.rand(z.shape, dtype=torch.float64).masked_fill(~masked, 2)
    order = key.argsort(dim=1)[:, :n]                                # (B, n) masks come first
    shared = steps > n
    when = draw_steps(steps, 1 if shared else B, n)
    when = when.unique(return_inverse=True)[1]                       # 0, 1, 2, ... without gaps
    return order, when.sort(dim=1).values.expand(B, n)


def draw_steps(steps, rows, n):
    """The step, 0 to steps - 1, in which each of (rows, n) masks is revealed, of equal steps from
    t = 1 to t = 0: the one from t to s with probability alpha_s - alpha_t."""
    # log-linear: all steps are equally likely, and there may be more of them than memory holds
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    if torch.equal(mask_share(t), t):
        return torch.randint(steps, (rows, n))

    # any other schedule: invert the share that is revealed by the end of each step
    end = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps        # (steps,)
    revealed = 1 - mask_share(end)                                           # ascending, to 1
    u = torch.rand((rows, n), dtype=torch.float64)
    return torch.searchsorted(revealed, u, right=True)                       # first one above u


@torch.no_grad()
def sample(model, z, steps, mask_id, draw=categorical, watch=None):
    """Ancestral sampling in `steps` equal steps: fill every mask of z (B, L).
    All that does not depend on the network is drawn before it is asked, see plan. So every step
    knows its positions: states, head and draw are computed there only, none is left masked at the
    end, no extra pass follows, and a step that reveals nothing calls no network: 1,024 steps on 64
    tokens cost at most 64 calls.

    z: masks where text is wanted, the prompt elsewhere; every row must have as many masks.
    draw: logits (N, V) -> ids (N,). watch: called with z after each step that reveals something.
    Returns ids (B, L). Raises ValueError on uneven rows, and FloatingPointError where the model's
    predictions are not finite numbers."""
    order, when = plan(z, steps, mask_id)                            # (B, n)
    sampler = sample_cached if model.config.attention == "reveal" else sample_full
    return without_masks(sampler(model, z.clone(), order, when, draw, watch), mask_id)


def sample_full(model, z, order, when, draw, watch=None):
    """sample with full attention: each step computes whole sequences, the last block only where
    tokens are revealed. order, when: see plan."""
    alike = bool((z == z[:1]).all())                                 # as all texts without a prompt
    blank = order.shape[1] == z.shape[1] and model.config.relative
    for i in range(steps_of(when)):
        row, j = (when == i).nonzero(as_tuple=True)                  # the N masks revealed now
        row, pos = row.to(z.device), order[row, j].to(z.device)
        if i == 0 and blank:             # all positions look the same: one is computed for all
            h = model.hidden(z[:1, :1])[0].expand(len(row), -1)
        elif i == 0 and alike:           # all sequences are the same: one is computed for all
            h = model.hidden(z[:1], at=(torch.zeros_like(row), pos))
        else:
            h = model.hidden(z, at=(row, pos))                       # (N, C)
        z[row, pos] = draw_tokens(model, h, draw)
        if watch:
            watch(z.clone())
    return z


def sample_cached(model, z, order, when, draw, watch=None):
    """sample with attention in the order of reveal, and its exact KV cache: a step reads the tokens
    revealed in the one before, whose keys and values stay in the cache, and the masks that are
    revealed now. So each position is read twice, whatever the number of steps."""
    (B, L), n = z.shape, order.shape[1]
    cache, z = model.cache(B, L), z.clone()

    # the prompt's tokens come first, in random order, as if revealed in step -1
    is_mask = torch.zeros(B, L, dtype=torch.bool).scatter_(1, order, True)
    prompt = torch.rand(B, L).masked_fill(is_mask, 2).argsort(1)[:, :L - n]
    order = torch.cat((prompt, order), 1)                            # (B, L) of slots: positions
    when = torch.cat((torch.full((B, L - n), -1), when), 1)

    for i in range(steps_of(when)):
        new_row, new_slot = (when == i - 1).nonzero(as_tuple=True)   # tokens that were not read yet
        row, slot = (when == i).nonzero(as_tuple=True)               # the masks revealed now
        known = (when < i).sum(1)                                    # (B,) tokens
        pos = order[row, slot]
        if i == 0 and n == L and model.config.relative:              # all the same: ask one
            h = model.hidden(z[:1, :1], rank=torch.zeros(1, 1))[0].expand(len(row), -1)
        else:
            h = model.read(cache, *reading(z, order, new_row, new_slot, row, slot, known))
        z[row, pos] = draw_tokens(model, h, draw)
        if watch:
            watch(z.clone())
    return z


def reading(z, order, new_row, new_slot, row, slot, known):
    """model.read's arguments for new tokens and, after them, masks: a token sees those before it,
    a mask all `known` ones."""
    limit = torch.cat((new_slot, known[row]))
    first = len(new_row)                                             # masks begin here
    row, slot = torch.cat((new_row, row)), torch.cat((new_slot, slot))
    pos = order[row, slot]
    idx = z[row, pos]
    return idx, pos.to(z.device), row, slot, limit, first


def steps_of(when):
    """The number of steps that reveal something."""
    return int(when.max()) + 1 if when.numel() else 0


def without_masks(z, mask_id):
    """z, in which no mask is left. One is left where draws met NaN: FloatingPointError."""
    if bool((z == mask_id).any()):
        raise FloatingPointError(NOT_FINITE)
    return z


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def sample_joint(model, z, steps, mask_id, dtype=torch.float64, temperature=1.0):
    """Ancestral sampling as the papers' pseudo-code has it (MDLM, SDTT), z (B, L) -> ids (B, L): in
    each step logits everywhere and one draw from {V tokens, stay masked} by Gumbel noise. The same
    law as sample's, and the yardstick of its speed; not compiled, as public code runs it. In
    float32, as public code has it, the law is another: a token that would be drawn in a step with
    less than 6e-8 never is, as noise of 24 bits ends at 16.6 (arXiv 2409.02908)."""
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        times = torch.tensor([t, s], dtype=torch.float64)
        masked_t, masked_s = mask_share(times).tolist()              # two numbers
        p = sharpen(model(z), temperature).to(dtype).softmax(-1)     # (B, L, V)
        if bool(p.isnan().any()):
            raise FloatingPointError(NOT_FINITE)
        # reveal_share(t, s) is shared out among the tokens, the rest stays masked
        stay = torch.full_like(p[..., :1], masked_s / masked_t)      # (B, L, 1)
        joint = torch.cat((p * (masked_t - masked_s) / masked_t, stay), dim=-1)  # (B, L, V + 1)
        gumbel = -(-torch.rand_like(joint).log()).log()
        choice = (joint.log() + gumbel).argmax(-1)                   # V, the mask's id: stay
        z = torch.where(z == mask_id, choice, z)
    return z
