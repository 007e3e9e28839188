"""One transformer for three jobs: masked diffusion (bidirectional, or in the order of
reveal), its distilled students (the same), and the autoregressive (AR) baseline (causal).

Shapes: B sequences, L positions, V tokens, C width, H heads, D = C / H; M chosen positions
in each sequence, N in all sequences together. The vocabulary has V real tokens; id V is
the mask of a diffusion model and the start symbol of an AR one. The embedding therefore has
V + 1 rows and the head V: no model here can ever predict the mask. Below a "token" is a
real one, a "mask" a position whose id is V.

How it is asked:

    h = model.hidden(ids)            states (B, L, C) of whole sequences, before the last
                                     norm, which the head applies
    h = model.hidden(ids, at)        only those at some positions, (B, M, C)
    logits = model.head(h)           (..., V)
    model.chunked_sum(h, cross_entropy, targets)     head and loss of h (N, C), summed

`at`: a sampler often needs the states at some positions only, say those that it reveals
next. The last block then attends from these alone, and runs its MLP there alone; its keys
and values are of all positions. x[at] picks them:

    at = torch.arange(B)[:, None], positions         # positions (B, M): x[at] is (B, M, C)

M is the largest number that any text needs; texts that need fewer fill up with any
position, and the caller drops those states.

Only attention mixes positions, and there are several kinds of it. So each block is given
its attention as a function attend(q, k, v): see_sequence, below, or one of cache.py's.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cache import KVCache, read_cached
from data.fast import HeadSum, Linear, gelu


@dataclass
class ModelConfig:
    """What a model is, beside its weights; saved with them."""
    vocab: int                   # V, real tokens; the mask (or start symbol) is id V
    context: int                 # most positions a sequence may have
    layers: int = 4
    heads: int = 4               # H
    width: int = 128             # C
    attention: str = "full"      # "full", "causal" (AR) or "reveal", see Transformer
    positions: str = "rope"      # "rope" (rotary), "learned" (GPT-2's) or "both"
    dropout: float = 0.0         # on each block's two outputs, in training only
    # biases in attention's projections; MDLM's models (arXiv 2406.07524) have none
    attention_bias: bool = True

    @property
    def causal(self):
        return self.attention == "causal"

    @property
    def masks_alike(self):
        """Whether in a text of nothing but masks all have the same state, so that one
        serves for all (diffusion.blank_states). With rope alone they have: rotation changes
        only attention's weights, and any weighted mean of equal values is that value. (A
        causal model has no masks.)"""
        return self.positions == "rope" and not self.causal


PRESETS = {
    # for short texts, on a laptop CPU (the second is slow there)
    "nano": dict(layers=3, heads=4, width=128, context=64),
    "mini": dict(layers=4, heads=6, width=192, context=64),
    # SDTT's three sizes, and a larger one
    "small": dict(layers=12, heads=12, width=768, context=1024),
    "medium": dict(layers=24, heads=16, width=1024, context=1024),
    "large": dict(layers=24, heads=16, width=1536, context=1024),
    "xl": dict(layers=24, heads=32, width=2048, context=1024),
}
SHORT = "nano", "mini"           # presets of short texts
CHOICES = {"positions": ("rope", "learned", "both"),
           "attention": ("full", "causal", "reveal")}
CHUNK = 2 ** 24                  # logits at a time in losses: 64 MB


# ---- one block

def rotate(x, cos, sin):
    """Rotary positions (RoPE, arXiv 2104.09864): x (..., H, D) -> the same shape. Pair i of
    it, coordinates i and i + D/2, is turned by the angle whose cos and sin the tables
    (..., 1, D/2) hold."""
    a, b = x.chunk(2, dim=-1)                            # (..., H, D/2) each
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.type_as(x)                             # the tables are float32


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads = config.heads
        # attention: queries, keys and values come from one product. (Linear and gelu, of
        # data/fast.py, compute what PyTorch's do, but compile to faster code)
        self.norm1 = nn.LayerNorm(C)
        self.qkv = Linear(C, 3 * C, bias=config.attention_bias)
        self.attn_out = Linear(C, C, bias=config.attention_bias)
        # the MLP
        self.norm2 = nn.LayerNorm(C)
        self.mlp_in = Linear(C, 4 * C)
        self.mlp_out = Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, attend, at=None):
        """x (..., C) -> the same shape (unless `at`). rope: the tables of rotate, or None.
        attend(q, k, v), each (..., H, D), returns attention's output, of the same shape.
        at: given to the last block only; it and attend then return those positions alone.
        """
        qkv = self.qkv(self.norm1(x))                                # (..., 3 C)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., H, D) each
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if at is not None:
            x = x[at]                    # (B, M, C), or (N, C) of cache.py
            attend = functools.partial(attend, at=at)
        # the only place where positions meet
        y = attend(q, k, v).flatten(-2)          # (..., C), or only those of at
        # both halves add to the stream x
        x = x + self.dropout(self.attn_out(y))
        return x + self.dropout(self.mlp_out(gelu(self.mlp_in(self.norm2(x)))))


# ---- who sees whom

def see_sequence(q, k, v, sees=None, causal=False, at=None):
    """Attention within sequences: q, k, v (B, L, H, D) -> the same shape. With `at` only
    the M queries of each text at those positions look: (B, M, H, D). (Without it M is L.)
    sees (B, L, L) bool: sees[b, i, j] says whether position i of text b sees j. Without it
    each position sees all, or, if causal, those not later."""
    if at is not None:
        q = q[at]                                                    # (B, M, H, D)
        if sees is not None:
            sees = sees[at]                                          # (B, M, L)
    # PyTorch wants heads before positions: q (B, H, M, D), k and v (B, H, L, D)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if sees is not None:
        sees = sees[:, None]                                         # alike for all heads
    # softmax(q k^T / sqrt(D)) v, over those that are seen
    y = F.scaled_dot_product_attention(q, k, v, sees, is_causal=causal)
    return y.transpose(1, 2)                                         # (B, M, H, D)


def sees_in_order(idx, rank, mask_id):
    """Who sees whom with attention "reveal", bool (B, L, L), of ids (B, L): each token sees
    itself and the tokens revealed before it, those of lower rank (B, L); each mask sees
    itself and all tokens. The ranks are random unless given."""
    if rank is None:
        rank = torch.rand(idx.shape, device=idx.device)
    # masks have rank infinity: they see all tokens, but no other mask (inf < inf is false)
    rank = rank.float().masked_fill(idx == mask_id, torch.inf)       # (B, L)
    # before[b, i, j]: is j revealed before i?
    before = rank[:, None, :] < rank[:, :, None]                     # (B, L, L)
    itself = torch.eye(idx.shape[1], dtype=torch.bool, device=idx.device)
    return itself | before


# ---- the network

class Transformer(nn.Module):
    """The network. There is no time input: a masked sequence shows how noisy it is by its
    masks (MDLM, arXiv 2406.07524).

    positions: "rope" (rotary) sees distances only, which suits rows that are cut anywhere
    from long texts; "learned" sees where a token stands; "both" is for data in which each
    row begins a text.
    attention: "full", all see all; "causal"; or "reveal": a token sees itself and those
    revealed before it, a mask itself and all tokens, and nobody the mask of another
    position. So what a token sees never changes, nor do its keys and values in any block: a
    KV cache of diffusion is exact."""

    def __init__(self, config):
        super().__init__()
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width} is not a multiple of "
                             f"2 x {config.heads} heads")
        for name, known in CHOICES.items():
            if getattr(config, name) not in known:
                raise ValueError(f"{name}: one of {known}, not {getattr(config, name)!r}")
        self.config = config
        self.mask_id = config.vocab      # of a causal model: the start of a text
        # how it is run, which is not saved. bf16: the blocks' matrix products in bfloat16
        # (autocast); weights and the stream x stay float32
        self.bf16 = False
        # recompute: gradient checkpointing: less memory, one more pass of each block
        self.recompute = False

        # the tensors
        self.embed = nn.Embedding(config.vocab + 1, config.width)    # row V: mask or start
        if config.positions != "rope":
            self.embed_pos = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # V: never the mask; not tied to the embedding
        self.lm_head = nn.Linear(config.width, config.vocab)

        # the rotary tables (context, D/2): position times the pair's frequency
        D = config.width // config.heads
        # radians per position: 1 for the first pair, falling towards 1/10000
        frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)          # (D/2,)
        angle = torch.arange(config.context)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

        # the initial weights, as GPT-2's
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # each block adds to the stream twice; scaled like this, it does not grow with depth
        for block in self.blocks:
            block.attn_out.weight.data /= math.sqrt(2 * config.layers)
            block.mlp_out.weight.data /= math.sqrt(2 * config.layers)

    def run(self, idx, pos, attends, at=None):
        """Embedding and blocks: ids idx (...) -> states (..., C), before the last norm.
        From hidden idx is (B, L), from cache.py it has other shapes; pos, where in their
        texts the ids stand, broadcasts to it.
        attends: a function attend(q, k, v) for each block. From hidden all are the same;
        with a KV cache each block has keys of its own. at: see the top, or see_cache."""
        # what stands where
        x = self.embed(idx)                                          # (..., C)
        if self.config.positions != "rope":
            x = x + self.embed_pos(pos)
        # tables for q and k, the same for all heads: (..., 1, D/2) each
        rope = None
        if self.config.positions != "learned":
            rope = self.cos[pos][..., None, :], self.sin[pos][..., None, :]
        # recompute: keep only a block's input for backward, which runs the block again
        recompute = self.recompute and torch.is_grad_enabled()
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.bf16):
            for block, attend in zip(self.blocks, attends):
                if at is not None and block is self.blocks[-1]:
                    # block(...) runs a compiled block (train.py), compiled anew for each M,
                    # which in sampling differs from call to call; .forward is not compiled
                    x = block.forward(x, rope, attend, at)
                elif recompute:
                    x = checkpoint(block, x, rope, attend, use_reentrant=False)
                else:
                    x = block(x, rope, attend)
        return x

    def hidden(self, idx, at=None, rank=None, pos=None):
        """States of whole sequences: ids (B, L) in 0..V -> (B, L, C); with `at`, two index
        tensors, of texts (B, 1) and positions (B, M), only the states there, (B, M, C).
        rank (B, L): for attention "reveal" alone, when each token was revealed. Only the
        order of these numbers counts; those at masks are ignored. A training text has no
        order: without rank a random one is drawn, anew in every call.
        pos: positions (L,) or (B, L), 0..L-1 unless given (only tests do).
        Raises ValueError for more positions than the context, or `at` of a causal model."""
        B, L = idx.shape
        if L > self.config.context:
            raise ValueError(f"{L} tokens, but the context is {self.config.context}")
        if at is not None and self.config.causal:
            # is_causal goes by the row of q, and in q[at] row i is not position i
            raise ValueError("a causal model's hidden computes all positions")
        if pos is None:
            pos = torch.arange(L, device=idx.device)

        # who sees whom: in all blocks the same
        sees = None
        if self.config.attention == "reveal":
            sees = sees_in_order(idx, rank, self.mask_id)            # (B, L, L)
        see = functools.partial(see_sequence, sees=sees, causal=self.config.causal)
        return self.run(idx, pos, [see] * len(self.blocks), at)

    def head(self, h):
        """Hidden states (..., C) -> logits (..., V), always in float32."""
        # bfloat16 logits are too coarse to draw tokens from. (`to` changes nothing, but
        # where tools/ time a bfloat16 matrix)
        h = self.norm(h.float()).to(self.lm_head.weight.dtype)
        return self.lm_head(h).float()

    def forward(self, idx, rank=None):
        """Logits (B, L, V) of ids (B, L): all at once, so only for a few texts. rank: see
        hidden."""
        return self.head(self.hidden(idx, rank=rank))

    def chunked_sum(self, h, f, *rows):
        """f(head(h), *rows).sum(), a scalar, for the losses, but never with all logits at
        once: these and their gradient would be the largest tensors of a training step.
        h (N, C) and each of rows (N, ...), such as the targets, are cut into chunks of
        CHUNK logits; f maps a chunk's logits (n, V) and rows (n, ...) to (n,)."""
        h = self.norm(h.float())
        W, b = self.lm_head.weight, self.lm_head.bias
        # HeadSum (data/fast.py) is f(F.linear(h, W, b), *rows).sum(): for each chunk it
        # makes the logits, sums f and, already here, its gradients; then frees the logits
        if not torch.is_grad_enabled():
            W, b = W.detach(), b.detach()        # or it would compute gradients in vain
        return HeadSum.apply(f, rows_at_a_time(len(W)), h, W, b, *rows)

    # ---- with a KV cache (cache.py); SDTT needs none, so skip it at a first reading

    def cache(self, B, L, spare=0):
        """An empty KVCache for B texts of at most L tokens, with `spare` more places, which
        exact.py needs. Raises ValueError for more tokens than the context."""
        if L > self.config.context:
            raise ValueError(f"{L} tokens, but the context is {self.config.context}")
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return KVCache(self.config, B, L + spare, self.embed.weight.device, dtype)

    def read(self, cache, new):
        """States of some positions of texts with a KV cache, see read_cached."""
        return read_cached(self, cache, new)


def rows_at_a_time(V):
    """How many rows of V logits make a chunk."""
    return max(1, CHUNK // V)


# (n, V) logits, (n,) ids -> (n,)
cross_entropy = functools.partial(F.cross_entropy, reduction="none")


# ---- autoregressive models

def shifted(x, start_id):
    """What an AR model reads to predict x (B, L): the start symbol, then x without its last
    token."""
    return torch.cat((torch.full_like(x[:, :1], start_id), x[:, :-1]), dim=1)


@torch.no_grad()
def nll(model, x):
    """Negative log-likelihood of x (B, L) under a causal model, (B, L), in nats."""
    # the state at a position has read the tokens before it, but not its own
    h = model.hidden(shifted(x, model.mask_id)).flatten(0, 1)        # (B L, C)
    # the head for a part of the tokens at a time: all logits would take much memory. (Not
    # by chunked_sum: each token's number is wanted)
    size = rows_at_a_time(model.config.vocab)
    nats = []
    for states, ids in zip(h.split(size), x.flatten().split(size)):
        nats.append(cross_entropy(model.head(states), ids))
    return torch.cat(nats).view(x.shape)
