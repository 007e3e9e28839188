"""One transformer for three jobs: masked diffusion (bidirectional, or in the order of reveal with a
KV cache), its distilled students (the same), and the autoregressive baseline (causal, with one).

Shapes: B sequences, L positions, V tokens, C width, H heads, D = C / H. The vocabulary has V real
tokens; id V is the mask for a diffusion model and the start symbol for an autoregressive one. The
embedding therefore has V + 1 rows and the head V: no model here can ever predict the mask.
"""
import functools
import math
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
    attention: str = "full"      # "full", "causal" (autoregressive) or "reveal", see Transformer
    positions: str = "rope"      # "rope" (rotary), "learned" (GPT-2) or "both", see Transformer
    dropout: float = 0.0         # on each block's two outputs, in training only

    @property
    def causal(self):
        return self.attention == "causal"


PRESETS = {                      # layers, heads, width, context; small to large are SDTT's sizes
    "nano": dict(layers=3, heads=4, width=128, context=64),      # for a laptop CPU
    "small": dict(layers=12, heads=12, width=768, context=1024),
    "medium": dict(layers=24, heads=16, width=1024, context=1024),
    "large": dict(layers=24, heads=16, width=1536, context=1024),
    "xl": dict(layers=24, heads=32, width=2048, context=1024),
}
CHOICES = {"positions": ("rope", "learned", "both"), "attention": ("full", "causal", "reveal")}
NOT_FINITE = ("the model's predictions are not finite numbers, so nothing can be drawn from them: its "
              "training diverged; train it anew with a lower --lr")
CHUNK = 2 ** 24                  # logits at a time in losses: 64 MB


class KVCache:
    """Keys and values of the tokens seen so far, in storage that never moves or grows. Keys are
    stored after their rotation, so the cache may be filled in any order of positions."""

    def __init__(self, config, B, size, device=None, dtype=torch.float32):
        shape = (B, config.heads, size, config.width // config.heads)        # (B, H, size, D)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype)
                           for _ in range(config.layers)] for _ in "kv")
        self.size, self.length = size, 0                             # slots, and those in use

    def append(self, layer, k, v, slots, seen):
        """Store k, v (B, H, n, D) of one layer in slots (n,); return its first `seen` slots."""
        self.k[layer].index_copy_(2, slots, k)
        self.v[layer].index_copy_(2, slots, v)
        return self.k[layer][:, :, :seen], self.v[layer][:, :, :seen]


def rotate(x, cos, sin):
    """Rotary positions (RoPE, arXiv 2104.09864) of x (B, H, L, D): pair i of it is its coordinates
    i and i + D/2 (rotate-half). cos, sin (B or 1, 1, L, D/2)."""
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
        if torch.compiler.is_compiling():
            y = F.linear(x, self.weight)                 # of autocast's type, unlike the bias
            return y + self.bias.to(y.dtype)
        return super().forward(x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        C, self.heads = config.width, config.heads
        self.norm1 = nn.LayerNorm(C)
        self.qkv = Linear(C, 3 * C)
        self.attn_out = Linear(C, C)
        self.norm2 = nn.LayerNorm(C)
        self.mlp_in = Linear(C, 4 * C)
        self.mlp_out = Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask=None, causal=False, cache=None, place=()):
        """x (B, L, C) -> same. mask (L, keys) bool; place in the cache: (layer, slots, seen)."""
        B, L, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # each (B, H, L, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(place[0], k, v, *place[1:])          # (B, H, seen, D)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)      # (B, H, L, D)
        return self.add(x, y.transpose(1, 2).reshape(x.shape))

    def forward_at(self, x, rope, at, mask=None):
        """forward at the positions at (B, n) only: x (B, L, C) -> (B, n, C). Keys and values are
        needed everywhere, queries and MLP, five sixths of a block's work, are not."""
        B, L, C = x.shape
        H, D, row = self.heads, C // self.heads, torch.arange(B, device=x.device)[:, None]
        h, W, b = self.norm1(x), self.qkv.weight, self.qkv.bias
        k, v = F.linear(h, W[C:], b[C:]).view(B, L, 2, H, D).permute(2, 0, 3, 1, 4)
        q = F.linear(h[row, at], W[:C], b[:C]).view(*at.shape, H, D).transpose(1, 2)
        if rope is not None:                                         # tables (1, 1, L, D/2)
            k = rotate(k, *rope)
            q = rotate(q, *[table[0, 0][at][:, None] for table in rope])
        mask = None if mask is None else mask[row, :, at].transpose(1, 2)        # (B, 1, n, L)
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        return self.add(x[row, at], y.reshape(*at.shape, C))

    def read(self, x, rope, keys, values, row, col, slot, mask, first=0):
        """forward of the tokens of several texts at once, x (N, C): each is the col-th here of text
        `row`, and its key and value go to `slot` of that text's cache, all (N,). mask (B, 1, most
        of a text, slots) bool. Returns those from number `first` on."""
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).unbind(1)  # (N, H, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        B, _, most, seen = mask.shape
        keys[row, :, slot], values[row, :, slot] = k, v
        padded = q.new_zeros(B, self.heads, most, q.shape[-1])
        padded[row, :, col] = q
        y = F.scaled_dot_product_attention(padded, keys[:, :, :seen], values[:, :, :seen], mask)
        return self.add(x[first:], y[row[first:], :, col[first:]].flatten(1))

    def add(self, x, y):
        """Attention's result y and then the MLP's, added to x, all (..., C)."""
        x = x + self.dropout(self.attn_out(y))
        return x + self.dropout(self.mlp_out(gelu(self.mlp_in(self.norm2(x)))))


class HeadSum(torch.autograd.Function):
    """The sum of f(h W^T + b, *rows) over all rows of h (N, C), without all logits (N, V) at once.
    The gradient is taken right after the value, while a chunk's logits are there, and waits for
    backward: so nothing is computed twice."""

    @staticmethod
    def forward(ctx, f, h, W, b, *rows):
        size = max(1, CHUNK // len(W))
        train = any(ctx.needs_input_grad[1:4])
        dh, dW, db = [torch.zeros_like(t) if train else None for t in (h, W, b)]
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
        grads, ctx.grads = ctx.grads, None                           # good for one backward
        return None, *[grad.mul_(g) for grad in grads], *ctx.rest


class Transformer(nn.Module):
    """The network. There is no time input: a masked sequence shows how noisy it is by its masks
    (MDLM, arXiv 2406.07524). Rotary positions alone are relative: where all is masked, all look the
    same, as in text that begins anywhere; where rows begin a text, "both" has learned ones too.

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
        self.bf16 = False                # True: run the blocks, and only them, in bfloat16
        self.recompute = False           # True: keep no activations for backward, make them again
        self.embed = nn.Embedding(config.vocab + 1, config.width)    # row V: the mask / the start
        if config.positions != "rope":
            self.embed_pos = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab)         # V outputs: never the mask
        D = config.width // config.heads
        angle = torch.arange(config.context)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("cos", angle.cos(), persistent=False)   # (context, D/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:                # residual stream of constant size at any depth
            for layer in (block.attn_out, block.mlp_out):
                layer.weight.data /= math.sqrt(2 * config.layers)
        self.mask_id = config.vocab              # of a causal model: the start of a text
        self.relative = config.positions == "rope" and not config.causal     # see diffusion.sample
        self.reveal = config.attention == "reveal"                           # the same

    def embedded(self, idx, pos):
        """Embeddings of ids at positions pos, and those positions' rotary tables, or None."""
        x = self.embed(idx)
        if self.config.positions != "rope":
            x = x + self.embed_pos(pos)
        return x, None if self.config.positions == "learned" else [self.cos[pos], self.sin[pos]]

    def trunk(self, idx, pos, mask=None, causal=False, cache=None, slots=None, seen=0, at=None):
        """hidden without its checks: slots (L,) of the cache are for the new tokens, and attention
        looks at the first `seen`. Nothing but `seen` is a number that changes from call to call."""
        x, rope = self.embedded(idx, pos)                            # (B, L, C)
        if rope is not None:                                         # (B or 1, 1, L, D/2)
            rope = [t.view(-1, 1, *t.shape[-2:]) for t in rope]
        again = self.recompute and torch.is_grad_enabled()
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.bf16):
            for layer, block in enumerate(self.blocks):
                if at is not None and layer == len(self.blocks) - 1:
                    return block.forward_at(x, rope, at, mask)
                args = x, rope, mask, causal, cache, (layer, slots, seen)
                x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        return x

    def seen_by(self, idx, order):
        """Who sees whom with attention "reveal", bool (B, 1, L, L), of ids (B, L): a token those
        with smaller numbers in order (B, L), random unless given, a mask all, and each itself."""
        order = torch.rand(idx.shape, device=idx.device) if order is None else order
        key = order.double().masked_fill(idx == self.mask_id, torch.inf)
        itself = torch.eye(idx.shape[1], dtype=torch.bool, device=idx.device)
        return (itself | (key[:, None] < key[:, :, None]))[:, None]

    def hidden(self, idx, pos=None, cache=None, at=None, order=None):
        """Run the blocks: ids (B, L) in 0..V -> hidden states (B, L, C), before the last norm.
        pos: positions of the tokens, (L,) or (B, L); 0..L-1 unless given. Attention follows the
        order of idx, not of pos: a causal model's token sees those before it in idx.
        cache: a KVCache; its tokens are seen by the new ones, which are then added to it.
        at: positions (B, n) whose states alone are wanted, (B, n, C); not causal, one pos for all.
        order: in which tokens were revealed, see seen_by.
        Raises ValueError for more tokens than the context or the cache holds."""
        past, end = (cache.length if cache else 0), idx.shape[1] + (cache.length if cache else 0)
        if end > self.config.context:
            raise ValueError(f"{end} tokens, but the context is {self.config.context}")
        seen = torch.arange(end, device=idx.device)
        pos = seen[past:] if pos is None else pos
        if cache is None:
            mask = self.seen_by(idx, order) if self.reveal else None
            return self.trunk(idx, pos, mask, self.config.causal, at=at)
        if end > cache.size:
            raise ValueError(f"the KV cache holds {cache.size} tokens, {end} were given")
        mask = seen <= seen[past:, None] if self.config.causal else None     # (L, end)
        cache.length = end
        return self.trunk(idx, pos, mask, False, cache, seen[past:], end)

    def cache(self, B, size):
        """An empty KVCache for B texts of `size` tokens."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return KVCache(self.config, B, size, self.embed.weight.device, dtype)

    def read(self, cache, idx, pos, row, col, slot, limit, first):
        """With attention "reveal" and a cache: N tokens, and masks from number `first` on, of the
        texts in the cache, ids idx at positions pos -> hidden states (N - first, C) of the masks.
        Each sees the slots below limit and its own, see Block.read; all (N,), row to limit on the
        CPU. A mask's slot is the one that its token will have, which writes over it."""
        seen = torch.arange(int(slot.max()) + 1)
        mask = torch.ones(len(cache.k[0]), int(col.max()) + 1, len(seen), dtype=torch.bool)
        mask[row, col] = (seen < limit[:, None]) | (seen == slot[:, None])       # (N, seen)
        row, col, slot, mask = (t.to(idx.device) for t in (row, col, slot, mask[:, None]))
        x, rope = self.embedded(idx, pos)                            # (N, C)
        if rope is not None:
            rope = [t[:, None] for t in rope]                        # (N, 1, D/2)
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.bf16):
            for block, k, v in zip(self.blocks, cache.k, cache.v):
                last = block is self.blocks[-1]
                x = block.read(x, rope, k, v, row, col, slot, mask, first if last else 0)
        return x

    def states(self, idx, at=None, order=None):
        """Hidden states (N, C) at the N positions of interest of idx (B, L), row by row: where the
        bool at (B, L) is true (sequences without any are not computed), or at positions at (B, n),
        N = B n (the last block is computed only there), or, without at, everywhere."""
        if at is None or at.dtype == torch.bool:
            some = slice(None) if at is None else at.any(1)          # (B,)
            h = self.hidden(idx[some], order=None if order is None else order[some])
            return h.flatten(0, 1) if at is None else h[at[some]]
        return self.hidden(idx, at=at, order=order).flatten(0, 1)

    def head(self, h):
        """Hidden states (..., C) -> logits (..., V), always in float32."""
        return self.lm_head(self.norm(h.float()).to(self.lm_head.weight.dtype)).float()

    def forward(self, idx, at=None, f=None, *rows, order=None):
        """Logits (B, L, V) of ids (B, L), or (N, V) at the N positions that `at` says, see states;
        the selection comes before the head, which is most of the work with V = 50,257. With f, a
        loss f(logits (n, V), *rows (n, ...)) -> (n,): its sum over the N positions, a scalar, for
        which no more than CHUNK logits exist at a time."""
        if f is not None:
            h = self.norm(self.states(idx, at, order).float())
            return HeadSum.apply(f, h, self.lm_head.weight, self.lm_head.bias, *rows)
        return self.head(self.hidden(idx, order=order) if at is None else
                         self.states(idx, at, order))


cross_entropy = functools.partial(F.cross_entropy, reduction="none")     # (n, V), (n,) -> (n,)


def shifted(x, start_id):
    """What an AR model reads to predict x (B, L): the start symbol, then x but for its last."""
    return torch.cat((torch.full_like(x[:, :1], start_id), x[:, :-1]), dim=1)


@torch.no_grad()
def nll(model, x, start_id):
    """Negative log-likelihood of x (B, L) under a causal model, (B, L), in nats per token."""
    h, size = model.states(shifted(x, start_id)), max(1, CHUNK // model.config.vocab)
    parts = zip(h.split(size), x.flatten().split(size))
    return torch.cat([cross_entropy(model.head(a), b) for a, b in parts]).view(x.shape)


def decode(model, token, slot, cache, seen):
    """One decoding step: ids (B, 1), which go to slot (1,) of the cache, -> logits (B, V).
    Attention looks at `seen` slots, of which those after `slot` are masked."""
    mask = torch.arange(seen, device=token.device) <= slot           # (seen,)
    return model.head(model.trunk(token, slot, mask[None], False, cache, slot, seen)[:, -1])


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
    out = torch.full((B, length + 1), model.mask_id, device=prompt.device)
    out[:, 1:P + 1] = prompt                                         # out[:, 0] is the start
    cache = cache or model.cache(B, length)
    cache.length = 0
    h = model.hidden(out[:, :min(P + 1, length)], cache=cache)       # prefill: start and prompt
    logits, slots = model.head(h[:, -1]), torch.arange(length, device=prompt.device)
    for i in range(P + 1, length + 1):                               # one token a step
        out[:, i] = draw(logits)
        if i < length:
            seen = min(length, (i // grain + 1) * grain)
            logits = step(model, out[:, i:i + 1], slots[i:i + 1], cache, seen)
    if bool((out[:, P + 1:] == model.mask_id).any()):    # what a draw from NaN gives
        raise FloatingPointError(NOT_FINITE)
    return out[:, 1:]
