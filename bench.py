"""Speed: autoregressive decoding with a KV cache against diffusion, and where each of them
wins.

    python bench.py                          # the newest checkpoints under out/, or random
    python bench.py --preset small --batch 1 8 --length 1024 --steps 8 16 32

Both sides run as fast as this code can. The engines:

    ar                 with a static KV cache and a compiled decoding step
    diffusion          diffusion.py's sampler, with full attention
    diffusion-kv       the same with attention in the order of reveal, and its KV cache
    ar-exact, diffusion-exact      the distribution of one token at a time, in few calls
    diffusion-naive    the papers' sampler, as they write it
    transformers       the AR model of the transformers package

Warm-up does not count, runs of the engines alternate, and the median is shown (of
diffusion-naive, which is slow, one run). Roofline is the speed reached as a share of the
limit that the hardware shows in the same minute: memory bandwidth for AR, matrix products
for diffusion. The clock, the memory gauge and the roofline
are in tools/machine.py, flags and models in tools/bench_setup.py, the crossover in
tools/crossover.py, training in tools/bench_train.py.
"""
import functools
import itertools
import sys
from dataclasses import dataclass

import torch

from common import Processes, start
from data.cost import counted_calls
from data.files import UserError, write_json
from data.measures import entropy, gen_ppl, make_judge, pooled_entropy
from data.script import command, parse_flags
from diffusion import categorical, sample, sample_exact
from model import KVCache, decode, generate
from sample import EXACT, Sampling, draw_samples
from tools import figures
from tools.bench_setup import (QUALITY, SPEED, BenchConfig, checkpoints, random_weights,
                               set_defaults)
from tools.crossover import against_ar
from tools.joint import sample_joint
from tools.machine import (compiled_decode, describe, fill_times, first_run, header,
                           least_memory, limits, line, roofline, seconds,
                           transformers_engine, without_compiler)

GRAIN = {"cpu": 16}                      # see model.generate; 128 on a GPU


# ---- the engines: each gives a function that writes B texts of L tokens once

def ar_engine(model, B, L, decode_step):
    """AR decoding. decode_step: model.decode, or a compiled form of it."""
    device = model.embed.weight.device
    prompt = torch.zeros((B, 0), dtype=torch.long, device=device)    # nothing is given
    cache = None
    if decode_step is not decode:
        # CUDA graphs want their memory at a fixed place
        dtype = torch.bfloat16 if model.bf16 else None
        cache = KVCache(model.config, B, L, device, dtype)
        for stored in cache.k + cache.v:
            torch._dynamo.mark_static_address(stored)
    # both sides draw tokens by categorical, in float64
    grain = GRAIN.get(device.type, 128)
    return lambda: generate(model, prompt, L, categorical, decode_step, grain, cache)


def diffusion_engine(model, B, L, steps):
    """Diffusion from nothing but masks, with the KV cache where the model has one."""
    z = torch.full((B, L), model.mask_id, device=model.embed.weight.device)
    return lambda: sample(model, z, steps, model.mask_id)            # z stays as it is


def naive_engine(model, B, L, steps):
    """The papers' sampler, not compiled, as public code runs it."""
    z = torch.full((B, L), model.mask_id, device=model.embed.weight.device)
    return without_compiler(lambda: sample_joint(model, z, steps, model.mask_id),
                            "force_eager")


def exact_engine(model, B, L):
    """Exact sampling, of AR or of diffusion in the order of reveal; all texts in as many
    calls as the slowest of them needs, which differs from run to run."""
    z = torch.full((B, L), model.mask_id, device=model.embed.weight.device)
    return lambda: sample_exact(model, z, model.mask_id)


def make_engine(row, model, decode_step, steps):
    """A function that writes row's texts once. decode_step: AR's, plain or compiled; steps:
    of diffusion, None for the others."""
    name, B, L = row["engine"], row["batch"], row["length"]          # B texts of L
    if name == "ar":
        return ar_engine(model, B, L, decode_step)
    if name == "transformers":
        return transformers_engine(model, B, L)
    if name.endswith("-exact"):
        return exact_engine(model, B, L)
    if name == "diffusion-naive":
        return naive_engine(model, B, L, steps)
    return diffusion_engine(model, B, L, steps)


# ---- the timing

def rows_of(config, models, preset, B, L):
    """What is to be measured at batch B and length L: [(row, model)], the rows not yet
    filled. models: {engine: {name: model}}."""
    rows = []
    for name in config.engine:
        naive = name == "diffusion-naive"                            # the papers' sampler
        # the naive engine runs the models with full attention, as diffusion does
        mine = list(models[name.removesuffix("-naive")].items())
        if naive:
            # it is slow: beside other engines the first batch size is enough
            if B != config.batch[0] and len(config.engine) > 1:
                continue
            mine = mine[-1:]                                         # the last student
        # AR and transformers take one step for each token, exact engines what they need
        all_steps = [None]
        if name in ("diffusion", "diffusion-kv", "diffusion-naive"):
            all_steps = config.steps
        for (label, model), steps in itertools.product(mine, all_steps):
            params = sum(p.numel() for p in model.parameters())      # all weights
            row = dict(engine=name, model=label, preset=preset, params=params, steps=steps,
                       batch=B, length=L)
            rows.append((row, model))    # times follow in measure
    return rows


@dataclass
class Timing:
    """A row that is being measured."""
    row: dict
    shape: object                # the model's ModelConfig
    run: object                  # a function of nothing
    times: list                  # seconds of each run


def begin(config, row, model, decode_step, device, machine):
    """Warm up, then run once; returns a Timing, or None where the row does not fit in
    memory, which row["error"] says then."""
    name, steps = row["engine"], row["steps"]
    # sizes, for memory and roofline
    shape = model.shape if name == "transformers" else model.config
    row |= dict(dtype=config.dtype, device=machine["device"], threads=machine["threads"])
    run = make_engine(row, model, decode_step, steps)                # () -> texts (B, L)
    if name == "diffusion-kv" or name.endswith("-exact"):
        # shapes differ from step to step and, as reveals are random, from run to run: a
        # whole run, which compiles, is the warm-up; what is new to the compiler in a later
        # run is not compiled, so that no compiling is timed
        warm_up = run
        run = without_compiler(run, "eager_on_recompile")
    elif steps:
        # two steps are enough, as all look alike
        warm_up = make_engine(row, model, decode_step, min(2, steps))
    else:
        warm_up = run

    size = 2 if config.dtype == "bfloat16" else 4
    # refused beforehand if it cannot fit: the system would kill the process
    least = least_memory(row, shape, size)                           # bytes
    # nfe: calls of the network; reads: positions that it computed for each token of a text
    if name in ("ar", "transformers"):
        times = first_run(row, run, warm_up, least, device)          # None: no room
        row["nfe"], row["reads"] = row["length"], 1
    elif name == "diffusion-naive":
        times = first_run(row, run, warm_up, least, device)
        row["nfe"] = row["reads"] = steps                            # all, in each step
    else:
        # of each call of the first run the number of positions; a step that reveals nothing
        # makes no call
        with counted_calls(model) as calls:
            def warm_up_uncounted():
                warm_up()
                calls.clear()            # warm-up does not count
            times = first_run(row, run, warm_up_uncounted, least, device)
        row["nfe"] = len(calls)
        row["reads"] = sum(calls) / (row["batch"] * row["length"])
    if times is None:
        return None
    return Timing(row, shape, run, times)                            # with one run's time


@torch.no_grad()
def measure(config, group, device, machine):
    """Time the rows of a group [(row, model)], alternating, and fill them in."""
    # a compiler that has seen other batch sizes would compile for a variable one
    torch.compiler.reset()
    decode_step = decode                                             # plain PyTorch
    if config.compile:
        decode_step = compiled_decode(device, group[0][0]["batch"])
    # the first run of each
    running = []
    for row, model in group:
        timing = begin(config, row, model, decode_step, device, machine)
        if timing:
            running.append(timing)                                   # those that fit
    # the others in turn, so that a busy minute hits all engines alike; the naive sampler is
    # slow, and its first run must do
    for _ in range(config.repeats - 1):
        for timing in running:
            if timing.row["engine"] != "diffusion-naive":
                timing.times.append(seconds(timing.run, device))     # waits for a GPU's end
    for timing in running:
        fill_times(timing.row, timing.times)                         # median, least, most
        size = 2 if config.dtype == "bfloat16" else 4
        timing.row["roofline"] = roofline(timing.row, timing.shape, machine, size)


def quality(config, models, device, engine, name, steps):
    """Perplexity under the AR model, and both entropies, of a trained model's texts."""
    # the AR model of the folder is its judge
    model, judge = models[engine][name], next(iter(models["ar"].values()))
    if engine.endswith("-exact"):
        steps = EXACT
    x = draw_samples(model, config.samples, Sampling(steps), Processes(device))  # (n, L)
    vocab = judge.config.vocab           # the same for all models here
    gen, _ = gen_ppl(make_judge(judge), x.to(device))                # exp of mean nats
    within, _ = entropy(x, vocab)                                    # without their errors
    pooled, _ = pooled_entropy(x, vocab)                             # of all texts
    return {"gen_ppl": gen, "entropy": within, "of all": pooled}


# ---- the whole benchmark

def bench(config, device, machine):
    """Measure, save and print everything that the flags ask for; returns the rows."""
    rows = []
    columns = SPEED if config.preset else SPEED + QUALITY    # random texts have none
    print(header(columns))
    for preset in config.preset or [None]:
        # trained models, or random ones of a preset
        if preset:
            models = random_weights(config, device, preset)
        else:
            models = checkpoints(config, device)
        # a model's quality at a number of steps is the same at every batch size
        judged = functools.cache(functools.partial(quality, config, models, device))
        for L, B in itertools.product(config.length, config.batch):
            group = rows_of(config, models, preset, B, L)
            if not group:
                raise UserError("no checkpoint here is for --engine "
                                f"{' '.join(config.engine)}")
            measure(config, group, device, machine)
            new = [row for row, _ in group]                          # filled by measure
            if models.get("ar") and not preset:
                for row in new:
                    # models has no diffusion-naive, whose quality is diffusion's
                    if row["engine"] in models and "error" not in row:
                        row |= judged(row["engine"], row["model"], row["steps"])
            # fills in "vs AR"; the sentences that it returns need all batch sizes
            against_ar(new)
            rows += new                  # saved at once: a run may be stopped
            save(config, machine, rows)
            print("\n".join(line(row, columns) for row in new), flush=True)
    # the crossover, over all batch sizes
    print("\n".join(against_ar(rows)))
    if any(row["steps"] and row["steps"] > row["length"] for row in rows):
        print("more steps than tokens: a step that reveals nothing calls no network (nfe)")
    return rows


def save(config, machine, rows):
    """Write the rows to --json, if it is given."""
    if config.json:
        results = {"argv": sys.argv[1:], "machine": machine, "rows": rows}
        write_json(config.json, results)


def main():
    config = parse_flags(BenchConfig, __doc__)
    device = start(config.device).device                             # one process
    set_defaults(config, device)         # raises UserError at flags that contradict

    # what the hardware can do at this moment, for the roofline
    machine = limits(device, getattr(torch, config.dtype))
    print(describe(machine), flush=True)
    rows = bench(config, device, machine)
    # rows that did not fit in memory are results, too; but one must have fitted
    if all("error" in row for row in rows):
        raise UserError("nothing fits in memory; choose a smaller --batch, --length or "
                        "--preset")
    if config.plot:
        figures.draw_latency(rows, config.plot)                      # as the paper's figure


if __name__ == "__main__":
    command(main)
