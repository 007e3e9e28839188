"""Devices: which one --device means, how indices get there, and where float64 is kept for
those that have none.

Token draws need float64, and Apple's GPUs (mps) have no such numbers. So whatever is
computed in float64 goes through in_float64 or float64_device: on such a device it happens
on the CPU, and elsewhere nothing changes.
"""
import functools
import os

import torch

from data.files import UserError


def find_device(name):
    """The torch.device that --device names: "auto" is a CUDA GPU where there is one, and
    the CPU elsewhere; "cuda" is this process's own GPU, number LOCAL_RANK of its machine.
    Raises UserError for a device that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        # a number goes there and back, which the device "meta" of PyTorch would refuse
        torch.zeros(1, device=device).item()
    # what is raised depends on the device: an AssertionError, a NotImplementedError, ...
    except Exception:
        raise UserError(f"--device {name}, but this PyTorch finds no such device here; use "
                        "--device cpu")
    return device


def upload(x, device):
    """x (on the CPU) on a torch.device. The CPU does not wait until it is there: what the
    device does next finds it. (Not so on mps, where such copies have been wrong.)"""
    return x.to(device, non_blocking=device.type != "mps")


@functools.cache
def float64_device(device):
    """Where the float64 numbers of a torch.device are kept: there, or on the CPU."""
    if device.type in ("cpu", "cuda"):
        return device
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):    # what mps raises, and what xpu does
        return torch.device("cpu")
    return device


def in_float64(x):
    """x in float64, on the CPU where its device has none."""
    # first there, as a device that has no float64 cannot turn anything into it
    return x.to(float64_device(x.device)).double()
