"""The KV cache, and who reads with it: AR sampling, here, and diffusion with attention in
the order of reveal (diffusion.py, exact.py).

A token's key and value can be kept if nothing that the token sees will ever change. In AR
it sees the tokens before it; with attention "reveal", those revealed before it. So both
caches are exact, and each token is read at most once (exact.py reads its guesses again).
With full attention each token sees all others: any reveal changes all keys beyond the first
block, and no cache is exact.

    KVCache       storage for keys and values, by places
    decode        one token of each text: AR's decoding step, without its draw
    Reading       what a larger call reads, tokens or masks, and what each of them sees
    read_cached   that call: stores their keys and values, returns their states
    generate      AR sampling: read_cached for a prompt, then decode after decode

A *place* is an index into a text's part of the cache, from 0. Tokens fill places in the
order in which they come, wherever they stand in the text. In AR the start symbol has place
and position 0, the text's token i has i + 1 as both; with attention "reveal" a token's
place is its number in the order of reveal, from 0, which diffusion.py calls its slot. Masks
borrow places, see Reading.

Shapes: B texts, L positions, V tokens, C width, H heads, D = C / H; S places of each text's
cache, of which attention is given the first `extent` (and `sees` says which of those each
position looks at). A call reads M columns of each text, gaps included, R positions in all,
and returns the states of N of these, the N of diffusion.py and exact.py. A "model" is
model.py's Transformer: its `run` takes who sees whom as a function for each block, here
see_cache or see_step.
"""
import functools
import typing

import torch
import torch.nn.functional as F

from data.devices import upload          # a CPU tensor to a device, without waiting


# raised by every sampler
NOT_FINITE = ("the model's predictions are not finite numbers, so nothing can be drawn "
              "from them: its training diverged; train it anew with a lower --lr")


# ---- what is stored

class KVCache:
    """Keys and values of the tokens read so far, in storage of a fixed size, which a
    compiled step can use again and again. A key is stored already rotated for its position,
    so tokens may come in any order of positions."""

    def __init__(self, config, B, places, device=None, dtype=torch.float32):
        shape = (B, config.heads, places, config.width // config.heads)  # (B, H, S, D)
        # not empty(): an unseen place has weight 0, but 0 times a NaN left there is NaN
        new = functools.partial(torch.zeros, shape, device=device, dtype=dtype)
        self.k = [new() for _ in range(config.layers)]
        self.v = [new() for _ in range(config.layers)]
        self.places = places             # S


def for_each_block(see, cache, **how):
    """The list of attends for Transformer.run: `see`, given each block's keys and values,
    and the arguments `how`, the same in all blocks."""
    attends = []
    for keys, values in zip(cache.k, cache.v):
        attends.append(functools.partial(see, keys=keys, values=values, **how))
    return attends


# ---- one token of each text: AR's decoding step

def see_step(q, k, v, keys, values, place, sees):
    """Attention of one token of each text to its text's cache, q, k, v (B, H, D) -> (B, H,
    D), after its key and value are stored, in the same place (1,) in all texts. keys,
    values (B, H, S, D): a block's part of the cache. sees (1, extent): of the one query,
    alike for all texts."""
    keys.index_copy_(2, place, k[:, :, None])            # one (B, H, 1, D) of (B, H, S, D)
    values.index_copy_(2, place, v[:, :, None])
    extent = sees.shape[-1]
    k, v = keys[:, :, :extent], values[:, :, :extent]            # (B, H, extent, D)
    y = F.scaled_dot_product_attention(q[:, :, None], k, v, sees)    # (B, H, 1, D)
    return y[:, :, 0]


def decode(model, token, place, cache, extent):
    """One decoding step: ids (B,), whose position and place in the cache are both `place`
    (1,) -> logits (B, V). read_cached could do the same, but takes sizes from data, which a
    compiler cannot follow; here only `extent` varies.
    extent: how many places attention is given, place + 1 or more (generate rounds it up, to
    few shapes); those after `place` are masked out."""
    sees = torch.arange(extent, device=token.device) <= place        # (extent,)
    attends = for_each_block(see_step, cache, place=place, sees=sees[None])
    return model.head(model.run(token, place, attends))


# ---- many positions of each text

class Reading(typing.NamedTuple):
    """What one call reads, a rectangle (B, M). The row of a text is: tokens, gap, masks,
    gap, as texts have different numbers of each; in all rows the masks begin at column
    wanted_from. All but idx is on the CPU, so that to look at it never waits for a GPU.

    For example the text will be "tom was very sad .". A call reads the tokens "sad"
    (position 3) and "tom" (0), and the masks at 2 and 1, which become "very" and "was"; the
    next call reads these two and the last mask:

                first call                         second call
        idx     "sad"  "tom"  mask     mask        "very"  "was"   mask
        pos     3      0      2        1           2       1       4
        place   0      1      2        3           2       3       4
        limit   0      1      2        2           2       3       4
        sees    0      0, 1   0, 1, 2  0, 1, 3     0 to 2  0 to 3  0 to 4      places
        wanted_from = 2 in both: the tokens only fill the cache

    One rule serves all: a position sees places 0 to limit - 1 of its text, and its own.

        AR's token          place = limit = position
        "reveal", a token   place = limit = its number in the order of reveal
        "reveal", a mask    limit: how many tokens it sees. In diffusion.py all known, also
                            those read in this call (a block stores all keys before anyone
                            looks); in exact.py at most those before its slot

    To see itself a mask must store its key somewhere. So it borrows a place that nobody
    else sees in this call, and what it leaves there must never be seen later: in the
    example the slot's own token overwrites it; in exact.py such places are beyond every
    limit.
    """
    idx: torch.Tensor            # (B, M) ids, on the model's device
    # (B, M) each; what is in the gaps does not matter
    pos: torch.Tensor            # positions
    place: torch.Tensor          # where in the cache key and value are stored
    limit: torch.Tensor          # at most place
    valid: torch.Tensor          # bool: False in the gaps
    wanted_from: int = 0         # columns before this one need no states


class Packed(typing.NamedTuple):
    """Where the R valid positions of a Reading belong. The linear layers compute just
    these, side by side, (R, C); their keys and values go straight into the cache. Only the
    queries are spread over the rectangle (B, M) again, as attention wants equally many of
    each text."""
    shape: torch.Size            # of the rectangle
    text: torch.Tensor           # (R,) the text of each position
    column: torch.Tensor         # (R,) where it stands in its text's row
    place: torch.Tensor          # (R,) where in the cache its key and value are stored
    sees: torch.Tensor           # (B, M, extent) bool: which places each sees

    def spread(self, x):
        """x (R, H, D) in the rectangle (B, M, H, D), with zeros in its gaps."""
        rectangle = x.new_zeros(*self.shape, *x.shape[1:])
        rectangle[self.text, self.column] = x
        return rectangle


def read_cached(model, cache, new):
    """Read the valid positions of a Reading: store their keys and values in the cache, and
    return the states (N, C) of those from column wanted_from on, text by text. (It is
    model.read.) Raises ValueError where the cache has too few places."""
    device = new.idx.device
    extent = int(new.place[new.valid].max()) + 1     # none sees more: limit <= place
    if extent > cache.places:
        raise ValueError(f"the KV cache has {cache.places} places for each text, but place "
                         f"{extent - 1} is to be filled (they count from 0)")

    # who sees whom, by places
    limit, place = upload(new.limit, device), upload(new.place, device)          # (B, M)
    places = torch.arange(extent, device=device)
    before = places < limit[..., None]                               # (B, M, extent)
    itself = places == place[..., None]

    # the R valid positions, side by side: all but attention is computed for these alone
    text, column = new.valid.nonzero(as_tuple=True)                  # (R,) both, on the CPU
    # of the tokens, which only fill the cache, the last block makes no states
    wanted = (column >= new.wanted_from).nonzero()[:, 0]             # (N,)
    text, column = upload(text, device), upload(column, device)
    packed = Packed(shape=place.shape, text=text, column=column,
                    place=place[text, column], sees=before | itself)
    attends = for_each_block(see_cache, cache, packed=packed)
    pos = upload(new.pos, device)[text, column]                      # (R,)
    return model.run(new.idx[text, column], pos, attends, at=upload(wanted, device))


def see_cache(q, k, v, keys, values, packed, at=None):
    """Attention of the R positions of a Packed to their texts' caches: q, k, v (R, H, D) ->
    the same shape, or with `at`, indices (N,) of some of them, (N, H, D). The new keys and
    values are stored first; then each position looks at the places it sees, its own
    included. keys, values: a block's part of the cache."""
    # keys are (B, H, S, D). Indexed by two tensors with a slice between them, they are (R,
    # H, D), as k and v are: PyTorch puts the tensors' dimension first
    keys[packed.text, :, packed.place] = k
    values[packed.text, :, packed.place] = v
    extent = packed.sees.shape[-1]                   # nobody sees beyond these places
    k, v = keys[:, :, :extent], values[:, :, :extent]            # (B, H, extent, D)
    q = packed.spread(q).transpose(1, 2)                             # (B, H, M, D)
    y = F.scaled_dot_product_attention(q, k, v, packed.sees[:, None])
    y = y.transpose(1, 2)[packed.text, packed.column]                # (R, H, D)
    if at is not None:
        y = y[at]        # only now: attention is computed for the whole rectangle anyway
    return y


# ---- AR sampling

@torch.no_grad()
def generate(model, prompt, length, draw, step=decode, grain=1, cache=None):
    """Autoregressive decoding with a KV cache: each token is read once, the last never.
    prompt: ids (B, P), P may be 0. length: tokens of the result, prompt included.
    draw: logits (B, V) -> ids (B,), such as diffusion.categorical. Where logits are NaN it
    gives V, an id that no model predicts, which is looked for at the end.
    step: decode, or a compiled form of it. grain: the number of places that attention
    is given is rounded up to a multiple of this, so that a compiled step has few shapes.
    cache: a KVCache of B texts and `length` places or more, to use again; it need not be
    emptied, as each place is filled before anyone sees it.
    Returns ids (B, length). Raises ValueError if the prompt is longer than `length`, or
    `length` than the context; FloatingPointError if predictions are NaN."""
    B, P = prompt.shape
    if not P <= length <= model.config.context:
        raise ValueError(f"a prompt of {P} tokens in a text of {length}, "
                         f"with a context of {model.config.context}")
    if P == length:
        return prompt.clone()            # there is nothing to write
    device = prompt.device
    # out[:, 0] is the start symbol; the last token is never read, so `length` places do
    out = torch.full((B, length + 1), model.mask_id, device=device)
    out[:, 1:P + 1] = prompt
    cache = cache or model.cache(B, length)

    # (place is a tensor: a compiled step would be compiled anew for each int. extent is a
    # size, so it must be an int)
    places = torch.arange(length, device=device)
    if P == 0:
        # the start symbol, like any other token
        logits = step(model, out[:, 0], places[:1], cache, min(length, grain))
    else:
        # prefill: the start symbol and the prompt, of all texts, in one call
        place = torch.arange(P + 1).expand(B, -1)                    # (B, P + 1)
        new = Reading(idx=out[:, :P + 1], pos=place, place=place, limit=place,
                      valid=torch.ones_like(place, dtype=torch.bool), wanted_from=P)
        h = model.read(cache, new)                                   # (B, C), of the last
        logits = model.head(h)                                       # (B, V)

    # one token a step
    for i in range(P + 1, length + 1):
        out[:, i] = draw(logits)
        if i < length:                   # nothing follows the last token
            extent = min(length, (i // grain + 1) * grain)   # i + 1, rounded up
            logits = step(model, out[:, i], places[i:i + 1], cache, extent)

    # a draw from NaN gives V, see diffusion.categorical. It is looked for only now, as each
    # look makes the CPU wait for a GPU
    if bool((out[:, P + 1:] == model.mask_id).any()):
        raise FloatingPointError(NOT_FINITE)
    return out[:, 1:]
