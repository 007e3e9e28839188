"""Speed: autoregressive decoding with a KV cache against diffusion, and where each of them
wins.

    python bench.py                          # the newest checkpoints under out/, or random
    python bench.py --preset small --batch 1 8 --length 1024 --steps 8 16 32

With random weights (--preset) a number of steps takes the time that it takes with trained
ones; but how many calls the exact engines need depends on what a model has learned.

Five engines, each as fast as this code can be:

    ar                 with a static KV cache and a compiled decoding step
    diffusion          diffusion.py's sampler, with full attention; its blocks are compiled
    diffusion-kv       the same with attention in the order of reveal, and its KV cache
    ar-exact, diffusion-exact      the distribution of one token at a time, in few calls

Two more, to compare with what others' code takes:

    diffusion-naive    the papers' sampler, as they write it, not compiled
    transformers       the AR model of the transformers package

Your own is a function like those below, and a line in ENGINES.

Warm-up does not count, runs of the engines alternate, and the median is shown. Roofline is
the speed as a share of what the hardware allows, measured at the start: by memory bandwidth
for AR (true for few texts), by matrix products for all others. If it is low the code is
what limits an engine, and to beat it proves little. Clock, memory and roofline are in
tools/machine.py, flags and models in tools/bench_setup.py, the crossover in
tools/crossover.py, training in tools/bench_train.py.
"""
import contextlib
import functools
import itertools
import sys
from dataclasses import dataclass

import torch

from common import seed_all, start
from data.cost import counted_calls
from data.files import UserError, write_json
from data.measures import entropy, gen_ppl, make_judge, pooled_entropy
from data.script import command, parse_flags
from diffusion import categorical, sample, sample_exact
from model import KVCache, decode, generate
from tools import figures
from tools.bench_setup import (QUALITY, SPEED, BenchConfig, checkpoints, random_weights,
                               set_defaults)
from tools.crossover import crossings, fill_vs_ar
from tools.joint import sample_joint
from tools.machine import (compiled_decode, describe, fill_times, first_run, header,
                           least_memory, limits, line, roofline, seconds,
                           transformers_engine, with_stance)

WRITTEN = 32                             # texts at a time, for quality


# ---- the engines. Each function takes a model, B texts of L tokens, steps (None where an
# engine has none) and AR's decoding step (model.decode, or a compiled form of it), and
# returns a function of nothing that writes the texts once

def ar_engine(model, B, L, steps, decode_step):
    """AR decoding."""
    device = model.embed.weight.device
    prompt = torch.zeros((B, 0), dtype=torch.long, device=device)    # nothing is given
    cache = None
    if decode_step is not decode:
        # CUDA graphs want their memory at a fixed place
        dtype = torch.bfloat16 if model.bf16 else None
        cache = KVCache(model.config, B, L, device, dtype)
        for stored in cache.k + cache.v:
            torch._dynamo.mark_static_address(stored)
    # attention looks at a multiple of so many slots: few shapes to compile
    grain = 128 if device.type == "cuda" else 16
    # tokens are drawn by categorical, in float64, as in diffusion
    return lambda: generate(model, prompt, L, categorical, decode_step, grain, cache)


def only_masks(model, B, L):
    """Texts (B, L) in which nothing is given yet."""
    return torch.full((B, L), model.mask_id, device=model.embed.weight.device)


def diffusion_engine(model, B, L, steps, decode_step):
    """Diffusion in steps, with the KV cache where the model has one."""
    z = only_masks(model, B, L)                                      # stays as it is
    return lambda: sample(model, z, steps, model.mask_id)


def naive_engine(model, B, L, steps, decode_step):
    """The papers' sampler, not compiled, as public code runs it."""
    z = only_masks(model, B, L)
    return with_stance("force_eager", lambda: sample_joint(model, z, steps, model.mask_id))


def exact_engine(model, B, L, steps, decode_step):
    """Exact sampling, of AR or of diffusion in the order of reveal. All texts take as many
    calls as the slowest of them needs, a number that differs from run to run."""
    z = only_masks(model, B, L)          # for AR, too, a mask is what is to be written

    def run():
        x, _ = sample_exact(model, z, model.mask_id)     # without the number of calls
        return x
    return run


@dataclass
class Engine:
    """What is to be known of an engine."""
    make: object                 # one of the functions above
    models: str                  # which it runs: those of this attention, or "transformers"
    in_steps: bool = False       # run it at each of --steps
    varying: bool = False        # shapes differ from run to run: warm up with a whole run
    counted: bool = True         # count its calls; False: its steps, or one for each token
    slow: bool = False           # time one run only, at the first batch size, of one model


ENGINES = {
    "ar": Engine(ar_engine, "causal", counted=False),
    "ar-exact": Engine(exact_engine, "causal", varying=True),
    "diffusion": Engine(diffusion_engine, "full", in_steps=True),
    "diffusion-kv": Engine(diffusion_engine, "reveal", in_steps=True, varying=True),
    "diffusion-exact": Engine(exact_engine, "reveal", varying=True),
    "diffusion-naive": Engine(naive_engine, "full", in_steps=True, counted=False,
                              slow=True),
    "transformers": Engine(transformers_engine, "transformers", counted=False)}


def make_run(row, model, decode_step, steps):
    """A function of nothing that writes a row's texts once, in so many steps."""
    engine = ENGINES[row["engine"]]
    return engine.make(model, row["batch"], row["length"], steps, decode_step)


# ---- the timing. A row is a dict: what is measured (engine, model, preset, params, steps,
# batch, length), where (dtype, device, threads), and what came out: nfe, the calls of the
# network; reads, the positions that it computed for each token of a text; seconds and the
# like; or "error"

def rows_of(config, models, preset, B, L):
    """What is to be measured at batch B and length L: [(row, model)], the rows not yet
    filled. models: {attention: {label: model}}."""
    rows = []
    for name in config.engine:
        engine = ENGINES[name]
        mine = list(models[engine.models].items())
        if engine.slow:
            # beside other engines the first batch size is enough
            if B != config.batch[0] and len(config.engine) > 1:
                continue
            mine = mine[-1:]                                         # the last student
        all_steps = config.steps if engine.in_steps else [None]
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
    memory, and row["error"] says so."""
    engine, steps = ENGINES[row["engine"]], row["steps"]
    # sizes, for memory and roofline
    shape = model.shape if engine.models == "transformers" else model.config
    row |= dict(dtype=config.dtype, device=machine["device"], threads=machine["threads"])
    # what cannot fit is refused beforehand: the system would kill the process
    size = 2 if config.dtype == "bfloat16" else 4
    least = least_memory(row, shape, size)                           # bytes

    run = make_run(row, model, decode_step, steps)                   # () -> texts (B, L)
    warm_up = run
    if engine.varying:
        # the warm-up, a whole run, compiles. A shape that comes only later runs as it is,
        # uncompiled: that is slower, but no compiling is timed
        run = with_stance("eager_on_recompile", run)
    elif engine.in_steps:
        # two steps are enough, as all look alike
        warm_up = make_run(row, model, decode_step, min(2, steps))

    # calls: for each call of the network the positions that it computed, in the first run
    # alone. (An exact engine's other runs need a few calls more or fewer)
    counting = contextlib.nullcontext([])
    if engine.counted:
        counting = counted_calls(model)
    with counting as calls:
        def warm_up_and_forget():
            warm_up()
            calls.clear()
        # None where memory does not suffice; the row then has an "error"
        times = first_run(row, run, warm_up_and_forget, least, device)
    if times is None:
        return None
    if engine.counted:
        row["nfe"], row["reads"] = len(calls), sum(calls) / (row["batch"] * row["length"])
    elif engine.in_steps:
        row["nfe"] = row["reads"] = steps                            # all, in each step
    else:
        row["nfe"], row["reads"] = row["length"], 1                  # a token in each
    return Timing(row, shape, run, times)                            # with one run's time


@torch.no_grad()
def measure(config, group, device, machine):
    """Time the rows of a group [(row, model)], alternating, and fill them in."""
    # forget other batch sizes: having seen two, the compiler would compile for any size,
    # which is slower
    torch.compiler.reset()
    # AR's step is compiled here, diffusion's blocks were in tools/bench_setup.py
    decode_step = decode                                             # plain PyTorch
    if config.compile:
        decode_step = compiled_decode(device, group[0][0]["batch"])
    # the first run of each
    running = []
    for row, model in group:
        timing = begin(config, row, model, decode_step, device, machine)
        if timing:
            running.append(timing)                                   # those that fit
    # the others in turn, so that a busy minute hits all engines alike
    for _ in range(config.repeats - 1):
        for timing in running:
            if not ENGINES[timing.row["engine"]].slow:
                timing.times.append(seconds(timing.run, device))     # waits for a GPU's end
    for timing in running:
        fill_times(timing.row, timing.times)                         # median, least, most
        size = 2 if config.dtype == "bfloat16" else 4
        timing.row["roofline"] = roofline(timing.row, timing.shape, machine, size)


@torch.no_grad()
def quality(config, models, engine, label, L, steps):
    """Perplexity under the AR model, and both entropies, of texts that an engine writes."""
    model = models[ENGINES[engine].models][label]
    seed_all("quality", L, steps)
    run = ENGINES[engine].make(model, WRITTEN, L, steps, decode)
    texts = []
    while len(texts) * WRITTEN < config.samples:
        texts.append(run())                                          # (WRITTEN, L)
    x = torch.cat(texts)[:config.samples]                            # (n, L)
    # the AR model of the folder is its judge
    judge = next(iter(models["causal"].values()))
    gen, _ = gen_ppl(make_judge(judge), x)                           # exp of mean nats
    x, vocab = x.cpu(), judge.config.vocab           # the same for all models here
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
            needed = {ENGINES[name].models for name in config.engine}
            models = random_weights(config, device, preset, needed)
        else:
            models = checkpoints(config, device)
        # the quality of an engine, model, length and number of steps is the same at every
        # batch size, and measured once
        judged = functools.cache(functools.partial(quality, config, models))
        for L, B in itertools.product(config.length, config.batch):
            group = rows_of(config, models, preset, B, L)
            if not group:
                raise UserError("no checkpoint here is for --engine "
                                f"{' '.join(config.engine)}")
            measure(config, group, device, machine)
            new = [row for row, _ in group]                          # filled by measure
            if models.get("causal") and not preset:
                for row in new:
                    if "error" not in row and not ENGINES[row["engine"]].slow:
                        row |= judged(row["engine"], row["model"], L, row["steps"])
            fill_vs_ar(new)
            rows += new                  # saved at once: a run may be stopped
            save(config, machine, rows)
            print("\n".join(line(row, columns) for row in new), flush=True)
    # where AR overtakes, over all batch sizes
    print("\n".join(crossings(rows)))
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
    # raises UserError at flags that contradict
    set_defaults(config, device, ENGINES)

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
