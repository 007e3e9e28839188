"""Device and processes: one process on a laptop or a single GPU, several under torchrun.
Each of several has a copy of the whole model and computes some of a step's micro-batches;
train.py averages their gradients, so that the copies stay equal.
"""
import datetime
import os
import typing

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.devices import find_device
from data.files import UserError


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
    # cpu, mps, cuda:0, cuda:1, ...: find_device reads LOCAL_RANK, so that each process of
    # this machine has a GPU of its own
    device = find_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL, and for plain 'cuda'
        # cuDNN's attention makes a plan for each new shape, some 50 ms each, and here most
        # steps of a sampler have a shape of their own; FlashAttention makes none
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1 and not dist.is_initialized():          # once, even if started twice
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
    if error is not None:
        raise UserError(error)                                       # in every process


def agree(procs, value, what):
    """Raises UserError in every process unless all hold the same value, read from --out or
    the dataset: else these are not the same files for all. value: numbers or text, or a
    tuple of these; what: a name for it, for the message."""
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
    results, in the order of the parts. f seeds its own draws, so that they do not depend on
    the process, and returns what can be pickled, tensors on the CPU. title: of a progress
    bar, which counts process 0's share."""
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
