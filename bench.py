"""Speed: autoregressive decoding with a KV cache against diffusion, and where each of them
wins.

    python bench.py                          # the newest checkpoints under out/, or random
    python bench.py --preset small --batch 1 8 --length 1024 --steps 8 16 32

Random weights (--preset, small if there are no checkpoints) suffice to time ar and
diffusion in steps, but not the exact engines: how many calls they need depends on what a
model has learned.

The engines (the exact ones only if --engine names them):

    ar                 AR with a static KV cache; decoding step and draw are compiled
    diffusion          full attention; the network, or whole steps of it, are compiled
    diffusion-kv       the same with attention in the order of reveal, and its KV cache
    diffusion-exact    the distribution of one token at a time, in few calls of a compiled
                       network
    ar-exact           the same with AR; not compiled
    diffusion-naive    the sampler of MDLM and SDTT, as the papers write it; not compiled

Your own is a function like those below, and a line in ENGINES. (tools/others.py compares
AR with other packages'.)

Each row of the table is warmed up and run once; then further runs of all alternate
(diffusion-naive has the first run only). The median is shown. The other columns:

    spread     the slowest less the fastest run, as a share of the median
    vs AR      speed as a multiple of ar's, at the same batch and length, and in the dtype
               that suits ar best
    roofline   the least time that the hardware allows / the time taken. The least is for ar
               to read weights and cache, for the others to multiply, at the speed of large
               matrices
    peak MB    memory that a run takes beyond the model (and beyond the KV cache that
               samplers compiled whole keep from run to run)
    nfe        calls of the network (number of function evaluations)
    reads      positions that these computed for each token: with the cache, in steps, two
               at most, its mask and itself, plus the padding of tools/static.py
    gen_ppl, entropy (within a text), of all   see README; of trained weights only

Large models come near these limits: AR with few texts, diffusion with many positions a
call (with few, reading the weights takes longer than multiplying by them). There an engine
far below its limit has slow code, and being faster than it proves little. nano stays far
below both: its time goes into starting many small operations, so its "vs AR" does not carry
over to larger models. Part of a table (nano, two cores):

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
from tools import figures, machine
from tools.bench_setup import (BenchConfig, columns_of, fill_quality, judge_of,
                               load_checkpoints, models_of, rows_of, set_defaults,
                               set_length)
from tools.compiled_ar import ARSampler
from tools.crossover import crossings, fill_vs_ar
from tools.fast_models import forget_compiled, is_small, with_stance
from tools.joint import sample_joint
from tools.static import StaticSampler, pays_for


# ---- the engines:
#
#     make(model, B, L, steps, compiled) -> write; write() -> ids (B, L) of B texts
#
# steps: None for an engine without steps. compiled: whether it may compile whole steps.
# (Diffusion's networks are compiled already, by models_of.) Nothing is prompted

def ar_engine(model, B, L, steps, compiled):
    """AR decoding. Draws are in float64, as diffusion's."""
    if compiled:
        return ARSampler(model, B, L)                # decoding step and draw in one
    prompt = torch.zeros((B, 0), dtype=torch.long, device=model.embed.weight.device)
    return lambda: generate(model, prompt, L, draw=categorical)      # nothing is given


def only_masks(model, B, L):
    """Texts (B, L) in which nothing is given yet."""
    return torch.full((B, L), model.mask_id, device=model.embed.weight.device)


def diffusion_engine(model, B, L, steps, compiled):
    """Diffusion in steps, with the KV cache where the model has one. Where there is little
    to compute, whole steps are compiled."""
    if compiled and pays_for(model, B, L):
        return StaticSampler(model, B, L, steps)     # the same distribution
    z = only_masks(model, B, L)                      # (B, L); sample fills a copy
    return lambda: sample(model, z, steps, model.mask_id)


def exact_engine(model, B, L, steps, compiled):
    """Exact sampling, of AR or of diffusion in the order of reveal. All texts take as many
    calls as the slowest of them needs, a number that differs from run to run."""
    z = only_masks(model, B, L)          # of AR, too: what is to be written
    return lambda: sample_exact(model, z, model.mask_id)[0]          # the texts


def naive_engine(model, B, L, steps, compiled):
    """The sampler of MDLM and SDTT, not compiled, as public code runs it."""
    z = only_masks(model, B, L)
    return with_stance("force_eager", lambda: sample_joint(model, z, steps, model.mask_id))


@dataclass
class Engine:
    """How an engine is run."""
    make: typing.Callable        # a function as above
    attention: str               # of the models that it runs
    in_steps: bool = False       # run it at each of --steps
    # warm up with two steps: large models and slow engines meet all shapes there
    short_warm_up: bool = False
    # one run, of one model; beside other engines only at the smallest batch, in one dtype
    slow: bool = False


ENGINES = {
    "ar": Engine(ar_engine, "causal"),
    "ar-exact": Engine(exact_engine, "causal"),
    "diffusion": Engine(diffusion_engine, "full", in_steps=True, short_warm_up=True),
    "diffusion-kv": Engine(diffusion_engine, "reveal", in_steps=True),
    "diffusion-exact": Engine(exact_engine, "reveal"),
    "diffusion-naive": Engine(naive_engine, "full", in_steps=True, short_warm_up=True,
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
    # trained weights {label: model}, and the AR model that judges their texts, if there is
    # one. With --preset {} and None
    trained = load_checkpoints(config)
    judge = judge_of(trained, device)
    set_length(config, trained)
    rows = []
    columns = columns_of(config)         # what is shown of a row
    print(machine.header(columns))
    for preset in config.preset or [None]:
        models = models_of(config, device, preset, trained, ENGINES)
        known = {}                       # quality, which is the same for any batch size
        for L, B in itertools.product(config.length, config.batch):
            # [(row, engine, model)]: one for each engine, dtype, model of the engine's
            # attention, and number of steps
            group = rows_of(config, models, preset, B, L, ENGINES)
            if not group:
                continue                 # no model for them, or only slow ones after B[0]
            measure(config, group, device, machines)
            if judge:
                fill_quality(config, group, judge, known)
            new = [row for row, _, _ in group]
            fill_vs_ar(new)              # AR's seconds (its best dtype) / those of each row
            rows += new
            if config.json:              # saved at once: a run may be stopped
                results = {"argv": sys.argv[1:], "machines": machines, "rows": rows}
                write_json(config.json, results)
            print("\n".join(machine.line(row, columns) for row in new), flush=True)
    # such as --engine diffusion-kv where no model has attention "reveal"
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
    row: dict                    # filled in at the end
    engine: Engine               # of ENGINES
    model: object                # a Transformer
    run: typing.Callable         # call it to write the texts once
    times: list                  # seconds of each run


@torch.no_grad()
def measure(config, group, device, machines):
    """Time the rows of a group [(row, engine, model)], and fill them in. machines: see
    bench."""
    # having seen other batch sizes, the compiler would make code for any, which is slower
    forget_compiled()
    # make, warm up and run each once; all that fit stay in memory together
    timings = []
    for row, engine, model in group:
        limit = machines[row["dtype"]]
        row.update(device=limit["device"], threads=limit["threads"])
        try:
            # raises OutOfMemory at once where not even the least is free
            with machine.room_for(machine.least_memory(row, model.config), device):
                run, time = first_run(row, engine, model, config.compile, device)
            timings.append(Timing(row, engine, model, run, [time]))
        except machine.OutOfMemory:
            row["error"] = "does not fit in memory"
    # the other runs in turn, so that a busy minute hits all engines alike
    for _ in range(config.repeats - 1):
        for timing in timings:
            if not timing.engine.slow:
                # seconds waits for a GPU's end
                timing.times.append(machine.seconds(timing.run, device))
    for timing in timings:
        row = timing.row
        machine.fill_times(row, timing.times)                        # median, least, most
        row["roofline"] = machine.roofline(row, timing.model.config, machines[row["dtype"]])


def first_run(row, engine, model, compiled, device):
    """Warm an engine up and run it once. Returns (run, seconds), where run() writes the
    row's texts; fills in the row's memory, calls and reads."""
    B, L, steps = row["batch"], row["length"], row["steps"]
    write = engine.make(model, B, L, steps, compiled)
    # a warm-up compiles what it meets. A shape that is new in a timed run is computed
    # uncompiled (eager_on_recompile): slower, but no compiling is timed
    warm_up = write
    short = engine.short_warm_up and (engine.slow or not is_small(model.config))
    # (a StaticSampler has shapes of its own, which only its own run meets)
    if short and not isinstance(write, StaticSampler):
        warm_up = engine.make(model, B, L, min(2, steps), compiled)
    warm_up()
    run = with_stance("eager_on_recompile", write)
    with positions_of_calls(model, write) as calls:
        time, row["peak_bytes"] = machine.with_peak_bytes(
            lambda: machine.seconds(run, device), device)
    # of this run; with exact engines another run takes a few more or fewer
    row["nfe"], row["reads"] = len(calls), sum(calls) / (B * L)
    return run, time


def positions_of_calls(model, write):
    """A context whose list says how many positions each network call in it computed. A
    sampler compiled as a whole has such a list: its calls cannot be watched from outside.
    """
    if hasattr(write, "calls"):
        return contextlib.nullcontext(write.calls)
    return counted_calls(model)


def main():
    config = parse_flags(BenchConfig, __doc__)
    device = start(config.device).device
    # fills in what no flag says: preset small if there are no checkpoints, the rest see
    # tools/bench_setup.py
    set_defaults(config, device, ENGINES)

    # what the hardware can do at this moment, for the roofline
    machines = {}
    for dtype in config.dtype:
        machines[dtype] = machine.limits(device, getattr(torch, dtype))
        print(machine.describe(machines[dtype]), flush=True)
    rows = bench(config, device, machines)
    if config.plot:
        figures.draw_latency(rows, config.plot)                      # as the paper's figure


if __name__ == "__main__":
    command(main)
