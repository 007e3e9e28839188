"""What several scripts share: seeds, learning rate, optimizers, averaged weights.

Randomness: all draws of training and sampling come from torch's global generators. Before
each micro-batch of each step train.py calls `seed_all` with the run's seed and name, the
step and the micro-batch's number; sample.py does so before each batch of texts. So a run
that was stopped goes on exactly as it would have, and a batch gets the same draws whichever
process computes it.
"""
import hashlib
import math
from pathlib import Path

import torch

from data.muon import Muon

ROOT = Path(__file__).resolve().parent               # where this project lies


def seed_all(*key):
    """Seed torch's global generators with a hash of the key, for example (seed, name, step,
    micro-batch)."""
    # a hash, so that similar keys, such as step 1 and step 2, give unrelated seeds
    digest = hashlib.sha256(repr(key).encode()).digest()
    # manual_seed takes 64 bits, and seeds the CPU and all GPUs
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


# ---- learning rate, optimizers, averaged weights

def lr_factor(step, steps, warmup, final):
    """The learning rate's factor: a linear warm-up to 1, then a cosine down to `final`,
    which it would reach one step after the last; with final = 1 it stays at 1."""
    if step < warmup:
        return (step + 1) / warmup       # not 0 at the first step
    # from 0 to below 1. (max: for step = steps = warmup, of a run that is over)
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizers(model, config):
    """A list of optimizers. With --optimizer muon two: AdamW for vectors, embedding and
    head, and Muon for the blocks' matrices; with adamw one, for all. Muon makes a step
    about equally large in all directions of a matrix (it orthogonalises the momentum); the
    step is scaled to AdamW's size, so that one learning rate serves both (arXiv
    2502.16982)."""
    matrices = []
    if config.optimizer == "muon":
        # Muon is for matrices between hidden layers, not for embedding and head
        matrices = [w for w in model.blocks.parameters() if w.ndim == 2]
    # by id, as `w in matrices` would compare tensors number by number
    ids = {id(w) for w in matrices}
    rest = [w for w in model.parameters() if id(w) not in ids]       # for AdamW
    decay = config.weight_decay          # of all tensors, vectors too
    # on a GPU fused: one kernel updates all tensors; on a CPU foreach: each operation is
    # called once for all tensors
    device = rest[0].device.type
    on_cpu = device == "cpu"
    adamw = torch.optim.AdamW(rest, config.lr, weight_decay=decay, foreach=on_cpu,
                              fused=not on_cpu)
    if not matrices:                                                 # --optimizer adamw
        return [adamw]
    # PyTorch's Muon computes in bfloat16, which is slow on most CPUs, and which not every
    # device has; ours is the same in float32, up to rounding
    kind = torch.optim.Muon if device == "cuda" else Muon
    muon = kind(matrices, config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


@torch.no_grad()
def ema_update(ema, model, decay, step):
    """ema <- d ema + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)): at first
    the average follows quickly, so that it forgets the weights of the beginning."""
    d = min(decay, (1 + step) / (10 + step))
    # all tensors in one call: this runs at every step
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
