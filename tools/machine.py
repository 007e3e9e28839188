"""The machine under a benchmark: a clock, a memory gauge, its limits, and what a
transformer needs of them (C width, V tokens, B sequences of L; multiplying by a weight is 2
operations).
"""
import collections
import concurrent.futures
import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import warnings
from pathlib import Path
from time import perf_counter

import torch


def seconds(run, device):
    """Seconds that run() takes, with all that it started on a GPU."""
    wait_for(device)
    began = perf_counter()
    run()
    wait_for(device)
    return perf_counter() - began


def wait_for(device):
    """Return when a GPU has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def with_peak_bytes(run, device):
    """(result of run(), the most memory in bytes that it took beyond what was taken
    before). On a GPU as its allocator counts it; on Linux the growth of the process's
    resident memory; elsewhere None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before
    gc.collect()
    # glibc keeps freed blocks of up to 32 MB, which would not count: here it keeps 1 MB
    keep_blocks_below(2 ** 20)
    try:
        # the high-water mark starts anew
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("/proc/self/status", "VmRSS")
        return run(), 1024 * (kilobytes("/proc/self/status", "VmHWM") - before)
    except OSError:
        return run(), None
    finally:
        keep_blocks_below(2 ** 25)


def keep_blocks_below(size):
    """Have glibc give freed blocks of `size` bytes and more back to the system, now and
    later."""
    M_MMAP_THRESHOLD = -3                # its number in glibc's malloc.h
    # another C library has no such functions
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.malloc_trim(0)


def host_waits(run, device):
    """How often the CPU waited for a GPU in run(), by place: {"diffusion.py:310": 16}; on a
    CPU {}. As far as PyTorch notices: for a number that is read, for a size that depends on
    numbers, for a copy."""
    if device.type != "cuda":
        run()
        return {}
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught
              if "synchronizing CUDA operation" in str(w.message)]
    return dict(collections.Counter(places).most_common())


def in_new_process(f, *args):
    """f(*args), computed by another process that has computed nothing before; None if it
    dies."""
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
        # what PyTorch has taken and holds in reserve can be had, too
        reserve = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + reserve
    try:
        return 1024 * kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None


class OutOfMemory(Exception):
    """What was to be measured does not fit."""


@contextlib.contextmanager
def room_for(size, device):
    """Raises OutOfMemory before `size` bytes are tried that are not there (Linux would kill
    the process instead of refusing them), and in place of PyTorch's own errors."""
    free = free_bytes(device)
    if free is not None and size > free:
        raise OutOfMemory
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if "memory" not in str(e) + type(e).__name__:
            raise
        raise OutOfMemory from e


def fill_times(row, times):
    """Median, least and most seconds, and tokens per second, into the row."""
    row["seconds"] = statistics.median(times)
    row["seconds_min"] = min(times)
    row["seconds_max"] = max(times)
    row["tokens_per_s"] = row["batch"] * row["length"] / row["seconds"]


def limits(device, dtype):
    """What the hardware gives at this moment, the best of several tries: bytes_per_s of
    matrix-vector products over 2 GB of float32, more than any cache holds, and flop_per_s
    of products of large matrices in dtype; and what it is."""
    # 8 matrices of 268 MB, each read once
    matrices = [torch.rand(8192, 8192, device=device) for _ in range(8)]
    x = torch.rand(8192, device=device)

    def read_all():
        for matrix in matrices:
            torch.mv(matrix, x)

    reads = min(seconds(read_all, device) for _ in range(5))
    # large enough to keep the device busy
    n, name = 2048, "CPU"
    if device.type == "cuda":
        n, name = 8192, torch.cuda.get_device_name()
    elif device.type != "cpu":
        n, name = 8192, device.type
    a = torch.rand(n, n, device=device).to(dtype)
    products = min(seconds(lambda: a @ a, device) for _ in range(10))
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "load": round(os.getloadavg()[0], 2),
            "bytes_per_s": 8 * 4 * 8192 ** 2 / reads, "flop_per_s": 2 * n ** 3 / products}


def describe(machine):
    """What limits() returned, in a line or two; a warning where others use the machine."""
    load = machine["load"]
    text = (f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"{machine['dtype']}, load {load}: reads {machine['bytes_per_s'] / 1e9:,.1f} "
            f"GB/s, multiplies {machine['flop_per_s'] / 1e9:,.0f} GFLOP/s")
    if load > 0.5 * machine["threads"]:
        text += (f"\nwarning: the machine is busy (load {load}); times may be several "
                 "times too long")
    return text


# ---- what a run needs: rows are dicts with engine, batch, length, nfe, seconds

SIZES = {"float32": 4, "bfloat16": 2}    # bytes of a number


def least_memory(row, config):
    """Bytes without which a run cannot be."""
    engine, tokens = row["engine"], row["batch"] * row["length"]
    size = SIZES[row["dtype"]]
    if engine == "diffusion-naive":
        return 24 * tokens * config.vocab                # three float64 arrays (B, L, V)
    if engine == "diffusion":
        return 12 * tokens * config.width * size         # activations of a block
    return 2 * config.layers * tokens * config.width * size          # a KV cache


def roofline(row, config, machine):
    """The share of the machine's bandwidth (AR: weights and cache are read for every token)
    or of its matrix rate (diffusion: each pass multiplies each token by the weights) that a
    run got."""
    B, L, C, layers = row["batch"], row["length"], config.width, config.layers
    head = C * config.vocab              # weights
    if row["engine"] == "ar":
        weights = 12 * layers * C * C + head
        cache = 2 * layers * C * B * L / 2               # half full on average
        read = L * SIZES[row["dtype"]] * (weights + cache)           # bytes
        return read / row["seconds"] / machine["bytes_per_s"]
    done = sampler_flop(row, config)
    return done / row["seconds"] / machine["flop_per_s"]


def sampler_flop(row, config):
    """Operations of a diffusion sampler, in which row["nfe"] calls write the texts."""
    B, L, C, layers = row["batch"], row["length"], config.width, config.layers
    nfe, head = row["nfe"], 2 * C * config.vocab         # operations for a token
    block = 24 * C * C + 4 * L * C
    if row["engine"].endswith("-exact"):
        # of what is read half is asked, and of AR all; its head is computed again next time
        asked = row["reads"] / (1 if config.causal else 2)
        return B * L * (row["reads"] * layers * block + 2 * asked * head)
    if row["engine"] == "diffusion-naive":
        return nfe * B * L * (layers * block + head)
    if row["engine"] == "diffusion-kv":
        # each position twice, half the others seen; as a token it needs no last MLP
        twice = 2 * layers * (24 * C * C + 2 * L * C)
        return B * L * (twice - 18 * C * C + head)
    # the first step may compute one text for all, or one position: then reads has less
    tokens, once = row["reads"] * B * L, B * L
    if config.positions == "rope" and row["reads"] < nfe:
        once = B * L * (1 - 1 / nfe)
    # the last block: its projections everywhere, all else once per position
    everywhere = tokens * ((layers - 1) * block + 6 * C * C)
    return everywhere + once * (18 * C * C + 4 * L * C) + B * L * head


def training_flop(objective, config, B, L, dt=1 / 1024):
    """Operations that one training step cannot do without: forward and twice that backward;
    half of the positions are masked, and only these need a head."""
    trunk = B * L * config.layers * (24 * config.width ** 2 + 4 * L * config.width)
    head = 2 * B * L * config.width * config.vocab
    if objective == "ar":
        return 3 * (trunk + head)
    if objective == "mdlm":
        return 3 * (trunk + head / 2)
    # SDTT's teacher goes forward everywhere, and once before in the rows of which a step of
    # size dt reveals something
    teacher = 1 + 1 - (1 - dt) ** L
    return (3 + teacher) * trunk + (3 + 1) * head / 2


# ---- tables: columns are pairs of what is shown of a row and a format, ("seconds",
# ">8.3f")

def shown(row, name):
    """The value of a column: a row's own, or one made of them; None where there is none."""
    if name == "peak MB":
        peak = row.get("peak_bytes")
        return None if peak is None else peak / 1e6
    if name == "spread":
        return (row["seconds_max"] - row["seconds_min"]) / row["seconds"]
    keys = {"tokens/s": "tokens_per_s", "vs AR": "vs_ar"}
    return row.get(keys.get(name, name))


def width_of(form):
    """The part of a format that says alignment and width: ">8" of ">8.3f"."""
    return re.match(r"[<>]\d+", form)[0]


def header(columns):
    """The names of columns ((name, format), ...), as wide as line() makes them."""
    return "".join(format(name, width_of(form)) for name, form in columns)


def line(row, columns):
    """A row as text, with blanks where it has no value, or with its error at the end."""
    if "error" in row:
        columns = [(name, form) for name, form in columns if row.get(name) is not None]
    text = ""
    for name, form in columns:
        value = shown(row, name)
        if value is None:
            text += format("", width_of(form))
        else:
            text += format(value, form)
    if "error" in row:
        return f"{text}  {row['error']}"
    return text.rstrip()
