"""A pretend device without float64: tensors that say they are on "pretend:0", with their numbers on
the CPU. It refuses what such a device refuses: float64 tensors, and operations on tensors of two
devices. What it does not show: speed, rounding, memory, and which operations a real device lacks.

PyTorch keeps the name for as long as the process lives, so this is for a process of its own.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COPY = "aten.copy_", "aten._to_copy", "aten._copy_from"              # between devices
INDEX = "aten.index.", "aten.index_put", "aten._index_put"           # indices may be on the CPU


class Backend:
    """What PyTorch asks the module of a device for."""
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)    # the CPU's generator serves for it, too
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [])   # nor has it bfloat16


class Pretend(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, there):
        if there.dtype in (torch.float64, torch.bfloat16):
            raise TypeError(f"{NAME} has no {there.dtype}")
        return torch.Tensor._make_wrapper_subclass(
            cls, there.size(), strides=there.stride(), storage_offset=there.storage_offset(),
            dtype=there.dtype, device=f"{NAME}:0")

    def __init__(self, there):
        self.there = there                               # its numbers, on the CPU

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        return compute(f, args, kwargs or {})

    def tolist(self):
        return self.there.tolist()

    def __reduce_ex__(self, protocol):                   # a file gets the numbers
        return self.there.__reduce_ex__(protocol)

    def __repr__(self):
        return f"on {NAME}: {self.there}"


def numbers(x):
    return x.there if isinstance(x, Pretend) else x


def compute(f, args, kwargs):
    """f, where the numbers are. What it makes of tensors of the device is on the device, unless its
    argument `device` says otherwise."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    own = {id(x.there): x for x in tensors if isinstance(x, Pretend)}
    # tensors without a dimension go with any device, as everywhere
    together = (args[0], args[2:]) if str(f).startswith(INDEX) else (args, kwargs)
    devices = {x.device for x in tree_leaves(together) if isinstance(x, torch.Tensor) and x.dim()}
    if len(devices) > 1 and not str(f).startswith(COPY):
        raise RuntimeError(f"{f}: tensors of two devices")
    on_device = bool(own)
    if str(f).startswith("aten.copy_"):                  # into the first
        on_device = isinstance(args[0], Pretend)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        if on_device:
            # what is computed in place stays the same tensor
            return own[id(x)] if id(x) in own else Pretend(x)
        # a copy from the device shares no memory with it
        return x.clone() if id(x) in own else x
    return tree_map(wrap, f(*tree_map(numbers, args), **tree_map(numbers, kwargs)))


class Device(TorchDispatchMode):
    """With it, torch.zeros(device="pretend") and the like work, too."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return compute(f, args, kwargs or {})


def empty_strided(size, stride, dtype=None, **rest):
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    numbers(target).copy_(numbers(source))
    return target


def set_up():
    """Tell PyTorch of the device, before the first gradient: its threads ask how many there are.
    Returns what must be kept for as long."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    # lists of numbers, as in torch.tensor([0, 1]) and x[[0, 1]], come to a device by these two
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library
