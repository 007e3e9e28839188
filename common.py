"""What several scripts share: devices and processes, seeds, optimizers.

Randomness: all draws of training and sampling come from torch's global generators. Before
each micro-batch of each step train.py calls `seed_all` with the run's seed and name, the
step and the micro-batch's number. So a run that was stopped goes on exactly as it would
have, and a micro-batch gets the same draws whichever process computes it.
"""
import datetime
import hashlib
import math
import os
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.devices import find_device
from data.files import UserError
from data.muon import Muon

ROOT = Path(__file__).resolve().parent


# ---- device, processes, seeds

class Processes(typing.NamedTuple):
    """Where this process computes, and which of how many it is."""
    device: torch.device
    rank: int = 0                # this one's number; only number 0 writes and prints
    world: int = 1               # how many there are


def start(device):
    """Device and processes: 'auto' | 'cpu' | 'cuda' | 'mps' | ... -> Processes.
    Under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK) the processes are joined, by
    NCCL on GPUs and gloo on the CPU. Raises UserError if the device is absent, or is none
    that several processes can use."""
    # without torchrun there is one process, number 0
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is for one process; use --device cpu or cuda")
    # a GPU for each process of this machine
    device = find_device(device)                             # cpu, mps, cuda:0, cuda:1, ...
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL, and for plain 'cuda'
        # cuDNN's attention makes a plan for each new shape, some 50 ms each, and here most
        # steps of a sampler have a shape of their own; FlashAttention makes none
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo",
                                # process 0 may take hours to make a large dataset
                                timeout=datetime.timedelta(hours=12),
                                device_id=device if on_gpu else None)
    return Processes(device, rank, world)


def from_first(procs, value):
    """Returns process 0's value in every process. value: anything that can be pickled."""
    values = [value]                     # a list, as broadcasts want it
    if procs.world > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def run_in_first(procs, f):
    """Call f in process 0 only, while the others wait. If it raises UserError, every
    process raises it. Returns nothing. (After any other error torchrun ends the others.)"""
    error = None
    if procs.rank == 0:
        try:
            f()
        except UserError as e:
            error = str(e)               # as text: it goes to all
    error = from_first(procs, error)                                 # the others wait here
    if error:
        raise UserError(error)                                       # in every process


def agree(procs, value, what):
    """Raises UserError in every process unless all hold the same value. value: anything
    that can be pickled; what: a name for it, for the message."""
    if procs.world == 1:
        return
    values = [None for _ in range(procs.world)]
    dist.all_gather_object(values, value)                            # one from each process
    # each process sees the same list, so all raise or none does
    if any(one != values[0] for one in values):
        raise UserError(f"the processes hold different {what} ({values}); --out and the "
                        "dataset must be the same files for all of them")


@torch.no_grad()
def broadcast(model, procs):
    """Give all processes the weights that process 0 has."""
    if procs.world == 1:
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)        # into the model itself, whose memory this is


def spread(parts, f, procs, title=None):
    """[f(part) for part in parts], dealt out to the processes in turn; each returns all
    results. title: of a progress bar."""
    parts = list(parts)
    hidden = title is None or procs.rank > 0         # only process 0 shows a bar
    # this process does parts number rank, rank + world, rank + 2 world, ...
    bar = tqdm(parts[procs.rank::procs.world], desc=title, leave=False, ncols=90,
               disable=hidden)
    mine = [f(part) for part in bar]                                 # the work is here
    everyone = [mine]
    if procs.world > 1:
        everyone = [None for _ in range(procs.world)]
        dist.all_gather_object(everyone, mine)       # everyone[r]: the results of process r
    # part i was number i // world of process i % world
    return [everyone[i % procs.world][i // procs.world] for i in range(len(parts))]


def seed_all(*key):
    """Seed torch's global generators with a hash of the key, for example (seed, step,
    i)."""
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
    progress = (step - warmup) / max(1, steps - warmup)              # from 0 to below 1
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizers(model, config):
    """[AdamW on vectors, embedding and head, Muon on the blocks' matrices], or [AdamW] for
    all. Muon's steps are scaled to AdamW's size, so that one learning rate serves both
    (arXiv 2502.16982)."""
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
    # PyTorch's is for CUDA; ours takes the same steps without bfloat16, which is slow on a
    # CPU, and which not every device has
    kind = torch.optim.Muon if device == "cuda" else Muon
    muon = kind(matrices, config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


@torch.no_grad()
def ema_update(ema, model, decay, step):
    """ema <- d ema + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)): at first
    the average follows quickly, so that it forgets the random weights of the beginning."""
    d = min(decay, (1 + step) / (10 + step))
    # all tensors in one call: this runs at every step
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
