"""One transformer for three jobs: masked diffusion (bidirectional, or in the order of reveal), its
distilled students (the same), and the autoregressive (AR) baseline (causal).

Shapes: B sequences, L positions, V tokens, C width, H heads, D = C / H; N is a number of positions
picked from several sequences. The vocabulary has V real tokens; id V is the mask for a diffusion
model and the start symbol for an AR one. The embedding therefore has V + 1 rows and the head V: no
model here can ever predict the mask.

Who calls whom:

    generate  AR sampling: a prefill, then one token at a time, by read
    read      some tokens at a time, with a KV cache: AR, and cached diffusion sampling; calls run
    hidden    whole sequences: training, likelihood, sampling with full attention; calls run
    run       embedding, then the blocks; Block.forward is the same for all of them

Only attention mixes positions. *Who sees whom* is therefore an argument of the block: a function
attend(q, k, v), made by see_everything or see_cache.
"""
import functools
import math
import typing
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelConfig:
    vocab: int                   # V, real tokens; the mask (or start symbol) is id V
    context: int                 # most positions a sequence may have
    layers: int = 4
    heads: int = 4
    width: int = 128             # C
    attention: str = "full"      # "full", "causal" (AR) or "reveal", see Transformer
    positions: str = "rope"      # "rope" (rotary), "learned" (GPT-2's) or "both"
    dropout: float = 0.0         # on each block's two outputs, in training only
    attention_bias: bool = True  # biases in attention's projections, which MDLM does not have

    @property
    def causal(self):
        return self.attention == "causal"

    @property
    def relative(self):
        """Whether only distances between positions matter: then all positions look the same where
        all is masked."""
        return self.positions == "rope" and not self.causal


PRESETS = {                      # layers, heads, width, context; small to large are SDTT's sizes
    "nano": dict(layers=3, heads=4, width=128, context=64),      # for a laptop CPU
    "small": dict(layers=12, heads=12, width=768, context=1024),
    "medium": dict(layers=24, heads=16, width=1024, context=1024),
    "large": dict(layers=24, heads=16, width=1536, context=1024),
    "xl": dict(layers=24, heads=32, width=2048, context=1024),
}
CHOICES = {"positions": ("rope", "learned", "both"), "attention": ("full", "causal", "reveal")}
CHUNK = 2 ** 24                  # logits at a time in losses: 64 MB
NOT_FINITE = ("the model's predictions are not finite numbers, so nothing can be drawn from them: its "
              "training diverged; train it anew with a lower --lr")


# ---- one block

def rotate(x, cos, sin):
    """Rotary positions (RoPE, arXiv 2104.09864) of x (..., H, D), tables (..., 1, D/2): pair i of
    it is its coordinates i and i + D/2 (rotate-half)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def gelu(x):
    """GELU, tanh form; a compiler makes faster code of (1 + tanh y) / 2 = sigmoid(2 y)."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3))
    return F.gelu(x, approximate="tanh")


class Linear(nn.Linear):
    """nn.Linear; compiled, its bias is added by generated loops instead of being copied before."""

    def forward(self, x):
        if torch.compiler.is_compiling() and self.bias is not None:
            y = F.linear(x, self.weight)                 # of autocast's type, unlike the bias
            return y + self.bias.to(y.dtype)
        return super().forward(x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        C, self.heads = config.width, config.heads
        self.norm1 = nn.LayerNorm(C)
        self.qkv = Linear(C, 3 * C, bias=config.attention_bias)
        self.attn_out = Linear(C, C, bias=config.attention_bias)
        self.norm2 = nn.LayerNorm(C)
        self.mlp_in = Linear(C, 4 * C)
        self.mlp_out = Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, attend, at=None):
        """x (..., C) -> the same shape, or (N, C): only at the positions `at`, an index into x.
        rope: tables for rotate, or None. attend(q, k, v), each (..., H, D), is the only place
        where positions meet; with `at` it gives (N, H, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = attend(q, k, v).flatten(-2)
        if at is not None:
            x = x[at]
        x = x + self.dropout(self.attn_out(y))
        return x + self.dropout(self.mlp_out(gelu(self.mlp_in(self.norm2(x)))))


# ---- who sees whom

def see_everything(q, k, v, mask=None, causal=False, at=None):
    """Attention over whole sequences: q, k, v (B, L, H, D) -> (B, L, H, D).
    mask (B, L, L) bool says who sees whom; without one everything is seen, or, if causal, all that
    is not later. at: a Ragged of the N queries that are wanted, -> (N, H, D)."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)                      # (B, H, L, D)
    if at is not None:
        if mask is not None:
            mask = at.pad(mask[at.row, at.pos])                      # (B, most, L)
        return at.attend(q[at.row, at.pos], k, v, mask)
    if mask is not None:
        mask = mask[:, None]                                         # the same for all heads
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=causal)
    return y.transpose(1, 2)


def see_cache(q, k, v, keys, values, slot, mask, ragged, first=0):
    """Attention of N tokens of several texts to these texts' caches: q, k, v (N, H, D) -> (N, H,
    D), or those from number `first` on. Keys and values are put into the slots (N,) first; mask
    (B, most, seen) bool says which of the first `seen` slots each query of `ragged` sees."""
    keys[ragged.row, :, slot] = k
    values[ragged.row, :, slot] = v
    seen = mask.shape[-1]
    return ragged.attend(q, keys[:, :, :seen], values[:, :, :seen], mask)[first:]


def see_step(q, k, v, keys, values, slot, mask):
    """see_cache for AR decoding, where each of B texts has one token, all in the same slot (1,):
    q, k, v (B, H, D) -> (B, H, D), mask (1, seen). No padding, and shapes that do not change."""
    keys.index_copy_(2, slot, k[:, :, None])
    values.index_copy_(2, slot, v[:, :, None])
    seen = mask.shape[-1]
    y = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, :seen], values[:, :, :seen], mask)
    return y[:, :, 0]


class Ragged(typing.NamedTuple):
    """N queries of B texts, some of which have more than others: padded to a rectangle (B, most)
    for attention, where query i stands in column col[i] of its text's row."""
    row: torch.Tensor            # (N,) the text of each
    pos: torch.Tensor            # (N,) its position, or its slot
    col: torch.Tensor            # (N,) 0, 1, 2, ... among those of its text
    B: int
    most: int                    # queries of a text at most

    def pad(self, x):
        """x (N, ...) -> (B, most, ...), zeros in the empty places."""
        padded = x.new_zeros(self.B, self.most, *x.shape[1:])
        padded[self.row, self.col] = x
        return padded

    def attend(self, q, k, v, mask):
        """q (N, H, D), k and v (B, H, keys, D), mask (B, most, keys) bool or None -> (N, H, D)."""
        if mask is not None:
            mask = mask[:, None]
        y = F.scaled_dot_product_attention(self.pad(q).transpose(1, 2), k, v, mask)
        return y.transpose(1, 2)[self.row, self.col]


def ragged(row, pos, B):
    """Queries of texts row (N,) at positions pos (N,), in any order, as a Ragged."""
    count = torch.bincount(row, minlength=B)                         # (B,)
    by_row = row.argsort(stable=True)
    first = count.cumsum(0) - count                                  # where each text begins there
    col = torch.empty_like(row)
    col[by_row] = torch.arange(len(row), device=row.device) - first[row[by_row]]
    return Ragged(row, pos, col, B, int(count.max()))


class KVCache:
    """Keys and values of the tokens read so far, in storage that never moves or grows. Keys are
    stored after their rotation, so tokens may be read in any order of positions."""

    def __init__(self, config, B, slots, device=None, dtype=torch.float32):
        shape = (B, config.heads, slots, config.width // config.heads)       # (B, H, slots, D)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.slots = slots


# ---- the network

class Transformer(nn.Module):
    """The network. There is no time input: a masked sequence shows how noisy it is by its masks
    (MDLM, arXiv 2406.07524). Rotary positions alone are relative, as in text that begins anywhere;
    where rows begin a text, "both" has learned ones too.

    attention: "full", every position sees every other; "causal"; or "reveal": a token sees those
    revealed before it, a mask all tokens and no other mask. What a revealed token's key and value
    are then never changes, whatever is revealed after it: a KV cache of diffusion is exact."""

    def __init__(self, config):
        super().__init__()
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width} is not a multiple of 2 x {config.heads} heads")
        for name, known in CHOICES.items():
            if getattr(config, name) not in known:
                raise ValueError(f"{name}: one of {known}, not {getattr(config, name)!r}")
        self.config = config
        self.mask_id = config.vocab              # of a causal model: the start of a text
        self.bf16 = False                # True: run the blocks, and only them, in bfloat16
        self.recompute = False           # True: keep no activations for backward, make them again

        # the tensors
        self.embed = nn.Embedding(config.vocab + 1, config.width)    # row V: the mask / the start
        if config.positions != "rope":
            self.embed_pos = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab)         # V outputs: never the mask

        # rotary tables, (context, D/2)
        D = config.width // config.heads
        angle = torch.arange(config.context)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

        # initial weights
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:                # residual stream of constant size at any depth
            for layer in (block.attn_out, block.mlp_out):
                layer.weight.data /= math.sqrt(2 * config.layers)

    def run(self, idx, pos, attends, at=None):
        """Embedding and blocks: ids idx at positions pos, both (..., ) -> states (..., C), before
        the last norm. attends: who sees whom, a function for each block. at: see Block, for the
        last one: the others need all positions."""
        x = self.embed(idx)
        if self.config.positions != "rope":
            x = x + self.embed_pos(pos)
        rope = None
        if self.config.positions != "learned":
            rope = self.cos[pos][..., None, :], self.sin[pos][..., None, :]      # (..., 1, D/2)
        again = self.recompute and torch.is_grad_enabled()
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.bf16):
            for block, attend in zip(self.blocks, attends):
                if at is not None and block is self.blocks[-1]:
                    # not compiled: the number of positions is another in every step
                    x = block.forward(x, rope, attend, at)
                elif again:
                    x = checkpoint(block, x, rope, attend, use_reentrant=False)
                else:
                    x = block(x, rope, attend)
        return x

    def hidden(self, idx, at=None, rank=None, pos=None):
        """States of whole sequences: ids (B, L) in 0..V -> (B, L, C); with at = (row, pos), both
        (N,), only those N, (N, C): the last block's queries and MLP are then computed only there.
        rank (B, L): for attention "reveal", when each token was revealed, in any numbers; random
        unless given. pos: positions (L,) or (B, L), 0..L-1 unless given.
        Raises ValueError for more tokens than the context."""
        B, L = idx.shape
        if L > self.config.context:
            raise ValueError(f"{L} tokens, but the context is {self.config.context}")
        if pos is None:
            pos = torch.arange(L, device=idx.device)
        mask = None
        if self.config.attention == "reveal":
            mask = reveal_mask(idx, rank, self.mask_id)
        see = functools.partial(see_everything, mask=mask, causal=self.config.causal)
        attends = [see] * len(self.blocks)
        if at is not None:
            attends[-1] = functools.partial(see_everything, mask=mask, at=ragged(*at, B))
        return self.run(idx, pos, attends, at)

    def cache(self, B, slots):
        """An empty KVCache for B texts of at most `slots` tokens. Raises ValueError for more than
        the context."""
        if slots > self.config.context:
            raise ValueError(f"{slots} tokens, but the context is {self.config.context}")
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return KVCache(self.config, B, slots, self.embed.weight.device, dtype)

    def read(self, cache, idx, pos, row, slot, limit, first=0):
        """States of N tokens or masks of the texts in a cache: ids idx at positions pos -> (N, C),
        or (N - first, C), those from number `first` on. Each is one of text `row`, goes into its
        slot of the cache, and sees the slots before `limit`, and its own: for AR that is limit =
        slot = position; with attention "reveal" a token's limit is its slot, a mask's the number
        of tokens that are known. All (N,); row, slot and limit on the CPU, where they are planned.
        A mask's slot is the one that its token will have, which writes over it."""
        B, device = len(cache.k[0]), idx.device
        place = ragged(row, slot, B)
        slots = torch.arange(int(slot.max()) + 1)
        if len(slots) > cache.slots:
            raise ValueError(f"the KV cache holds {cache.slots} tokens, {len(slots)} were given")
        # who sees whom: (B, most, seen); an empty place sees everything, and nobody asks it
        mask = torch.ones(B, place.most, len(slots), dtype=torch.bool)
        mask[row, place.col] = (slots < limit[:, None]) | (slots == slot[:, None])
        # onto the device, all at once
        place = Ragged(row.to(device), None, place.col.to(device), B, place.most)
        slot, mask = slot.to(device), mask.to(device)
        attends = []
        for keys, values in zip(cache.k, cache.v):
            attends.append(functools.partial(see_cache, keys=keys, values=values, slot=slot,
                                             mask=mask, ragged=place))
        if first == 0:
            return self.run(idx, pos, attends)
        # tokens are read for their keys and values: the last block's rest is for the masks
        attends[-1] = functools.partial(attends[-1], first=first)
        return self.run(idx, pos, attends, slice(first, None))

    def head(self, h):
        """Hidden states (..., C) -> logits (..., V), always in float32."""
        return self.lm_head(self.norm(h.float()).to(self.lm_head.weight.dtype)).float()

    def forward(self, idx, rank=None):
        """Logits (B, L, V) of ids (B, L)."""
        return self.head(self.hidden(idx, rank=rank))

    def chunked_sum(self, h, f, *rows):
        """f(head(h), *rows).sum(), a scalar, for h (N, C), f(logits (n, V), *rows (n, ...)) -> (n,)
        and rows (N, ...): CHUNK logits at a time, never all of them."""
        h = self.norm(h.float())
        return HeadSum.apply(f, h, self.lm_head.weight, self.lm_head.bias, *rows)


def reveal_mask(idx, rank, mask_id):
    """Who sees whom with attention "reveal", bool (B, L, L), of ids (B, L): a token those that were
    revealed before it, by their rank (B, L), random unless given; a mask all tokens; and each
    itself."""
    if rank is None:
        rank = torch.rand(idx.shape, device=idx.device)
    rank = rank.double().masked_fill(idx == mask_id, torch.inf)      # a mask comes after all
    itself = torch.eye(idx.shape[1], dtype=torch.bool, device=idx.device)
    return itself | (rank[:, None] < rank[:, :, None])


class HeadSum(torch.autograd.Function):
    """f(h W^T + b, *rows).sum() over all rows of h (N, C), as Transformer.chunked_sum says.
    A chunk's logits are there only for a moment. So its gradient is taken at once, in forward, and
    waits for backward, which has only to scale it: nothing is computed twice."""

    @staticmethod
    def forward(ctx, f, h, W, b, *rows):
        size = max(1, CHUNK // len(W))
        train = any(ctx.needs_input_grad[1:4])
        dh = dW = db = None
        if train:
            dh, dW, db = torch.zeros_like(h), torch.zeros_like(W), torch.zeros_like(b)
        total = torch.zeros((), device=h.device)
        for i in range(0, len(h), size):
            part = slice(i, i + size)
            logits = F.linear(h[part], W, b).requires_grad_(train)   # (n, V)
            with torch.set_grad_enabled(train):
                value = f(logits, *[r[part] for r in rows]).sum()
            total += value.detach()
            if train:
                g, = torch.autograd.grad(value, logits)              # (n, V)
                torch.mm(g, W, out=dh[part])
                dW.addmm_(g.T, h[part])
                db += g.sum(0)
        ctx.grads, ctx.rest = (dh, dW, db), [None] * len(rows)
        return total

    @staticmethod
    def backward(ctx, g):
        grads, ctx.grads = ctx.grads, None               # scaled in place: good for one backward
        return None, *[grad.mul_(g) for grad in grads], *ctx.rest


cross_entropy = functools.partial(F.cross_entropy, reduction="none")     # (n, V), (n,) -> (n,)


# ---- autoregressive models

def shifted(x, start_id):
    """What an AR model reads to predict x (B, L): the start symbol, then x but for its last."""
    return torch.cat((torch.full_like(x[:, :1], start_id), x[:, :-1]), dim=1)


@torch.no_grad()
def nll(model, x, start_id):
    """Negative log-likelihood of x (B, L) under a causal model, (B, L), in nats per token."""
    h = model.hidden(shifted(x, start_id)).flatten(0, 1)             # (B L, C)
    size = max(1, CHUNK // model.config.vocab)
    parts = zip(h.split(size), x.flatten().split(size))
    return torch.cat([cross_entropy(model.head(a), b) for a, b in parts]).view(x.shape)


def decode(model, token, slot, cache, seen):
    """One decoding step: ids (B, 1), which go to slot (1,) of the cache, -> logits (B, V).
    Attention looks at `seen` slots, of which those after `slot` are masked: a step's shapes depend
    on `seen` alone, as a compiler wants them."""
    mask = torch.arange(seen, device=token.device) <= slot           # (seen,)
    attends = []
    for keys, values in zip(cache.k, cache.v):
        attends.append(functools.partial(see_step, keys=keys, values=values, slot=slot,
                                         mask=mask[None]))
    return model.head(model.run(token[:, 0], slot, attends))


@torch.no_grad()
def generate(model, prompt, length, draw, step=decode, grain=1, cache=None):
    """Autoregressive decoding with a KV cache: each token is forwarded once.
    prompt: ids (B, P), P may be 0; length: tokens of the result, prompt included;
    draw: logits (B, V) -> ids (B,), for example diffusion.categorical, or an argmax;
    step: decode or machine.compiled_decode(); attention looks at a multiple of `grain` slots, so
    that a compiled step has few shapes; cache: one to use again. Only the end waits for a GPU.
    Returns ids (B, length). Raises ValueError if the prompt is longer than `length`, or `length`
    than the context (the start symbol takes the place of the last token, which is never fed);
    FloatingPointError where the model's predictions are not finite numbers."""
    B, P = prompt.shape
    if not P <= length <= model.config.context:
        raise ValueError(f"a prompt of {P} tokens in a text of {length}, "
                         f"with a context of {model.config.context}")
    device = prompt.device
    out = torch.full((B, length + 1), model.mask_id, device=device)
    out[:, 1:P + 1] = prompt                                         # out[:, 0] is the start
    cache = cache or model.cache(B, length)

    # prefill: the start symbol and the prompt, all rows at once
    n = min(P + 1, length)
    row = torch.arange(B).repeat_interleave(n)                       # (B n,)
    slot = torch.arange(n).repeat(B)
    h = model.read(cache, out[:, :n].flatten(), slot.to(device), row, slot, slot)
    logits = model.head(h.view(B, n, -1)[:, -1])                     # (B, V)

    # one token a step
    slots = torch.arange(length, device=device)
    for i in range(P + 1, length + 1):
        out[:, i] = draw(logits)
        if i < length:
            seen = min(length, (i // grain + 1) * grain)
            logits = step(model, out[:, i:i + 1], slots[i:i + 1], cache, seen)
    if bool((out[:, P + 1:] == model.mask_id).any()):    # what a draw from NaN gives
        raise FloatingPointError(NOT_FINITE)
    return out[:, 1:]
