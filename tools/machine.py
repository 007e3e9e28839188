"""The machine under a benchmark: a clock, a memory gauge, its limits, and what a transformer needs
of them (C width, V tokens, B sequences of L; multiplying by a weight is 2 operations)."""
import concurrent.futures
import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import statistics
from pathlib import Path
from time import perf_counter

import torch

from model import decode


def seconds(run, device):
    """Seconds that run() takes, with all that it started on a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = perf_counter()
    run()
    wait()
    return perf_counter() - began


def peak_bytes(run, device):
    """(result of run(), the most memory that it took beyond what was taken before).
    On a GPU as its allocator counts it; on Linux the growth of the process's resident memory, for
    which glibc gives blocks of 1 MB and more back at once, where it usually keeps those up to 32
    MB; elsewhere None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    gc.collect()
    keep_blocks_below(2 ** 20)
    try:
        Path("/proc/self/clear_refs").write_text("5")    # the high-water mark starts anew
        before = kilobytes("/proc/self/status", "VmRSS")
        return run(), 1024 * (kilobytes("/proc/self/status", "VmHWM") - before)
    except OSError:
        return run(), None
    finally:
        keep_blocks_below(2 ** 25)


def keep_blocks_below(size):
    """Have glibc give freed blocks of `size` bytes and more back to the system, now and later."""
    with contextlib.suppress(OSError, AttributeError):   # another C library
        libc, M_MMAP_THRESHOLD = ctypes.CDLL(None), -3
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.malloc_trim(0)


def in_new_process(f, *args):
    """f(*args), computed by another process that has computed nothing before; None if it dies."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", f.__module__])
    with (concurrent.futures.ProcessPoolExecutor(1, context) as pool,
          contextlib.suppress(concurrent.futures.BrokenExecutor)):
        return pool.submit(f, *args).result()


def kilobytes(path, name):
    """The number that follows `name:` in one of Linux's files."""
    return int(Path(path).read_text().split(name + ":")[1].split()[0])


def free_bytes(device):
    """Memory that can still be had, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return 1024 * kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None


class OutOfMemory(Exception):
    """What was to be measured does not fit."""


@contextlib.contextmanager
def room_for(size, device):
    """Raises OutOfMemory before `size` bytes are tried that are not there (Linux would kill the
    process instead of refusing them), and in place of PyTorch's own errors."""
    if size > (free_bytes(device) or size):
        raise OutOfMemory
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if "memory" not in str(e) + type(e).__name__:
            raise
        raise OutOfMemory from e


def first_run(row, run, warm_up, least, device):
    """Warm up, then run once, for which `least` bytes must be there: returns [its seconds] and puts
    its peak_bytes into the row; where memory is short, returns None and the row says so."""
    times = []
    try:
        with room_for(least, device):
            warm_up()
            _, row["peak_bytes"] = peak_bytes(lambda: times.append(seconds(run, device)), device)
        return times
    except OutOfMemory:
        row["error"] = "does not fit in memory"


def fill_times(row, times):
    """Median, least and most seconds, and tokens per second, into the row."""
    row |= dict(seconds=statistics.median(times), seconds_min=min(times), seconds_max=max(times))
    row["tokens_per_s"] = row["batch"] * row["length"] / row["seconds"]


def limits(device, dtype):
    """What the hardware gives at this moment, the best of several tries: bytes_per_s of
    matrix-vector products over 2 GB of float32, more than any cache holds, and flop_per_s of
    products of large matrices in dtype; and what it is."""
    n = 8192 if device.type == "cuda" else 2048
    W = [torch.rand(8192, 8192, device=device) for _ in range(8)]
    x, a = torch.rand(8192, device=device), torch.rand(n, n, device=device).to(dtype)
    reads = min(seconds(lambda: [torch.mv(w, x) for w in W], device) for _ in range(5))
    products = min(seconds(lambda: a @ a, device) for _ in range(10))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "dtype": str(dtype).removeprefix("torch."), "load": round(os.getloadavg()[0], 2),
            "bytes_per_s": 8 * 4 * 8192 ** 2 / reads, "flop_per_s": 2 * n ** 3 / products}


def describe(m):
    """limits() in a line or two; a warning where others use the machine."""
    text = (f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['dtype']}, load "
            f"{m['load']}: reads {m['bytes_per_s'] / 1e9:,.1f} GB/s, multiplies "
            f"{m['flop_per_s'] / 1e9:,.0f} GFLOP/s")
    if m["load"] > 0.5 * m["threads"]:
        text += (f"\nwarning: the machine is busy (load {m['load']}); times may be several times "
                 "too long")
    return text


def prepare(model, dtype, compiled, device):
    """A model as it is timed, on a GPU and on a CPU: its matrices in dtype (autocast does the rest:
    norms and the residual stream stay float32), diffusion's blocks compiled if asked for."""
    model = model.to(device).eval().requires_grad_(False)
    if dtype == "bfloat16":
        model.bf16 = True
        for module in [*model.blocks.modules(), model.lm_head]:
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
    for block in model.blocks if compiled and not model.config.causal else []:
        # AR: generate's decoding step is compiled instead. With a KV cache no step has the same
        # number of tokens
        block.compile(dynamic=True if model.config.attention == "reveal" else None)
    return model


def compiled_decode(device, B):
    """model.decode for B texts by torch.compile: as CUDA graphs on a GPU, one for each value of
    `seen`; on a CPU, from 2 texts on, with weights packed anew (later changes are not seen)."""
    cpu = torch.device(device).type == "cpu"
    step = torch.compile(decode, fullgraph=True, mode="default" if cpu else "reduce-overhead")
    packed = torch._inductor.config.patch(freezing=True)         # for this function alone
    return packed(step) if cpu and B > 1 else step


def transformers_gpt2(shape, device, dtype):
    """GPT-2 of the transformers package, random weights in the shape of a ModelConfig."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(
        n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads, vocab_size=shape.vocab,
        n_positions=shape.context + 1))
    model.shape = shape
    return model.to(device, getattr(torch, dtype)).eval()


# ---- what a run needs: rows are dicts with engine, batch, length, nfe, seconds

def least_memory(row, config, size):
    """Bytes without which a run cannot be, with numbers of `size` bytes."""
    engine, B, L = row["engine"], row["batch"], row["length"]
    if engine == "diffusion-naive":
        return 24 * B * L * config.vocab                 # three float64 arrays (B, L, V)
    of_one = 12 if engine == "diffusion" else 2 * config.layers      # activations, or a KV cache
    return of_one * B * L * config.width * size


def roofline(row, config, machine, size):
    """The share of the machine's bandwidth (AR: weights and cache are read for every token) or of
    its matrix rate (diffusion: each pass multiplies each token by the weights) that a run got."""
    B, L, nfe, C, layers = row["batch"], row["length"], row["nfe"], config.width, config.layers
    head, block = C * config.vocab, 24 * C * C + 4 * L * C           # weights; operations per token
    if row["engine"] in ("ar", "transformers"):
        cache = 2 * layers * C * B * L / 2                           # half full on average
        read = L * size * (12 * layers * C * C + head + cache)
        return read / row["seconds"] / machine["bytes_per_s"]
    if row["engine"] == "diffusion-kv":      # each position twice, and half the others seen
        done = B * L * (2 * layers * (24 * C * C + 2 * L * C) - 18 * C * C + 2 * head)
    elif row["engine"] == "diffusion-naive":
        done = nfe * B * L * (layers * block + 2 * head)
    else:
        # the first step computes one row, or, with relative positions, one position for all
        relative = config.positions == "rope"
        tokens = (nfe - 1) * B * L + (1 if relative else L)
        once = B * L * (1 - 1 / nfe) if relative else B * L
        # the last block: its projections everywhere, all else once per position
        done = (tokens * ((layers - 1) * block + 6 * C * C)
                + once * (18 * C * C + 4 * L * C) + B * L * 2 * head)
    return done / row["seconds"] / machine["flop_per_s"]


def training_flop(objective, config, B, L, dt=1 / 1024):
    """Operations that one step cannot do without: forward and twice that backward; half of the
    positions are masked, and only these need a head; SDTT's teacher goes forward everywhere, and
    once before in the rows of which a step of size dt opens something."""
    trunk = B * L * config.layers * (24 * config.width ** 2 + 4 * L * config.width)
    head = 2 * B * L * config.width * config.vocab
    return {"ar": 3 * (trunk + head), "mdlm": 3 * (trunk + head / 2),
            "sdtt": (3 + 2 - (1 - dt) ** L) * trunk + (3 + 1) * head / 2}[objective]


# ---- tables: columns are pairs of what is shown of a row and a format, ("seconds", ">8.3f")

def shown(row, name):
    """The value of a column: a row's own, or one made of them; None where there is none."""
    if name == "peak MB" and row.get("peak_bytes") is not None:
        return row["peak_bytes"] / 1e6
    if name == "spread":
        return (row["seconds_max"] - row["seconds_min"]) / row["seconds"]
    return row.get({"tokens/s": "tokens_per_s", "vs AR": "vs_ar"}.get(name, name))


def header(columns):
    """The names of columns ((name, format), ...), as wide as line() makes them."""
    return "".join(format(name, re.match(r"[<>]\d+", form)[0]) for name, form in columns)


def line(row, columns):
    """A row as text, with blanks where it has no value, or with its error at the end."""
    if "error" in row:
        columns = [(name, form) for name, form in columns if row.get(name) is not None]
    text = ""
    for name, form in columns:
        value = shown(row, name)
        text += (format("", re.match(r"[<>]\d+", form)[0]) if value is None else
                 format(value, form))
    return f"{text}  {row['error']}" if "error" in row else text.rstrip()
