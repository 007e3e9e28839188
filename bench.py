"""Speed: autoregressive decoding with a KV cache against diffusion, and where each of them
wins.

    python bench.py                          # the newest checkpoints under out/, or random
    python bench.py --preset small --batch 1 8 --length 1024 --steps 8 16 32

With random weights (--preset; where there are no checkpoints, small) the times of AR and
of a given number of steps are valid. The exact engines' are not: how many calls they need
depends on what a model has learned.

Five engines, each as fast as this code makes it:

    ar                 with a static KV cache; decoding step and draw are compiled as one
    diffusion          full attention; where there is little to compute whole steps are
                       compiled (tools/static.py), else the network in diffusion.py's steps
    diffusion-kv       the same with attention in the order of reveal, and its KV cache
    ar-exact, diffusion-exact      the distribution of one token at a time, in few calls;
                       diffusion's network is compiled

Two more, to compare with what others' code takes, neither of them compiled:

    diffusion-naive    the sampler of MDLM and SDTT, as the papers write it
    transformers       greedy decoding of that package's GPT-2, with its KV cache

Your own is a function like those below, and a line in ENGINES.

Warm-up does not count. After the first, runs of the engines alternate (but of
diffusion-naive there is only one), and the median is shown. What the columns say:

    vs AR      how many times faster than ar, at the same batch and length, and in the dtype
               that suits ar best
    roofline   the share that an engine reaches of a limit of the hardware, measured at the
               start. Of ar and transformers: bytes of weights and cache that they must read
               / seconds / memory bandwidth. Of the others: operations for the positions
               that they compute / seconds / rate of large matrix products
    nfe        calls of the network
    reads      positions that it read, gaps (tools/static.py) included, for each token
    gen_ppl, entropy (within a text), of all   see README; of trained weights only

Large models can come near those limits if AR has few texts, and diffusion many positions a
call. There a low roofline says that the code is slow, and to beat such an engine proves
little. nano stays far below both limits: its time goes into starting many small operations,
so its "vs AR" does not carry over to larger models. Part of a table (nano, two cores):

    engine        model     steps batch length seconds vs AR roofline nfe reads gen_ppl
    ar            ar                  1     50   0.038  1.00      25%  50   1.0    1.39
    diffusion     round7        8     1     50   0.019  1.98      18%   8   8.0    1.52
    diffusion-kv  round7        8     1     50   0.018  2.15       5%   8   3.8    1.50
"""
import contextlib
import itertools
import sys
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
from tools.crossover import crossings, fill_vs_ar
from tools.joint import naive_engine
from tools.machine import (OutOfMemory, compiled_decode, describe, fill_times, header,
                           least_memory, limits, line, peak_bytes, room_for, roofline,
                           seconds, transformers_engine, with_stance)
from tools.static import StaticSampler, ar_sampler, can_draw, decode_and_draw, pays_for


# ---- the engines. Each takes a model, the batch size B, the length L, the number of steps
# (None for an engine without steps), and AR's step with its draw, compiled, or None where
# nothing is compiled. It returns a function without arguments; each call of that writes B
# texts and returns their ids (B, L)

def ar_engine(model, B, L, steps, compiled_step):
    """AR decoding, of tokens drawn in float64, as in diffusion."""
    if compiled_step:
        return ar_sampler(model, B, L, compiled_step)
    prompt = torch.zeros((B, 0), dtype=torch.long, device=model.embed.weight.device)
    return lambda: generate(model, prompt, L, categorical)           # nothing is given


def only_masks(model, B, L):
    """Texts (B, L) in which nothing is given yet."""
    return torch.full((B, L), model.mask_id, device=model.embed.weight.device)


def diffusion_engine(model, B, L, steps, compiled_step):
    """Diffusion in steps, with the KV cache where the model has one."""
    if compiled_step and pays_for(model, B, L):          # little work: whole steps compiled
        return StaticSampler(model, B, L, steps)         # the same law
    z = only_masks(model, B, L)          # sample fills a copy
    return lambda: sample(model, z, steps, model.mask_id)


def exact_engine(model, B, L, steps, compiled_step):
    """Exact sampling, of AR or of diffusion in the order of reveal. All texts take as many
    calls as the slowest of them needs, a number that differs from run to run."""
    # exact.py takes masks as what is to be written, for AR, too, though AR never reads one
    z = only_masks(model, B, L)

    def run():
        x, _ = sample_exact(model, z, model.mask_id)
        return x
    return run


@dataclass
class Engine:
    """What is to be known of an engine."""
    make: object                 # a function as above
    models: str                  # the attention of the models it runs, or "transformers"
    in_steps: bool = False       # run it at each of --steps
    two_steps: bool = False      # two steps meet every compiled shape: warm up with these
    counted: bool = True         # count its calls; False: they are --steps, or the length
    slow: bool = False           # time one run only, at the first batch size, of one model


ENGINES = {
    "ar": Engine(ar_engine, "causal", counted=False),
    "ar-exact": Engine(exact_engine, "causal"),
    "diffusion": Engine(diffusion_engine, "full", in_steps=True, two_steps=True),
    "diffusion-kv": Engine(diffusion_engine, "reveal", in_steps=True),
    "diffusion-exact": Engine(exact_engine, "reveal"),
    "diffusion-naive": Engine(naive_engine, "full", in_steps=True, two_steps=True,
                              counted=False, slow=True),
    "transformers": Engine(transformers_engine, "transformers", counted=False)}

# Your own, for models with full attention; then bench.py --engine ar mine:
#     def my_engine(model, B, L, steps, compiled_step):
#         z = only_masks(model, B, L)
#         return lambda: my_sampler(model, z, steps)
#     "mine": Engine(my_engine, "full", in_steps=True)
# my_sampler must not write into z, from which every run starts. Calls and positions are
# counted where the model's `run` is called. Of trained weights the texts are scored, too.


# ---- the whole benchmark. A row is a dict: what is measured (engine, model, preset,
# params, steps, batch, length), where (dtype, device, threads), and what came out: nfe and
# reads; seconds, their median, least and most, and from them roofline and vs_ar; quality;
# or "error"

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
            # no model here for these engines; or only slow ones, timed at the first B
            if not group:
                continue
            measure(config, group, B, device, machines)
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
        raise UserError(f"no checkpoint here is for --engine {' '.join(config.engine)}")
    # where AR overtakes, over all batch sizes
    print("\n".join(crossings(rows)))
    if any(row["steps"] and row["steps"] > row["length"] for row in rows):
        print("more steps than tokens: a step that reveals nothing calls no network (nfe), "
              "except in diffusion-naive")
    return rows


# ---- the timing of a group of rows, of one batch size and length. What is compiled (unless
# --no-compile, or where there is no C++ compiler), when it is first called:
#
#     ar                   the decoding step with its draw (measure hands it to the engines)
#     diffusion, -kv       of little work the whole step, by tools/static.py; else the
#                          network without its head, or, of a large model, its blocks, but
#                          not the last where only some positions are wanted, a number that
#                          varies (tools/machine.py, compile_network)
#     diffusion-exact      the same network or blocks
#     all others           nothing: ar-exact; diffusion-naive switches the compiler off

@dataclass
class Timing:
    """A row that is being measured."""
    row: dict
    model_config: object         # a ModelConfig, for roofline
    run: object                  # call it to write the texts once
    times: list                  # seconds of each run


@torch.no_grad()
def measure(config, group, B, device, machines):
    """Time the rows of a group [(row, model)], alternating, and fill them in."""
    # forget other batch sizes: having seen two, the compiler would compile for any size,
    # which is slower. (Size 1, as in the first diffusion step, always has its own form;
    # blocks with attention "reveal" are compiled for any size from the start)
    torch.compiler.reset()
    # models, dtypes and shapes share one function's compiled forms: 8 may be too few. And
    # two sizes that happen to be equal once are no reason to compile for that
    torch._dynamo.config.recompile_limit = 64
    torch.fx.experimental._config.use_duck_shape = False
    compiled_step = None
    if config.compile and can_draw(device):
        compiled_step = compiled_decode(device, B, decode_and_draw)
    # the first run of each, after a warm-up
    running = []
    for row, model in group:
        machine = machines[row["dtype"]]
        row.update(device=machine["device"], threads=machine["threads"])
        timing = begin(row, model, compiled_step, device)
        if timing:
            running.append(timing)                                   # those that fit
    # the other runs in turn, so that a busy minute hits all engines alike
    for _ in range(config.repeats - 1):
        for timing in running:
            if not ENGINES[timing.row["engine"]].slow:
                timing.times.append(seconds(timing.run, device))     # waits for a GPU's end
    for timing in running:
        fill_times(timing.row, timing.times)                         # median, least, most
        timing.row["roofline"] = roofline(timing.row, timing.model_config,
                                          machines[timing.row["dtype"]])


def begin(row, model, compiled_step, device):
    """Warm up, then run once; returns a Timing, or None where the row does not fit in
    memory."""
    engine, B, L, steps = ENGINES[row["engine"]], row["batch"], row["length"], row["steps"]
    model_config = model.config
    if engine.models == "transformers":  # whose config is that package's
        model_config = model.shape
    try:
        with room_for(least_memory(row, model_config), device):      # bytes
            run = engine.make(model, B, L, steps, compiled_step)
            counting = counted_calls(model) if engine.counted else contextlib.nullcontext()
            # a whole run, which compiles what it meets
            warm_up = run
            if isinstance(run, StaticSampler):
                warm_up = run.warm_up
                counting = contextlib.nullcontext(run.calls)     # it counts by itself
            elif engine.two_steps:
                warm_up = engine.make(model, B, L, min(2, steps), compiled_step)
            warm_up()
            # a timed run may meet a shape that warm_up did not. It then computes that
            # uncompiled, which is slower; but no compiling is timed
            run = with_stance("eager_on_recompile", run)
            # the clock; and a list of the positions that each call of the network computed.
            # (Other runs may take a few calls more or fewer: nfe and reads are of this one)
            with counting as calls:
                time, row["peak_bytes"] = peak_bytes(lambda: seconds(run, device), device)
    except OutOfMemory:
        row["error"] = "does not fit in memory"
        return None
    if engine.counted:
        row["nfe"], row["reads"] = len(calls), sum(calls) / (B * L)
    elif engine.in_steps:
        row["nfe"] = row["reads"] = steps            # each step computes every position
    else:
        row["nfe"], row["reads"] = L, 1              # one token of each text per call
    return Timing(row, model_config, run, [time])


def main():
    config = parse_flags(BenchConfig, __doc__)
    device = start(config.device).device                             # one process
    # fills in what no flag says: preset small if there are no checkpoints, all others in
    # tools/bench_setup.py. Raises UserError at flags that contradict
    set_defaults(config, device, ENGINES)

    # what the hardware can do at this moment, for the roofline
    machines = {}
    for dtype in config.dtype:
        machines[dtype] = limits(device, getattr(torch, dtype))
        print(describe(machines[dtype]), flush=True)
    rows = bench(config, device, machines)
    # rows that did not fit in memory are results, too; but one must have fitted
    if all("error" in row for row in rows):
        raise UserError("nothing fits in memory; choose a smaller --batch, --length or "
                        "--preset")
    if config.plot:
        figures.draw_latency(rows, config.plot)                      # as the paper's figure


if __name__ == "__main__":
    command(main)
