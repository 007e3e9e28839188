"""The KV cache, and who reads with it: AR sampling, here, and diffusion with attention in
the order of reveal (diffusion.py, exact.py).

A token's key and value, once computed, are kept as long as nothing that the token sees can
change. In AR a token sees those before it; with attention "reveal", those revealed before
it. So both caches are exact, and each token is read once. (With full attention each token
sees all others: any reveal changes every key, and no cache is exact.)

    KVCache       storage for keys and values, by places
    Reading       which tokens or masks a call reads, and what each of them sees
    read_cached   one call: stores their keys and values, returns their states
    generate      AR sampling: a call for the prompt, then decode, one token at a time

Shapes: B texts, L positions, V tokens, C width, H heads, D = C / H; M positions of each
text; N positions of all texts together, n some of them. A "model" is model.py's
Transformer: its `run` takes who sees whom as a function for each block, here see_cache or
see_step.
"""
import functools
import typing

import torch
import torch.nn.functional as F

from data.devices import upload


# ---- what is stored, and what is read

class KVCache:
    """Keys and values of the tokens read so far, in storage that never moves or grows. Keys
    are stored after their rotation, so tokens may be read in any order of positions."""

    def __init__(self, config, B, slots, device=None, dtype=torch.float32):
        shape = (B, config.heads, slots, config.width // config.heads)   # (B, H, slots, D)
        new = functools.partial(torch.zeros, shape, device=device, dtype=dtype)
        self.k = [new() for _ in range(config.layers)]
        self.v = [new() for _ in range(config.layers)]
        self.slots = slots


class Reading(typing.NamedTuple):
    """M positions of each text for Transformer.read: tokens or masks of the texts in a
    cache. Texts that have fewer leave gaps in the rectangle (B, M). All but idx is on the
    CPU, so that to look at it never waits for a GPU.
    One rule serves all that use a cache: a position sees places 0 to limit - 1 of its
    text's cache, and its own place.
    AR: place = limit = position. Attention "reveal": the i-th token of the order (from 0)
    has place = limit = i. A mask has limit = the number of tokens known so far; its own key
    must be somewhere for it to see itself, so it borrows a place that nobody else sees. No
    limit is beyond its own place.
    Position 3 was revealed first, then 0; 1 and 2 are masks:

        idx     "tom"  "the"  mask  mask
        pos     3      0      1     2
        place   0      1      2     3         later tokens 2 and 3 of the order go there
        limit   0      1      2     2
    """
    idx: torch.Tensor            # (B, M) ids, on the model's device
    # (B, M) each
    pos: torch.Tensor            # positions
    place: torch.Tensor          # where in the cache key and value are stored
    limit: torch.Tensor          # see above
    valid: torch.Tensor          # bool: False in the gaps
    wanted_from: int = 0         # columns before this one only fill the cache: no states


class Packed(typing.NamedTuple):
    """N positions of B texts, side by side. Attention needs them as a rectangle (B, M),
    which has gaps where texts have fewer than M."""
    shape: torch.Size            # of the rectangle
    text: torch.Tensor           # (N,) the text of each position
    column: torch.Tensor         # (N,) where it stands in its text's row
    place: torch.Tensor          # (N,) where in the cache its key and value are stored
    sees: torch.Tensor           # (B, M, seen) bool: which places each sees

    def spread(self, x):
        """x (N, H, D) in the rectangle (B, M, H, D), with zeros in its gaps."""
        rectangle = x.new_zeros(*self.shape, *x.shape[1:])
        rectangle[self.text, self.column] = x
        return rectangle


def see_cache(q, k, v, keys, values, packed, at=None):
    """Attention of the N positions of a Packed to their texts' caches: q, k, v (N, H, D) ->
    the same shape, or with `at`, ids (n,) of some of them, (n, H, D). The new keys and
    values are stored first; then each position looks at the places it sees, its own
    included. keys, values: a block's part of the cache."""
    # keys are (B, H, slots, D); two indices around a slice give (N, H, D), as k has
    keys[packed.text, :, packed.place] = k
    values[packed.text, :, packed.place] = v
    seen = packed.sees.shape[-1]                     # nobody sees beyond these places
    k, v = keys[:, :, :seen], values[:, :, :seen]                    # (B, H, seen, D)
    q = packed.spread(q).transpose(1, 2)                             # (B, H, M, D)
    y = F.scaled_dot_product_attention(q, k, v, packed.sees[:, None])
    y = y.transpose(1, 2)[packed.text, packed.column]                # (N, H, D)
    if at is not None:
        y = y[at]
    return y


def read_cached(model, cache, new):
    """What Transformer.read does: store keys and values of a Reading's positions in the
    cache, and return the states (n, C) of those that are valid, from column wanted_from on,
    text by text. Raises ValueError where the cache has too few places."""
    device = new.idx.device
    seen = int(new.place[new.valid].max()) + 1   # none sees more: limit <= place
    if seen > cache.slots:
        raise ValueError(f"the KV cache holds {cache.slots} tokens, {seen} were given")

    # who sees whom. Gaps see all: attention to nothing could give NaN
    limit = upload(new.limit.masked_fill(~new.valid, seen), device)              # (B, M)
    place, pos = upload(new.place, device), upload(new.pos, device)              # (B, M)
    places = torch.arange(seen, device=device)
    before = places < limit[..., None]                               # (B, M, seen)
    itself = places == place[..., None]

    # only attention needs the rectangle: all else is computed for the N valid
    # positions, side by side
    text, column = new.valid.nonzero(as_tuple=True)                  # (N,) both
    # those before wanted_from only had to fill the cache: the last block drops them
    wanted = (column >= new.wanted_from).nonzero()[:, 0]             # (n,)
    wanted = upload(wanted, device)
    text, column = upload(text, device), upload(column, device)
    packed = Packed(place.shape, text, column, place[text, column], before | itself)
    # each block has its own part of the cache
    attends = []
    for keys, values in zip(cache.k, cache.v):
        attends.append(functools.partial(see_cache, keys=keys, values=values,
                                         packed=packed))
    return model.run(new.idx[text, column], pos[text, column], attends, wanted)


def see_step(q, k, v, keys, values, slot, sees):
    """see_cache for AR decoding, where each of B texts has one token, all in the same slot
    (1,): q, k, v (B, H, D) -> (B, H, D), sees (1, seen). Nothing is padded, and `seen` is
    the only shape that changes between steps."""
    keys.index_copy_(2, slot, k[:, :, None])                         # (B, H, slots, D)
    values.index_copy_(2, slot, v[:, :, None])
    seen = sees.shape[-1]
    k, v = keys[:, :, :seen], values[:, :, :seen]                    # (B, H, seen, D)
    y = F.scaled_dot_product_attention(q[:, :, None], k, v, sees)    # (B, H, 1, D)
    return y[:, :, 0]


# ---- AR sampling

NOT_FINITE = ("the model's predictions are not finite numbers, so nothing can be drawn "
              "from them: its training diverged; train it anew with a lower --lr")


def decode(model, token, slot, cache, seen):
    """One decoding step, as read would do it, but in few shapes, so that it can be
    compiled. token: ids (B,), all at position `slot` (1,), which is also their place in the
    cache -> logits (B, V). seen: how many slots attention computes, slot + 1 or more (see
    `grain` in generate); it sees those up to `slot` alone."""
    sees = torch.arange(seen, device=token.device) <= slot           # (seen,)
    # each block has its own part of the cache
    attends = []
    for keys, values in zip(cache.k, cache.v):
        attends.append(functools.partial(see_step, keys=keys, values=values, slot=slot,
                                         sees=sees[None]))
    return model.head(model.run(token, slot, attends))


@torch.no_grad()
def generate(model, prompt, length, draw, step=decode, grain=1, cache=None):
    """Autoregressive decoding with a KV cache: each token is read once.
    prompt: ids (B, P), P may be 0. length: tokens of the result, prompt included.
    draw: logits (B, V) -> ids (B,), such as diffusion.categorical; where logits are NaN it
    gives V, which is looked for at the end.
    step: decode, or a compiled form of it. grain: the number of slots that attention looks
    at is rounded up to a multiple of this, so that a compiled step has few shapes. cache: a
    KVCache to use again.
    Returns ids (B, length). Raises ValueError if the prompt is longer than `length`, or
    `length` than the context; FloatingPointError if predictions are NaN."""
    B, P = prompt.shape
    if not P <= length <= model.config.context:
        raise ValueError(f"a prompt of {P} tokens in a text of {length}, "
                         f"with a context of {model.config.context}")
    device = prompt.device
    # out[:, 0] is the start symbol; the last token is never read, so `length` slots do
    out = torch.full((B, length + 1), model.mask_id, device=device)
    out[:, 1:P + 1] = prompt
    cache = cache or model.cache(B, length)

    # prefill: the start symbol and the prompt, all texts at once
    n = min(P + 1, length)               # P + 1, unless the prompt is the whole text
    place = torch.arange(n).expand(B, n)
    new = Reading(idx=out[:, :n], pos=place, place=place, limit=place,
                  valid=torch.ones(B, n, dtype=torch.bool), wanted_from=n - 1)
    h = model.read(cache, new)                                       # (B, C), of the last
    logits = model.head(h)                                           # (B, V)

    # one token a step
    slots = torch.arange(length, device=device)
    for i in range(P + 1, length + 1):
        out[:, i] = draw(logits)
        if i < length:                   # nothing follows the last token
            seen = min(length, (i // grain + 1) * grain)     # i + 1, rounded up
            logits = step(model, out[:, i], slots[i:i + 1], cache, seen)

    # a draw from NaN gives V, see diffusion.categorical. It is looked for only now, as each
    # look makes the CPU wait for a GPU
    if bool((out[:, P + 1:] == model.mask_id).any()):
        raise FloatingPointError(NOT_FINITE)
    return out[:, 1:]
