"""AR sampling whose every step, the draw included, is one compiled call: bench.py's ar."""
import functools

import torch

from cache import decode, generate
from data.devices import float64_device
from diffusion import draw_from
from tools.fast_models import compiled_decode


def can_draw(device):
    """Whether `draw` can run on the device: it needs float64 there."""
    return float64_device(device) == device


def draw(logits, u):
    """diffusion.categorical in a form that compiles: logits (..., V) -> ids (...). u (...,
    1): uniform random numbers in float64. (They come from outside, as compiled code would
    draw them in float32, too coarse for unlikely tokens.)"""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return draw_from(weights.double(), u)


def decode_and_draw(model, token, place, cache, extent, numbers):
    """cache.decode, then a draw from its logits: ids (B,) of the next token. place (1,): of
    this token in the cache; extent: how many places attention is given. numbers (L, B, 1):
    uniform random numbers, those of this step in row `place`."""
    logits = decode(model, token, place, cache, extent)
    return draw(logits, numbers.index_select(0, place)[0])           # u (B, 1)


def keep_in_place(*tensors):
    """Tell the compiler that these stay where they are, as CUDA graphs need them at fixed
    addresses."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


class ARSampler:
    """cache.generate for B texts of L tokens, as a function without arguments. Its step
    returns not logits but ids, already drawn; so the draw given to generate just passes
    them on. calls: how many positions each call computes. compiler: another one is for
    tests."""

    def __init__(self, model, B, L, compiler=compiled_decode):
        device = model.embed.weight.device
        self.model, self.L = model, L
        self.calls = [B for _ in range(L)]               # one token of each text
        self.prompt = torch.zeros((B, 0), dtype=torch.long, device=device)       # nothing
        # all runs share one cache, never emptied: places beyond the present one are hidden
        self.cache = model.cache(B, L)
        # attention reads the cache up to a multiple of grain: fewer shapes to compile
        self.grain = 128 if device.type == "cuda" else 16
        # the random numbers of all draws; new ones in each run
        self.numbers = torch.empty((L, B, 1), dtype=torch.float64, device=device)
        keep_in_place(*self.cache.k, *self.cache.v, self.numbers)
        step = compiler(device, B, decode_and_draw)
        self.step = functools.partial(step, numbers=self.numbers)

    def __call__(self):
        self.numbers.uniform_()
        return generate(self.model, self.prompt, self.L, draw=lambda ids: ids,
                        step=self.step, grain=self.grain, cache=self.cache)
