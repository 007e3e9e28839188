"""What tools.gpu times: the hardware, texts, a step of SDTT, draws, and how often the CPU
waits for the GPU. The functions yield rows: dicts with what, unit, measured and, where they
have them, preset, batch, steps and more. bench.py's engines, and the clock and the gauges
of tools/machine.py.
"""
import copy
import functools
import statistics
import typing

import torch

import bench
from common import ema_update, make_optimizers
from data.cost import counted_calls
from data.processes import Processes
from diffusion import categorical, nelbo
from distill import sdtt_loss
from model import PRESETS, ModelConfig, Transformer
from tools.bench_setup import VOCAB, BenchConfig, models_of, rows_of, set_defaults
from tools.machine import host_waits, limits, seconds, with_peak_bytes
from train import TrainConfig, clip_gradient, prepare_model

# names of rows, and bench.py's of its engines
ENGINES = {"AR": "ar", "full": "diffusion", "cached": "diffusion-kv",
           "exact": "diffusion-exact"}


class Size(typing.NamedTuple):
    """How much work a row is."""
    preset: str
    length: int                  # tokens of a text
    steps: list                  # of diffusion
    repeats: int                 # timed runs, of which the median counts


class Piece(typing.NamedTuple):
    """Some rows that belong together."""
    name: str
    needs: int                   # seconds; with less time left it is not begun
    rows: typing.Callable        # yields the rows


# ---- what there is to do

def pieces(device, machine):
    """A list of Pieces, the most telling first. machine: what limits() returned."""
    def texts(size, B, names, needs):
        several = [functools.partial(engine_times, device, machine, size, B, name)
                   for name in names]
        named = zip(names, several, needs)
        return [Piece(f"{name}, {size.preset}, batch {B}", n, f) for name, f, n in named]

    def sdtt(size, B, optimizer, needs):
        return [Piece(f"SDTT, {size.preset}", needs,
                      functools.partial(sdtt_times, device, size, B, optimizer))]

    if device.type == "cpu":             # in small
        tiny = Size("nano", 16, [2, 4], 1)
        return [Piece("hardware", 0, functools.partial(hardware, device, machine)),
                *texts(tiny, 1, ENGINES, [0, 0, 0, 0]),
                *sdtt(tiny, 2, "muon", 0),
                Piece("draws", 0, functools.partial(draw_times, device, 1)),
                Piece("waits", 0, functools.partial(wait_counts, device, tiny))]
    small, xl = Size("small", 1024, [16, 32], 3), Size("xl", 1024, [16, 32], 3)
    three = ["AR", "full", "cached"]
    # most of what they need is for the compiler
    return [Piece("hardware", 10, functools.partial(hardware, device, machine)),
            *texts(small, 1, three, [60, 20, 20]),
            *texts(small, 8, three, [60, 20, 20]),
            *sdtt(small, 16, "muon", 60),
            Piece("draws", 5, functools.partial(draw_times, device, 20)),
            Piece("waits", 20, functools.partial(wait_counts, device, small)),
            *texts(xl, 1, three, [100, 30, 30]),
            *texts(small, 32, three, [60, 20, 20]),
            *texts(xl, 8, three, [100, 40, 30]),
            *sdtt(xl, 16, "adamw", 80),
            *texts(small, 1, ["exact"], [20]),
            *texts(small, 8, ["exact"], [30]),
            *texts(xl, 1, ["exact"], [40]),
            *texts(xl, 8, ["exact"], [60]),
            *texts(small, 32, ["exact"], [80])]


# ---- the pieces

def hardware(device, machine):
    """What the hardware reads, copies and multiplies in a second."""
    def products(found):
        return dict(what=f"{found['dtype']} products", unit="TFLOP/s",
                    measured=found["flop_per_s"] / 1e12)

    yield dict(what="reads", unit="TB/s", measured=machine["bytes_per_s"] / 1e12)
    n = 2 ** 29 if device.type == "cuda" else 2 ** 24                # 2 GB, 67 MB
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    # each number, of 4 bytes, is read and written
    yield dict(what="copies", unit="TB/s", measured=2 * 4 * n / best / 1e12)
    yield products(machine)
    if device.type == "cuda":
        yield products(limits(device, torch.float32))
        torch.set_float32_matmul_precision("high")
        yield products(limits(device, torch.float32)) | dict(what="TF32 products")
        torch.set_float32_matmul_precision("highest")


def group_of(device, size, B, name, compiled):
    """bench.py's config and [(row, engine, model)] for one of its engines, with random
    weights."""
    config = BenchConfig(preset=[size.preset], engine=[ENGINES[name]], batch=[B],
                         length=[size.length], steps=size.steps, repeats=size.repeats,
                         compile=None if compiled else False)
    # one dtype, bfloat16 on a GPU; compiled if there is g++
    config.dtype = ["bfloat16" if device.type == "cuda" else "float32"]
    set_defaults(config, device, bench.ENGINES)
    with device:                         # the weights are drawn where they are used
        models = models_of(config, device, size.preset, {}, bench.ENGINES)
    return config, rows_of(config, models, size.preset, B, size.length, bench.ENGINES)


def engine_times(device, machine, size, B, name):
    """Seconds for B texts, with all that bench.py says of them. On a CPU not compiled."""
    config, group = group_of(device, size, B, name, compiled=device.type == "cuda")
    bench.measure(config, group, device, {config.dtype[0]: machine})
    for row, _, _ in group:
        yield dict(row, what=name, unit="s", measured=row.get("seconds"))


class WithoutTrunk:
    """A model whose blocks cost nothing: all tokens have the states h (B, L, C)."""

    def __init__(self, model, h):
        self.model, self.h = model, h

    def hidden(self, z, at=None, rank=None):
        return self.h[:len(z)]           # on a CPU rows are left out, see states_at

    def __getattr__(self, name):
        return getattr(self.model, name)


def sdtt_parts(device, size, B, optimizer):
    """Functions without arguments, by name: a step of SDTT on B texts, as distill.py takes
    it, and its parts: the trunk (all blocks, the student's also backward), the head (with
    noise, targets, divergence), the optimizer (with clipping and the average). Then
    gradients alone: SDTT's and the bound's."""
    config = TrainConfig(optimizer=optimizer)
    with device:
        shape = PRESETS[size.preset] | dict(context=size.length, attention_bias=False)
        model = Transformer(ModelConfig(VOCAB, **shape))
        x = torch.randint(VOCAB, (B, size.length))
        h = torch.randn(B, size.length, model.config.width, requires_grad=True)
    teacher, ema = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
    for one in (model, teacher):
        prepare_model(one, config, Processes(device))
    optimizers = make_optimizers(model, config)

    def gradient(student=model, teacher=teacher):
        sdtt_loss(student, x, teacher, (1 / 1024, 2), "kld", VOCAB).backward()

    def bound():
        nelbo(model, x, VOCAB).backward()

    def trunk():
        states = model.hidden(x)
        with torch.no_grad():            # the teacher's two steps
            teacher.hidden(x)
            teacher.hidden(x)
        states.backward(torch.ones_like(states))

    def head():
        gradient(WithoutTrunk(model, h), WithoutTrunk(teacher, h.detach()))

    def optimize():
        clip_gradient(model, config.clip)
        for one in optimizers:
            one.step()
        ema_update(ema, model, config.ema, 0)

    def step():
        gradient()
        optimize()
        model.zero_grad()
    return {"step": step, "trunk": trunk, "head": head, "optimizer": optimize,
            "SDTT": gradient, "bound": bound}


def sdtt_times(device, size, B, optimizer):
    """Seconds of a step of SDTT and its parts, its memory, and the CPU's waits."""
    parts = sdtt_parts(device, size, B, optimizer)
    same = dict(preset=size.preset, batch=B)
    for name in ("step", "trunk", "head", "optimizer"):
        run = parts[name]
        run()                            # compiles, and makes the optimizer's averages
        run()
        times = [seconds(run, device) for _ in range(size.repeats)]
        yield dict(same, what=f"SDTT {name}", unit="s", measured=statistics.median(times))

    _, peak = with_peak_bytes(parts["step"], device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()     # weights and averages, too
    if peak is not None:                 # some systems do not tell
        yield dict(same, what="SDTT memory", unit="GB", measured=peak / 1e9)

    for name in ("SDTT", "bound"):
        places = host_waits(parts[name], device)
        yield dict(same, what=f"waits, {name}", unit="a batch", places=places,
                   measured=sum(places.values()))


def draw_times(device, calls):
    """Seconds for a draw from logits (32, V) and (512, V), the mean of some calls."""
    for rows in (32, 512):
        logits = torch.randn(rows, VOCAB, device=device)

        def draw():
            for _ in range(calls):
                categorical(logits)
        draw()
        yield dict(what=f"draw of {rows}", unit="s", measured=seconds(draw, device) / calls)


def wait_counts(device, size):
    """How often the CPU waits for the GPU in a call of the network, of one text."""
    for name in ENGINES:
        _, group = group_of(device, size, 1, name, compiled=False)
        row, _, model = group[0]
        engine = bench.ENGINES[row["engine"]]
        run = engine.make(model, row["batch"], row["length"], row["steps"], False)
        run()                            # some things are done the first time only
        with counted_calls(model) as calls:
            places = host_waits(run, device)
        yield dict(what=f"waits, {name}", unit="a call", preset=size.preset, batch=1,
                   steps=row["steps"], measured=sum(places.values()) / len(calls),
                   places=places)
