"""Models as they are timed: which numbers they compute in, what multiplies their matrices,
and what of them is compiled, by which function:

    AR                  the decoding step, with the draw    compiled_decode
    diffusion, small    the network, as one piece           compile_network
    diffusion, large    each block (the last one runs       compile_network
                        uncompiled at chosen positions)

For little work diffusion's whole steps are compiled instead, see tools/static.py.
"""
import functools
import shutil
import types

import torch

from cache import decode
from tools.machine import seconds


# ---- which numbers

def bfloat16_gain():
    """This CPU's speed at bfloat16 products, as a multiple of float32's: well above 1 where
    it has instructions for them, far below where they are emulated."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        product = functools.partial(torch.mm, a, a)
        times[dtype] = min(seconds(product, torch.device("cpu")) for _ in range(3))
    return times[torch.float32] / times[torch.bfloat16]


def warn_of_emulation(dtypes, device):
    """Say so, in a line, where bfloat16 is asked for and this CPU only emulates it."""
    if "bfloat16" in dtypes and device.type == "cpu":
        gain = bfloat16_gain()
        if gain < 1:
            print(f"this CPU emulates bfloat16: its products take {1 / gain:.1f} times as "
                  "long as in float32")


# ---- a model, prepared

def prepare(model, dtype, compiled, device):
    """Make a model ready to be timed, in place, and return it: its matrices in dtype (norms
    and the residual stream stay float32), large float32 ones multiplied by oneDNN where
    this CPU gains by that; and, if asked for, diffusion's network compiled."""
    model = model.to(device).eval().requires_grad_(False)
    # the rows of a typical product: AR has one a text, diffusion one a position
    rows = 8 if model.config.causal else 128
    if dtype == "bfloat16":
        model.bf16 = True
        for module in [*model.blocks.modules(), model.lm_head]:
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
    elif device.type == "cpu" and onednn_gain(rows) > ONEDNN_GAIN:
        multiply_by_onednn(model)
    # (of AR the decoding step is compiled, by compiled_decode)
    if compiled and not model.config.causal:
        compile_network(model)
    return model


# ---- what multiplies large matrices

LARGE_MATRIX = 2 ** 18   # weights; smaller ones, such as nano's, stay with PyTorch's choice
ONEDNN_GAIN = 1.1        # it is used where it is this much faster


# F.linear by oneDNN instead of MKL, which PyTorch uses for float32. torch.compile cannot
# look into oneDNN's operation; so it is wrapped in one of our own, without a gradient.
# (What @torch.library.custom_op makes runs checks of its own in each call)
torch.library.define("nanosdtt::linear",
                     "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
onednn_linear = torch.ops.nanosdtt.linear


@torch.library.impl("nanosdtt::linear", "cpu")
def _(x, weight, bias):
    """What it computes."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("nanosdtt::linear")
def _(x, weight, bias):
    """The shape of its result, for the compiler."""
    return x.new_empty(*x.shape[:-1], len(weight))


def multiply_by_onednn(model):
    """Have a model's large matrices multiplied by onednn_linear."""
    def forward(module, x):
        return onednn_linear(x, module.weight, module.bias)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel() >= LARGE_MATRIX:
            module.forward = types.MethodType(forward, module)


@functools.cache
def onednn_gain(rows):
    """oneDNN's speed, as a multiple of that of PyTorch's own choice, where this CPU
    multiplies so many rows by large matrices; 0 where PyTorch has no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return 0.0
    x = torch.ones(rows, 768)
    matrices = [torch.ones(3072, 768) for _ in range(8)]     # more than most caches hold

    def multiply(linear):
        for matrix in matrices:
            linear(x, matrix, None)

    times = []
    for linear in torch.nn.functional.linear, onednn_linear:
        run = functools.partial(multiply, linear)
        times.append(min(seconds(run, torch.device("cpu")) for _ in range(3)))
    usual, onednn = times
    return usual / onednn


# ---- what is compiled

SMALL_MODEL = 1e7                        # weights of all blocks


def is_small(config):
    """Whether a model of this ModelConfig is compiled as one piece."""
    return 12 * config.layers * config.width ** 2 < SMALL_MODEL


def compile_network(model):
    """Compile the network. A small one whole, embedding and blocks, for any number of
    positions: most of its time goes into starting operations. A large one block by block:
    whole it would take minutes to compile."""
    if is_small(model.config):
        run = torch.compile(type(model).run, dynamic=True)
        model.run = types.MethodType(run, model)         # deepcopy binds it to the copy
        return
    # with a KV cache each step has another number of positions; full attention has two
    # shapes: one position in the first step, then all, each with code of its own
    dynamic = model.config.attention == "reveal"
    for block in model.blocks:
        block.compile(dynamic=dynamic)


def forget_compiled():
    """Have PyTorch's compiler forget all that it compiled, before another batch size: once
    it has seen two it makes slower code, for any. Also sets two of its options."""
    torch.compiler.reset()
    # the most compilations of one function (usually 8): each model, dtype, shape and number
    # of steps may need one
    torch._dynamo.config.recompile_limit = 256
    # two sizes that are equal in the first call (say B = M) may differ later
    torch.fx.experimental._config.use_duck_shape = False


def can_compile():
    """Whether there is the C++ compiler that torch.compile needs."""
    return bool(shutil.which("g++"))


def compiled_decode(device, B, step=decode):
    """step (cache.decode, or one that draws, too), compiled for B texts. On a GPU: CUDA
    graphs, one for each value of `extent`. On a CPU, for 2 texts or more, weights are
    copied into a layout for products of several rows (later changes of them go unseen)."""
    if torch.device(device).type == "cuda":
        return torch.compile(step, fullgraph=True, mode="reduce-overhead")
    compiled = torch.compile(step, fullgraph=True)
    if B == 1:
        return compiled
    # an option of the compiler, set while this function runs
    frozen_weights = torch._inductor.config.patch(freezing=True)
    return frozen_weights(compiled)


def with_stance(stance, run):
    """run, a function without arguments, under a stance of PyTorch's compiler. With
    "force_eager" nothing runs compiled; with "eager_on_recompile" what has been compiled
    does, and all else uncompiled."""
    def f():
        with torch.compiler.set_stance(stance):
            return run()
    return f
