"""Speed: autoregressive decoding with a KV cache against diffusion, and where each of them
wins.

    python bench.py                          # the newest checkpoints under out/, or random
    python bench.py --preset small --batch 1 8 --length 1024 --steps 8 16 32

Random weights (--preset; small, where there are no checkpoints) suffice to time ar and
diffusion in steps, but not the exact engines: how many calls they need depends on what a
model has learned.

The engines:

    ar                 AR with a static KV cache; decoding step and draw are compiled
    diffusion          full attention; the network, or whole steps of it, are compiled
    diffusion-kv       the same with attention in the order of reveal, and its KV cache
    diffusion-exact    the distribution of one token at a time, in few calls of a compiled
                       network
    ar-exact           the same with AR; not compiled
    diffusion-naive    the sampler of MDLM and SDTT, as the papers write it; not compiled

Your own is a function like those below, and a line in ENGINES. (tools/others.py compares
AR with other packages'.)

Each engine is warmed up and timed once; then further runs of all alternate (but none of
diffusion-naive). The median is shown. What the columns say:

    vs AR      how many times faster than ar, at the same batch and length, and in the dtype
               that suits ar best
    roofline   the share that an engine reaches of a limit of the hardware, measured at the
               start. Of ar: bytes of weights and cache that it must read / seconds / memory
               bandwidth. Of the others: operations that the texts need / seconds / rate of
               large matrix products
    nfe        calls of the network (number of function evaluations)
    reads      positions that these computed for each token: with the cache two at most, its
               mask and itself, plus the padding of compiled steps (tools/static.py)
    gen_ppl, entropy (within a text), of all   see README; of trained weights only

Large models come near those limits: AR with few texts, diffusion with many positions a
call. There a low roofline says that the code is slow, and to beat such an engine proves
little. nano stays far below both: its time goes into starting many small operations, so its
"vs AR" does not carry over to larger models. Part of a table (nano, two cores):

    engine        model     steps batch length seconds vs AR roofline nfe reads
    ar            ar                  1     50   0.038  1.00      25%  50   1.0
    diffusion     round7        8     1     50   0.019  1.98      18%   8   8.0
    diffusion-kv  round7        8     1     50   0.018  2.15       5%   8   3.8
"""
import contextlib
import itertools
import sys
import typing
from dataclasses import dataclass

import torch

from cache import generate
from data.cost import counted_calls
from data.files import UserError, write_json
from data.processes import start
from data.script import command, parse_flags
from diffusion import categorical, sample
from exact import sample_exact
from tools import figures
from tools.bench_setup import (BenchConfig, columns_of, fill_quality, models_of, rows_of,
                               set_defaults)
from tools.compiled_ar import ARSampler, can_draw
from tools.crossover import crossings, fill_vs_ar
from tools.joint import naive_engine
from tools.machine import (OutOfMemory, describe, fill_times, forget_compiled, header,
                           least_memory, limits, line, roofline, room_for, seconds,
                           with_peak_bytes, with_stance)
from tools.static import StaticSampler, pays_for


# ---- the engines. Each takes a model, the batch size B, the length L, the number of steps
# (None for an engine without steps), and whether steps may be compiled. It returns a
# function without arguments; each call of that writes B texts and returns their ids (B, L)

def ar_engine(model, B, L, steps, compiled):
    """AR decoding; it draws as diffusion does, from float64."""
    if compiled:
        return ARSampler(model, B, L)                # decoding step and draw in one
    prompt = torch.zeros((B, 0), dtype=torch.long, device=model.embed.weight.device)
    return lambda: generate(model, prompt, L, draw=categorical)      # nothing is given


def only_masks(model, B, L):
    """Texts (B, L) in which nothing is given yet."""
    return torch.full((B, L), model.mask_id, device=model.embed.weight.device)


def diffusion_engine(model, B, L, steps, compiled):
    """Diffusion in steps, with the KV cache where the model has one. Where there is little
    to compute whole steps are compiled; elsewhere only the network, which models_of did."""
    if compiled and pays_for(model, B, L):
        return StaticSampler(model, B, L, steps)     # the same distribution
    z = only_masks(model, B, L)                      # sample fills a copy
    return lambda: sample(model, z, steps, model.mask_id)


def exact_engine(model, B, L, steps, compiled):
    """Exact sampling, of AR or of diffusion in the order of reveal. All texts take as many
    calls as the slowest of them needs, a number that differs from run to run."""
    z = only_masks(model, B, L)          # of AR, too: what is to be written
    return lambda: sample_exact(model, z, model.mask_id)[0]          # the texts


@dataclass
class Engine:
    """How an engine is run."""
    make: typing.Callable        # a function as above
    attention: str               # of the models that it runs
    in_steps: bool = False       # run it at each of --steps
    two_steps: bool = False      # warm up with two steps only, which meet every shape
    slow: bool = False           # one run only, at the first batch size, of one model


ENGINES = {
    "ar": Engine(ar_engine, "causal"),
    "ar-exact": Engine(exact_engine, "causal"),
    "diffusion": Engine(diffusion_engine, "full", in_steps=True, two_steps=True),
    "diffusion-kv": Engine(diffusion_engine, "reveal", in_steps=True),
    "diffusion-exact": Engine(exact_engine, "reveal"),
    "diffusion-naive": Engine(naive_engine, "full", in_steps=True, two_steps=True,
                              slow=True)}

# Your own, for models with full attention; then bench.py --engine ar mine:
#     def my_engine(model, B, L, steps, compiled):
#         z = only_masks(model, B, L)
#         return lambda: my_sampler(model, z, steps)
#     "mine": Engine(my_engine, "full", in_steps=True)
# my_sampler must not write into z, from which every run starts. Calls and positions are
# counted in model.run, which the model's other methods use. Of trained weights the texts
# are scored, too.


# ---- the whole benchmark. A row is a dict: what is measured, where, and what came out, or
# "error"

def bench(config, device, machines):
    """Measure, save and print everything that the flags ask for; returns the rows.
    machines: what the hardware can do, {dtype: see tools.machine.limits}."""
    rows = []
    columns = columns_of(config)
    print(header(columns))
    for preset in config.preset or [None]:           # None: trained weights
        models = models_of(config, device, preset, ENGINES)
        known = {}                       # quality, which is the same for any batch size
        for L, B in itertools.product(config.length, config.batch):
            # [(row, model)], for each engine, dtype, model that it runs, and steps if any
            group = rows_of(config, models, preset, B, L, ENGINES)
            # no model for these engines, or only slow ones after the first B
            if not group:
                continue
            measure(config, group, device, machines)
            new = [row for row, _ in group]                          # now filled
            if not preset:
                fill_quality(config, group, models, known, ENGINES)
            fill_vs_ar(new)              # AR's seconds (its best dtype) / those of each row
            rows += new
            if config.json:              # saved at once: a run may be stopped
                results = {"argv": sys.argv[1:], "machines": machines, "rows": rows}
                write_json(config.json, results)
            print("\n".join(line(row, columns) for row in new), flush=True)
    if not rows:
        raise UserError(f"no model here is for --engine {' '.join(config.engine)}")
    # where AR overtakes, over all batch sizes
    print("\n".join(crossings(rows)))
    # rows that did not fit in memory are results, too; but one must have fitted
    if all("error" in row for row in rows):
        raise UserError("nothing fits in memory; choose a smaller --batch, --length or "
                        "--preset")
    return rows


# ---- the timing of a group of rows, of one batch size and length

@dataclass
class Timing:
    """A row that is being measured."""
    row: dict
    model: object
    run: typing.Callable         # call it to write the texts once
    times: list                  # seconds of each run


@torch.no_grad()
def measure(config, group, device, machines):
    """Time the rows of a group [(row, model)], alternating, and fill them in."""
    # having seen other batch sizes, the compiler would make code for any, which is slower
    forget_compiled()
    compiled = config.compile and can_draw(device)
    # warm-up and first run of each, which all stay in memory
    running = []
    for row, model in group:
        machine = machines[row["dtype"]]
        row.update(device=machine["device"], threads=machine["threads"])
        timing = begin(row, model, compiled, device)
        if timing:
            running.append(timing)                   # those that fit beside the others
    # the other runs in turn, so that a busy minute hits all engines alike
    for _ in range(config.repeats - 1):
        for timing in running:
            if not ENGINES[timing.row["engine"]].slow:
                timing.times.append(seconds(timing.run, device))     # waits for a GPU's end
    for timing in running:
        fill_times(timing.row, timing.times)                         # median, least, most
        timing.row["roofline"] = roofline(timing.row, timing.model.config,
                                          machines[timing.row["dtype"]])


def begin(row, model, compiled, device):
    """Warm up, then run once; returns a Timing, or None where the row does not fit in
    memory."""
    engine, B, L, steps = ENGINES[row["engine"]], row["batch"], row["length"], row["steps"]
    try:
        with room_for(least_memory(row, model.config), device):
            write = engine.make(model, B, L, steps, compiled)
            # a warm-up compiles what it meets. The timed runs may meet shapes that it did
            # not, which they compute uncompiled: slower, but no compiling is timed. (Each
            # StaticSampler has shapes of its own)
            warm_up = write
            if engine.two_steps and not isinstance(write, StaticSampler):
                warm_up = engine.make(model, B, L, min(2, steps), compiled)
            warm_up()
            run = with_stance("eager_on_recompile", write)
            # calls: how many positions each call of the network computes. What is compiled
            # whole lists them itself, as its calls cannot be watched
            counting = counted_calls(model)
            if hasattr(write, "calls"):
                counting = contextlib.nullcontext(write.calls)
            with counting as calls:
                time, row["peak_bytes"] = with_peak_bytes(lambda: seconds(run, device),
                                                          device)
    except OutOfMemory:
        row["error"] = "does not fit in memory"
        return None
    # of this run; others may take a few calls more or fewer
    row["nfe"], row["reads"] = len(calls), sum(calls) / (B * L)
    return Timing(row, model, run, [time])


def main():
    config = parse_flags(BenchConfig, __doc__)
    device = start(config.device).device
    # fills in what no flag says: preset small if there are no checkpoints, all others in
    # tools/bench_setup.py. Raises UserError at flags that contradict
    set_defaults(config, device, ENGINES)

    # what the hardware can do at this moment, for the roofline
    machines = {}
    for dtype in config.dtype:
        machines[dtype] = limits(device, getattr(torch, dtype))
        print(describe(machines[dtype]), flush=True)
    rows = bench(config, device, machines)
    if config.plot:
        figures.draw_latency(rows, config.plot)                      # as the paper's figure


if __name__ == "__main__":
    command(main)
