"""A pretend device: tensors that say they are on "pretend:0", with their numbers on the CPU. It
refuses operations on tensors of two devices, and is one of two kinds: without float64 (`Device`,
for --device mps), or a GPU (`GPU`), which computes while the CPU goes on: what would make the CPU
wait for it is counted, or refused. What it does not show: speed, rounding, memory, which operations
a real device lacks, compiled code, bfloat16 in the blocks, a generator of the device's own.

PyTorch keeps the name for as long as the process lives, so this is for a process of its own.
"""
import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COPY = "copy_", "_to_copy", "_copy_from"                             # between devices
INDEX = "index", "index_put", "index_put_", "_index_put_impl_"       # indices may be on the CPU
# whose result the CPU must know before it goes on: a number, or a size
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
         "_unique2")


class Backend:
    """What PyTorch asks the module of a device for."""
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)    # the CPU's generator serves for it, too
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [])   # no bfloat16 in the blocks


class Pretend(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, there):
        if there.dtype in Device.now.lacks:
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
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):                   # a file gets the numbers
        return self.there.__reduce_ex__(protocol)

    def __repr__(self):
        return f"on {NAME}: {self.there}"


class Device(TorchDispatchMode):
    """With it, torch.zeros(device="pretend") and the like work, too. A device without float64."""
    now = None                           # the one that is in use
    lacks = torch.float64, torch.bfloat16
    wrong = None                         # an operation that is off by a hundredth

    def __enter__(self):
        Device.now = self
        return super().__enter__()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return compute(f, args, kwargs or {})

    def wait(self, why):
        """The CPU waits for the device."""


class GPU(Device):
    """A device with all types."""
    lacks = ()

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()       # how often the CPU waited, by kind
        self.forbidden = False                   # whether that is an error

    def wait(self, why):
        if self.forbidden:
            raise RuntimeError(f"{why}: the CPU would wait")
        self.waits[why] += 1


def numbers(x):
    return x.there if isinstance(x, Pretend) else x


def each(f, x):
    """f(x), or x with f of all that it holds. (PyTorch has this, too, in twice the time.)"""
    if isinstance(x, (tuple, list)):
        return type(x)([each(f, one) for one in x])
    if isinstance(x, dict):
        return {key: each(f, one) for key, one in x.items()}
    return f(x)


def tensors_in(x):
    found = []

    def note(one):
        if isinstance(one, torch.Tensor):
            found.append(one)
    each(note, x)
    return found


def compute(f, args, kwargs):
    """f, where the numbers are. What it makes of tensors of the device is on the device, unless its
    argument `device` says otherwise."""
    name = f.overloadpacket.__name__
    own = {id(x.there): x for x in tensors_in((args, kwargs)) if isinstance(x, Pretend)}
    # tensors without a dimension go with any device, as everywhere
    together = (args[0], args[2:]) if name in INDEX else (args, kwargs)
    devices = {x.device for x in tensors_in(together) if x.dim()}
    if len(devices) > 1 and name not in COPY:
        raise RuntimeError(f"{f}: tensors of two devices")
    on_device = bool(own)
    if name == "copy_":                                  # into the first
        on_device = isinstance(args[0], Pretend)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    if own or on_device:
        note_waits(name, args, on_device, kwargs.get("non_blocking"))

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        if on_device:
            # what is computed in place stays the same tensor
            return own[id(x)] if id(x) in own else Pretend(x)
        # a copy from the device shares no memory with it
        return x.clone() if id(x) in own else x
    result = f(*each(numbers, args), **each(numbers, kwargs))
    if own and name == Device.now.wrong:
        result = result * 1.01
    return each(wrap, result)


def note_waits(name, args, on_device, non_blocking):
    """Tell the device where the CPU waits for it: in a copy from it, or to it if non_blocking is
    not set, also of indices, and where the CPU wants to know a number, or how large the result is.
    """
    if name in WAITS:
        Device.now.wait(name)
    source = args[1] if name == "copy_" else args[0]
    if name in COPY and isinstance(source, Pretend) != on_device:
        if not (on_device and non_blocking):
            Device.now.wait("copy")
    if name in INDEX:
        for index in tensors_in(args[1]):
            if not isinstance(index, Pretend):
                Device.now.wait("copy of indices")
            if index.dtype == torch.bool:
                Device.now.wait("index by bool")


def empty_strided(size, stride, dtype=None, **rest):
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    Device.now.wait("copy")
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
