"""A pretend GPU, for checks on any machine: tensors that say device "pretend" and have their
numbers on the CPU. It keeps a GPU's rules, which the CPU does not: tensors of two devices do not
mix, and where a GPU would make the CPU wait, it is noted, or refused.

PyTorch has a place for one device that is written in Python, PrivateUse1. A process can fill it
once, and never empty it, by importing this file: so what uses it runs in processes of its own, see
test_pretend.py. Not pretended: bfloat16 in the blocks (autocast), compiled code, a generator of the
device's own.
"""
import collections

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Backend(backend_registration._DummyBackendModule):
    """torch.pretend, in place of torch.cuda."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]          # autocast asks, also where it is switched off


backend_registration._setup_privateuseone_for_python_backend("pretend", Backend())
DEVICE = torch.device("pretend", 0)

# operations whose result the CPU must know before it goes on: a number, or a size
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
         "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Pretend(torch.Tensor):
    """A tensor of the device; real_tensor has its numbers."""

    @staticmethod
    def __new__(cls, real):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, device=DEVICE)
        tensor.real_tensor = real
        return tensor

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class GPU(TorchDispatchMode):
    """Inside `with GPU() as gpu:` the device can be asked for tensors. gpu.waits counts, by kind,
    what makes the CPU wait; gpu.forbidden: whether that is an error."""
    now = None                           # the one that is in use
    wrong = None                         # an operation that it computes wrongly, by a hundredth

    def __enter__(self):
        GPU.now = self
        self.waits, self.forbidden = collections.Counter(), False
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def wait(self, kind):
        if self.forbidden:
            raise RuntimeError(f"{kind}: the CPU would wait")
        self.waits[kind] += 1


def compute(operation, args, kwargs):
    """One operation of PyTorch, on the CPU, with the rules of two devices."""
    name = operation.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Pretend)]
    result_is_ours = bool(ours)
    if kwargs.get("device") is not None:
        result_is_ours = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    if name == "_fused_sdp_choice":
        return 0                         # attention by plain operations
    keep_rules(name, args, tensors, ours, result_is_ours)

    # what is changed in place comes back as the very tensor that it was
    known = {id(x.real_tensor): x for x in ours}

    def real(x):
        return x.real_tensor if isinstance(x, Pretend) else x

    def pretend(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return Pretend(x)

    result = operation(*tree_map(real, args), **tree_map(real, kwargs))
    if not result_is_ours:
        return result
    if name == GPU.wrong:
        result = result * 1.01
    return tree_map(pretend, result)


def keep_rules(name, args, tensors, ours, result_is_ours):
    """Raises where tensors of two devices meet, and notes where the CPU waits."""
    if not ours and not result_is_ours:
        return                           # the CPU's own affair
    gpu = GPU.now
    # numbers, tensors without dimensions, may come from the CPU
    foreign = [x for x in tensors if not isinstance(x, Pretend) and x.dim() > 0]
    if name == "_to_copy":
        if bool(ours) != result_is_ours:
            gpu.wait("copy")
    elif name == "copy_":
        if foreign or not isinstance(args[0], Pretend):
            gpu.wait("copy")
    elif foreign and name in INDEXING and isinstance(args[0], Pretend):
        gpu.wait("copy of indices")      # a GPU takes them from the CPU, too
    elif ours and foreign:
        raise RuntimeError(f"{name}: tensors on two devices")
    if name in WAITS and ours:
        gpu.wait(name)
    if name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
        gpu.wait("index by bool")        # how many there are decides about the result's size
