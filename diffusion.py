"""Masked diffusion as pure functions: the noise, the bound, one reverse step, the sampler.

x: clean tokens (B, L), ids 0..V-1. z_t: the same with some tokens replaced by mask_id = V.
t in [0, 1] is the time, 1 = all masked: each token survives with probability alpha_t = 1 - t (the
log-linear schedule of MDLM, arXiv 2406.07524). Time runs backward when sampling, from t to s < t.

A "model" is anything that gives, for the N positions of z (B, L) that `at` says, a bool (B, L) or
positions (B, n),
    model.states(z, at) -> h (N, C)       what it knows there, row by row
    model.head(h) -> logits (N, V)        what it predicts from that
    model(z, at, f, *rows) -> scalar      the sum of f(logits (N, V), *rows (N, ...)) -> (N,)
and, if model.reveal is true, takes the order of reveal and reads with a cache: see Transformer.
Randomness comes from torch's global generators.
"""
import torch
import torch.nn.functional as F

from model import NOT_FINITE

ROWS, FEW = 512, 32              # logits (ROWS, V) at a time, and in one draw


def sample_t(B, device=None):
    """B times in (0, 1], (B,): one uniform draw plus an even grid, so that every batch covers the
    whole range. Each t is uniform on its own (MDLM, section 3.3: low-discrepancy sampler)."""
    u = torch.rand(1, device=device) + torch.arange(B, device=device) / B
    return 1 - u % 1


def q_sample(x, t, mask_id):
    """The forward process q(z_t | x): each token of x (B, L) is masked with probability t (B,)."""
    masked = torch.rand(x.shape, device=x.device) < t[:, None]
    return torch.where(masked, mask_id, x)


def nelbo(model, x, mask_id):
    """Negative evidence lower bound of x (B, L), a scalar in nats per token (MDLM, eq. 10).
    Cross-entropy on the masked tokens with weight -alpha'_t / (1 - alpha_t) = 1/t, divided by all
    B * L tokens (not by the number of masked ones: that would not be a bound)."""
    t = sample_t(x.shape[0], x.device)
    z = q_sample(x, t, mask_id)
    at = z == mask_id                                                # (B, L), N of them
    weight = (1 / t)[:, None].expand_as(x)[at]                       # (N,)
    return model(z, at, weighted_nll, x[at], weight) / x.numel()


def weighted_nll(logits, x, weight):
    """-log p(x) of ids x (n,) under logits (n, V), times weight (n,): (n,)."""
    return weight * F.cross_entropy(logits, x, reduction="none")


def categorical(logits, dtype=torch.float64):
    """One exact draw per row: logits (..., V) -> ids (...).
    By inverting the cumulative sum in float64. In float32 tokens under about 1e-7 would be out of
    reach, which over many steps acts as a lower temperature (arXiv 2409.02908). The exponentials
    may be float32: that is a relative error, 1e-7 of each probability. A row that holds NaN has no
    law: it gives V, the mask's id, for which `sample` looks at its end (here it would wait for a
    GPU)."""
    cdf = (logits - logits.amax(-1, keepdim=True)).exp_().to(dtype)
    torch.cumsum(cdf, -1, out=cdf)           # with dtype=float64 instead, 7 times as long
    u = torch.rand(cdf.shape[:-1] + (1,), dtype=dtype, device=cdf.device) * cdf[..., -1:]
    ids = torch.searchsorted(cdf, u, right=True)[..., 0]             # first entry above u
    ids = ids.clamp(max=cdf.shape[-1] - 1)                           # u may round up to the total
    return torch.where(cdf[..., -1].isfinite(), ids, cdf.shape[-1])


def draw_tokens(model, h, draw=categorical):
    """draw(logits) at each of the states h (N, C): ids (N,). For memory ROWS have logits at a time,
    and FEW of them are drawn at a time: 6 times as fast where fresh memory costs (CPU)."""
    return torch.cat([draw(few) for part in h.split(ROWS) for few in model.head(part).split(FEW)])


def sharpen(logits, temperature=1.0, top_p=1.0):
    """Logits (..., V) of another, sharper law: divided by the temperature, then without the tokens
    outside the smallest set that has probability top_p. 1 and 1 change nothing."""
    logits = logits / temperature
    if top_p >= 1:
        return logits
    p, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    outside = p.cumsum(-1) - p >= top_p                              # the most likely always stays
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)


def unmask_step(model, z, t, s, mask_id, order=None):
    """One ancestral step from z_t to z_s, with t and s (B,) per sequence (MDLM, eq. 7).
    The reverse posterior opens each mask with probability (t - s) / t, whatever the network says:
    so that comes first, and the network's head is needed at those positions only.
    order: (B, L), in which the tokens of z were revealed, for a model with model.reveal.
    Returns z_s (B, L), the bool reveal (B, L), and the states (N, C) at the revealed positions,
    from whose predictions the tokens were drawn."""
    open_p = torch.where(t > 0, (t - s) / t, 0.0)                    # at t = 0 nothing is masked
    reveal = (z == mask_id) & (torch.rand(z.shape, device=z.device) < open_p[:, None])
    h, z_s = model.states(z, reveal, *[order] * (order is not None)), z.clone()
    z_s[reveal] = draw_tokens(model, h)
    return z_s, reveal, h


def plan(z, steps, mask_id):
    """What a sample is before the network is asked: for z (B, L) with n masks in each row, their
    positions shuffled, order (B, n), and the step in which each of these opens, when (B, n),
    ascending. Steps in which nothing opens are left out. On the CPU. Raises ValueError if rows
    have different numbers of masks."""
    masked = (z == mask_id).cpu()
    B, n = len(z), int(masked[0].sum())
    if bool((masked.sum(1) != n).any()):
        raise ValueError("every sequence of a batch must have the same number of masks")
    key = torch.rand(z.shape, dtype=torch.float64).masked_fill(~masked, 2)
    order = key.argsort(dim=1)[:, :n]
    when = torch.randint(steps, (1 if steps > n else B, n)).unique(return_inverse=True)[1]
    return order, when.sort(dim=1).values.expand(B, n)


@torch.no_grad()
def sample(model, z, steps, mask_id, draw=categorical, watch=None):
    """Ancestral sampling in `steps` equal steps: fill every mask of z (B, L).
    Over the whole way each mask opens in a step drawn uniformly from the `steps`, independently of
    the others and of the network. So all of that is drawn before the network is asked, and every
    step knows its positions: state, head and draw are computed there only, none is left masked at
    the end, no extra pass follows. With more steps than masks the sequences of a batch share how
    many open in each step (not which), and a step without any calls no network: 1,024 steps on 64
    tokens cost at most 64 calls. For a sequence by itself that is the same law. With fewer steps
    they share nothing: their quality would go together, and the mean of a batch vary much more.
    While all rows of z are the same, as in the first step of free text, one row is computed for
    all; and one position for all of it where all is masked and model.relative is true.

    z: masks where text is wanted, the prompt elsewhere; every row must have as many masks.
    draw: logits (N, V) -> ids (N,). watch: called with z after each step that opens something.
    Returns ids (B, L). Raises ValueError on uneven rows, and FloatingPointError where the model's
    predictions are not finite numbers."""
    watch = watch or (lambda z: None)
    order, when = plan(z, steps, mask_id)                            # (B, n)
    n = order.shape[1]
    if getattr(model, "reveal", False):
        return sample_cached(model, z, order, when, draw, watch)
    alike, blank = bool((z == z[:1]).all()), n == z.shape[1] and getattr(model, "relative", False)
    for i in range(int(when.max()) + 1 if n else 0):
        first, end = ((when < k).sum(1, keepdim=True) for k in (i, i + 1))
        j = first + torch.arange(int((end - first).max()))           # (B, m) places in the order,
        row, col = (j < end).nonzero(as_tuple=True)                  # N of which open now
        at = order.gather(1, j.clamp(max=n - 1))                     # (B, m)
        if i == 0 and blank:
            h = model.states(z[:1, :1], torch.zeros_like(at, device=z.device).view(1, -1))
        elif i == 0 and alike:
            h = model.states(z[:1], at.to(z.device).view(1, -1))
        else:
            h = model.states(z, at.to(z.device))                     # (B m, C)
        z = z.clone()
        z[row, at[row, col]] = draw_tokens(model, h[row * j.shape[1] + col], draw)
        watch(z)
    return without_masks(z, mask_id)


def without_masks(z, mask_id):
    """z, in which no mask is left. One is left where draws met NaN: FloatingPointError."""
    if bool((z == mask_id).any()):
        raise FloatingPointError(NOT_FINITE)
    return z


def sample_cached(model, z, order, when, draw, watch=lambda z: None):
    """sample for a model whose attention follows the order of reveal, with its KV cache: a step
    reads the tokens that opened in the one before, whose keys and values stay in the cache, and the
    masks that open now. So each position is read twice, whatever the number of steps.
    order, when: see plan; watch: see sample."""
    (B, L), n = z.shape, order.shape[1]
    cache, z = model.cache(B, L), z.clone()
    known = torch.ones(B, L).scatter_(1, order, 0)                   # the prompt, in random order,
    known = (torch.rand(B, L) + 2 * (1 - known)).argsort(1)[:, :L - n]       # comes first
    order = torch.cat((known, order), 1)                             # (B, L): slots' positions
    when = torch.cat((torch.full((B, L - n), -1), when), 1)
    for i in range(int(when.max()) + 1):
        begin, first, end = ((when < k).sum(1, keepdim=True) for k in (i - 1, i, i + 1))
        slot = begin + torch.arange(int((end - begin).max()))        # (B, m) slots of this step
        tokens, masks = (slot < first).nonzero(), ((slot >= first) & (slot < end)).nonzero()
        row, col = torch.cat((tokens, masks)).unbind(1)              # (N,)
        slot, limit = slot[row, col], torch.cat((slot[tuple(tokens.T)], first[masks[:, 0], 0]))
        at = row, order[row, slot]
        if i == 0 and n == L and model.relative:                     # all the same: ask one
            h = model.states(z[:1, :1], None, z[:1, :1]).expand(len(masks), -1)
        else:
            h = model.read(cache, z[at], at[1].to(z.device), row, col, slot, limit, len(tokens))
        z[row[len(tokens):], at[1][len(tokens):]] = draw_tokens(model, h, draw)
        watch(z)
    return without_masks(z, model.mask_id)


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
        p = sharpen(model(z), temperature).to(dtype).softmax(-1)     # (B, L, V)
        if bool(p.isnan().any()):
            raise FloatingPointError(NOT_FINITE)
        joint = torch.cat((p * (t - s) / t, torch.full_like(p[..., :1], s / t)), dim=-1)
        gumbel = -(-torch.rand_like(joint).log()).log()
        choice = (joint.log() + gumbel).argmax(-1)                   # V, the mask's id: stay
        z = torch.where(z == mask_id, choice, z)
    return z
