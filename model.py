"""One transformer for three jobs: masked diffusion (bidirectional), its distilled students (the
same), and the autoregressive baseline (causal, with a KV cache).

Shapes: B sequences, L positions, V tokens, C width, H heads, D = C / H. The vocabulary has V real
tokens; id V is the mask for a diffusion model and the start symbol for an autoregressive one. The
embedding therefore has V + 1 rows and the head V: no model here can ever predict the mask.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    vocab: int                   # V, real tokens; the mask (or start symbol) is id V
    context: int                 # most positions a sequence may have
    layers: int = 4
    heads: int = 4
    width: int = 128             # C
    causal: bool = False         # True: autoregressive, False: every position sees every other
    positions: str = "rope"      # "rope" (rotary), "learned" (GPT-2) or "both", see Transformer
    dropout: float = 0.0         # on each block's two outputs, in training only


PRESETS = {                      # layers, heads, width, context; small to large are SDTT's sizes
    "nano": dict(layers=3, heads=4, width=128, context=64),      # for a laptop CPU
    "small": dict(layers=12, heads=12, width=768, context=1024),
    "medium": dict(layers=24, heads=16, width=1024, context=1024),
    "large": dict(layers=24, heads=16, width=1536, context=1024),
    "xl": dict(layers=24, heads=32, width=2048, context=1024),
}


class KVCache:
    """Keys and values of the tokens seen so far, in storage that never moves or grows.

    Keys are stored after their rotation, so a slot does not depend on where in the text its token
    stands: the cache may be filled in any order of positions.
    """

    def __init__(self, config, B, size, device=None, dtype=torch.float32):
        shape = (config.layers, B, config.heads, size, config.width // config.heads)
        self.k = torch.zeros(shape, device=device, dtype=dtype)      # (layers, B, H, size, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0                                              # slots in use

    def append(self, layer, k, v):
        """Store k, v (B, H, n, D) of one layer; return all of its keys and values so far."""
        end = self.length + k.shape[2]
        if end > self.k.shape[3]:
            raise ValueError(f"the KV cache holds {self.k.shape[3]} tokens, {end} were given")
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def rotate(x, cos, sin):
    """Rotary positions (RoPE, arXiv 2104.09864) in the rotate-half layout.

    x (B, H, L, D); cos, sin (B or 1, 1, L, D/2). Pair i of x is its coordinates i and i + D/2.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.attn_out = nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C)
        self.mlp_in = nn.Linear(C, 4 * C)
        self.mlp_out = nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask, causal, cache, layer):
        """x (B, L, C) -> (B, L, C). mask (L, keys) bool or None; rope (cos, sin) or None."""
        B, L, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # each (B, H, L, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)                         # (B, H, keys, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, L, C)
        x = x + self.dropout(self.attn_out(y))
        h = F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(h))


class Transformer(nn.Module):
    """The network. `model(z, at)` gives logits at the positions of interest only; there is no time
    input, since a masked sequence shows how noisy it is by its masks (MDLM, arXiv 2406.07524).

    Rotary positions alone are relative: where all is masked, every position looks the same. Text
    that begins anywhere is like that; where each row begins a text, "both" adds learned ones."""

    def __init__(self, config):
        super().__init__()
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width} is not a multiple of 2 x {config.heads} heads")
        if config.positions not in ("rope", "learned", "both"):
            raise ValueError(f"positions: 'rope', 'learned' or 'both', not {config.positions!r}")
        self.config = config
        self.bf16 = False                        # True: run the blocks, and only them, in bfloat16
        self.embed = nn.Embedding(config.vocab + 1, config.width)    # row V: the mask / the start
        if config.positions != "rope":
            self.embed_pos = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab)         # V outputs: never the mask
        D = config.width // config.heads
        freq = 10000.0 ** (-torch.arange(0, D, 2) / D)               # (D/2,)
        angle = torch.arange(config.context)[:, None] * freq         # (context, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.apply(self._init)
        for block in self.blocks:                # residual stream of constant size at any depth
            for layer in (block.attn_out, block.mlp_out):
                layer.weight.data /= math.sqrt(2 * config.layers)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def mask_id(self):
        """The id that stands for a masked token; for a causal model, for the start of a text."""
        return self.config.vocab

    def hidden(self, idx, pos=None, cache=None):
        """Run the blocks: ids (B, L) in 0..V -> hidden states (B, L, C), before the last norm.

        pos: positions of the tokens, (L,) or (B, L); 0..L-1 unless given. Attention follows the
        order of idx, not of pos: a causal model's token sees those before it in idx.
        cache: a KVCache; its tokens are seen by the new ones, which are then added to it.
        Raises ValueError for more tokens than the context or the cache holds.
        """
        B, L = idx.shape
        past = 0 if cache is None else cache.length
        if past + L > self.config.context:
            raise ValueError(f"{past + L} tokens, but the context is {self.config.context}")
        if pos is None:
            pos = torch.arange(past, past + L, device=idx.device)
        x, rope = self.embed(idx), None                              # (B, L, C)
        if self.config.positions != "rope":
            x = x + self.embed_pos(pos)
        if self.config.positions != "learned":                       # (B or 1, 1, L, D/2)
            rope = [table[pos].view(-1, 1, L, table.shape[1]) for table in (self.cos, self.sin)]
        causal, mask = self.config.causal and L > 1, None
        if causal and past:                      # new token i sees all the past and new ones <= i
            mask = torch.ones(L, past + L, dtype=torch.bool, device=idx.device).tril(past)
            causal = False
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.bf16):
            for layer, block in enumerate(self.blocks):
                x = block(x, rope, mask, causal, cache, layer)
        if cache is not None:
            cache.length += L
        return x

    def head(self, h):
        """Hidden states (..., C) -> logits (..., V), always in float32."""
        return self.lm_head(self.norm(h.float()))

    def forward(self, idx, at=None):
        """Logits (B, L, V), or (N, V) at the N positions where the bool `at` (B, L) is true.

        The selection comes before the head: with V = 50,257 the head is most of the work.
        """
        h = self.hidden(idx)
        return self.head(h if at is None else h[at])


def nll(model, x, start_id):
    """Negative log-likelihood of x (B, L) under a causal model, (B, L), in nats per token."""
    start = torch.full_like(x[:, :1], start_id)
    logits = model(torch.cat((start, x[:, :-1]), dim=1))             # (B, L, V)
    return F.cross_entropy(logits.transpose(1, 2), x, reduction="none")


@torch.no_grad()
def generate(model, prompt, length, draw):
    """Autoregressive decoding with a KV cache: each token is forwarded once.

    prompt: ids (B, P), P may be 0; length: tokens of the result, prompt included;
    draw: logits (B, V) -> ids (B,), for example diffusion.categorical, or an argmax.
    Returns ids (B, length). Raises ValueError if the prompt is longer than `length`, or `length`
    than the context (the start symbol takes the place of the last token, which is never fed).
    """
    B, P = prompt.shape
    if not P <= length <= model.config.context:
        raise ValueError(f"a prompt of {P} tokens in a text of {length}, "
                         f"with a context of {model.config.context}")
    out = torch.full((B, length + 1), model.mask_id, device=prompt.device)
    out[:, 1:P + 1] = prompt                                         # out[:, 0] is the start
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    cache = KVCache(model.config, B, length, prompt.device, dtype)
    new = out[:, :P + 1]                                             # prefill: start and prompt
    for i in range(P + 1, length + 1):
        logits = model.head(model.hidden(new, cache=cache)[:, -1])   # (B, V), last position only
        out[:, i] = draw(logits)
        new = out[:, i:i + 1]                                        # decode: one token a step
    return out[:, 1:]
