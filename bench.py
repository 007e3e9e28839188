"""Speed: autoregressive decoding with a KV cache against diffusion, and where each of them wins.

    python bench.py                          # the newest checkpoints under out/, or random weights
    python bench.py --preset small --batch 1 8 --length 1024 --steps 8 16 32
    python bench.py train --preset small --batch 2           # training steps: see bench_train.py

Both sides run as fast as this code can: AR with a static cache and a compiled decoding step,
diffusion with diffusion.py's sampler; "diffusion-naive" is the papers' sampler, word by word. Runs
alternate, warm-up apart. Roofline is a share of the bandwidth (AR) or of the rate of matrix
products (diffusion) that the hardware shows in the same run.
"""
import functools
import itertools
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (Processes, command, flag, load_model, package, parse_flags, seed_all,
                    start)
from data.files import UserError, write_json
from data.measures import entropy, gen_ppl, make_judge, pooled_entropy
from diffusion import categorical, sample, sample_joint
from model import PRESETS, KVCache, ModelConfig, Transformer, decode, generate
from sample import Sampling, draw_samples
from tools import bench_train, figures
from tools.machine import (compiled_decode, describe, fill_times, first_run, header, least_memory,
                           limits, line, prepare, roofline, seconds, transformers_gpt2)

COLUMNS = (("engine", "<16"), ("model", "<17"), ("steps", ">5"), ("batch", ">6"), ("length", ">7"),
           ("seconds", ">8.3f"), ("spread", ">7.0%"), ("tokens/s", ">9,.0f"), ("vs AR", ">6.2f"),
           ("roofline", ">9.0%"), ("peak MB", ">8,.0f"), ("nfe", ">5"), ("gen_ppl", ">8.2f"),
           ("entropy", ">8.2f"), ("of all", ">7.2f"))
ENGINES = ["ar", "diffusion", "diffusion-kv", "diffusion-naive", "transformers"]
KINDS = {"ar": "causal", "diffusion": "full", "diffusion-kv": "reveal"}      # whose attention is
VOCAB, GRAIN = 50257, {"cpu": 16, "cuda": 128}       # of random weights; see model.generate


@dataclass
class BenchConfig:
    preset: list[str] | None = flag(None, "random weights of these sizes [checkpoints, or small]",
                                    choices=list(PRESETS))
    checkpoint: list[str] | None = flag(None, "files to compare, such as tools.convert's [see --out]")
    out: str | None = flag(None, "folder of checkpoints [the newest under out/]")
    engine: list[str] | None = flag(None, "[ar diffusion diffusion-kv, diffusion-naive at the "
                                    "first batch]; transformers is its GPT-2, greedy",
                                    choices=ENGINES)
    batch: list[int] | None = flag(None, "sequences [1 8 32; random 1 4; train 2]", low=1)
    length: list[int] | None = flag(None, "tokens of a text [the checkpoints' context; random "
                                    "weights 128; train 1024]", low=2)
    steps: list[int] | None = flag(None, "of diffusion [4 8 16 32 64; random to 32]", low=1)
    repeats: int = flag(3, "timed runs of each, but of diffusion-naive one", low=1)
    samples: int = flag(128, "texts for perplexity and entropy", low=2)
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])
    dtype: str | None = flag(None, "[float32; on a GPU bfloat16]", choices=["float32", "bfloat16"])
    threads: int | None = flag(None, "CPU threads [PyTorch's choice]", low=1)
    compile: bool | None = flag(None, "torch.compile for AR's decoding step and diffusion's blocks "
                                "[where there is a C++ compiler]")
    json: str | None = flag(None, "file for the rows")
    plot: str | None = flag(None, "picture of perplexity against latency (needs matplotlib)")


# ---- the engines

def engine(row, model, step, steps):
    """A function that makes row's texts in so many steps. step: AR's, see model.generate."""
    name, B, L = row["engine"], row["batch"], row["length"]
    device = next(model.parameters()).device
    if name == "transformers":
        return lambda: model.generate(torch.zeros((B, 1), dtype=torch.long, device=device),
                                      max_new_tokens=L, min_new_tokens=L, do_sample=False,
                                      pad_token_id=0)
    if name == "ar":
        prompt, cache = torch.zeros((B, 0), dtype=torch.long, device=device), None
        if step is not decode:               # CUDA graphs want their memory at a fixed place
            cache = KVCache(model.config, B, L, device, torch.bfloat16 if model.bf16 else None)
            for stored in cache.k + cache.v:
                torch._dynamo.mark_static_address(stored)
        return lambda: generate(model, prompt, L, categorical, step, GRAIN[device.type], cache)
    z = torch.full((B, L), model.mask_id, device=device)
    sampler = sample_joint if name == "diffusion-naive" else sample
    return lambda: sampler(model, z, steps, model.mask_id)


# ---- what is measured

def files(c):
    """The checkpoints to compare: --checkpoint, or AR, teacher and last student of a folder."""
    if c.checkpoint:
        return [Path(path) for path in c.checkpoint]
    folders = {path.parent for path in Path("out").glob("*/ar.pt")}
    folder = Path(c.out) if c.out else max(folders, key=lambda f: (f / "ar.pt").stat().st_mtime)
    rounds = sorted(folder.glob("round*.pt"), key=lambda path: (len(path.name), path.name))
    others = [path for path in (folder / "teacher.pt", *rounds[-1:]) if path.exists()]
    if not others and (folder / "ar.pt").exists():
        raise UserError(f"{folder} has no teacher.pt or round file beside ar.pt; run distill.py or "
                        "choose another --out")
    return [folder / "ar.pt", *others]


def checkpoints(c, device):
    """The models of files(c), {engine: {name: model}}."""
    models = {name: load_model(path)[0] for name, path in figures.names(files(c)).items()}
    context = min(model.config.context for model in models.values())
    if max(c.length or [0]) > context:
        raise UserError(f"--length {max(c.length)} is beyond the context of the checkpoints, "
                        f"{context} tokens")
    c.length = c.length or [context]
    vocab = {name: model.config.vocab for name, model in models.items()}
    if len(set(vocab.values())) > 1:
        raise UserError(f"checkpoints of different vocabularies, {vocab}, cannot be compared; "
                        "choose another --out")
    for model in models.values():
        prepare(model, c.dtype, c.compile, device)
    return {engine: {name: model for name, model in models.items()
                     if model.config.attention == attention} for engine, attention in KINDS.items()}


def random_weights(c, device, preset):
    """The same for random weights in the size of a preset."""
    sizes = PRESETS[preset] | {"context": max(*c.length, PRESETS[preset]["context"])}
    seed_all("bench", preset)
    made = {name: {"random": prepare(Transformer(ModelConfig(
        VOCAB, attention=attention, **sizes)), c.dtype, c.compile, device)}
        for name, attention in KINDS.items() if name in c.engine or name == "diffusion"}
    if "transformers" in c.engine:
        shape = made["ar"]["random"].config
        made["transformers"] = {"random": transformers_gpt2(shape, device, c.dtype)}
    return made


def rows_of(c, models, preset, B, L):
    """What is to be measured at batch B and length L: [(row, model)], the rows not yet filled."""
    rows = []
    for name in c.engine:
        naive = name == "diffusion-naive"    # slow: one model at one batch size is enough
        if naive and B != c.batch[0] and len(c.engine) > 1:
            continue
        for label, model in list(models[name.removesuffix("-naive")].items())[-naive:]:
            params = sum(p.numel() for p in model.parameters())
            for steps in c.steps if name.startswith("diffusion") else [None]:
                rows.append((dict(engine=name, model=label, preset=preset, params=params,
                                  steps=steps, batch=B, length=L), model))
    return rows


def settled(run):
    """run without compiling anything: what is new to the compiler runs as it is."""
    def f():
        with torch.compiler.set_stance("eager_on_recompile"):
            return run()
    return f


@torch.no_grad()
def measure(c, group, device, machine):
    """Time the rows of a group, alternating, and fill them in."""
    torch.compiler.reset()                   # other batches would make this one's size dynamic
    step = compiled_decode(device, group[0][0]["batch"]) if c.compile else decode
    size = 2 if c.dtype == "bfloat16" else 4
    running = []
    for row, model in group:
        name, steps, calls = row["engine"], row["steps"], []
        shape = model.shape if name == "transformers" else model.config
        row |= dict(dtype=c.dtype, device=machine["device"], threads=machine["threads"])
        short, run = (engine(row, model, step, s) for s in (steps and min(2, steps), steps))
        if name == "diffusion-kv":           # a run may meet a shape that no run has met before
            short, run = (lambda run=run: run()), settled(run)
        if name in ("diffusion", "diffusion-kv"):        # count the calls of the last run
            hook = model.embed.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        times = first_run(row, run, lambda: (short(), calls.clear()),
                          least_memory(row, shape, size), device)
        if name in ("diffusion", "diffusion-kv"):
            hook.remove()
        if times:
            row["nfe"] = len(calls) or steps or row["length"]
            running.append((row, shape, run, times))
    for _ in range(c.repeats - 1):
        for row, _, run, times in running:
            if row["engine"] != "diffusion-naive":
                times.append(seconds(run, device))
    for row, shape, _, times in running:
        fill_times(row, times)
        row["roofline"] = roofline(row, shape, machine, size)


def quality(c, models, device, name, label, steps):
    """Perplexity under the AR model, and both entropies, of a trained model's texts."""
    x = draw_samples(models[name][label], c.samples, Sampling(steps), Processes(device))
    judge, = list(models["ar"].values())[:1]
    vocab = judge.config.vocab
    return (gen_ppl(make_judge(judge), x.to(device))[0], entropy(x, vocab)[0],
            pooled_entropy(x, vocab)[0])


# ---- what is shown

def overtakes(points):
    """In words: at which batch AR overtakes, between those measured by interpolation in logarithms.
    points: [(batch, how many times faster than AR)]."""
    for (b0, r0), (b1, r1) in zip(points, points[1:]):
        if r0 >= 1 > r1:
            share = math.log(r0) / math.log(r0 / r1)
            return f"overtakes at a batch of about {b0 * (b1 / b0) ** share:.1f}"
    return (f"is slower up to batch {points[-1][0]}" if points[0][1] >= 1 else
            f"is faster from batch {points[0][0]} on")


def against_ar(rows):
    """Fill in how many times faster than AR the rows are; say where AR overtakes, a line each."""
    done = [row for row in rows if "error" not in row]
    ar = {(r["preset"], r["length"], r["batch"]): r["seconds"] for r in done if r["engine"] == "ar"}
    points = {}
    for row in done:
        key = row["preset"], row["length"], row["batch"]
        row["vs_ar"] = ar[key] / row["seconds"] if key in ar else None
        if row["engine"] in ("diffusion", "diffusion-kv") and key in ar:
            name = row["model"] + "'s KV cache" * (row["engine"] == "diffusion-kv")
            points.setdefault((row["preset"], row["length"], name, row["steps"]),
                              []).append((row["batch"], row["vs_ar"]))
    return [f"{preset or 'trained'}, {length} tokens: AR {overtakes(ratios)} against {model} at "
            f"{steps} steps"
            for (preset, length, model, steps), ratios in points.items()]


def settle(c, train, device):
    """Fill in the flags that were not given. Raises UserError on what cannot be measured."""
    trained = not (c.preset or train) and bool(
        c.checkpoint or c.out or list(Path("out").glob("*/ar.pt")))
    engines = c.engine or ENGINES[:4]
    if not trained and c.plot or trained and "transformers" in engines:
        raise UserError("--plot is of trained weights (give --out), --engine transformers of "
                        "random ones (give --preset)")
    figures.check_picture(c.plot)
    if "transformers" in engines:
        package("transformers")
    c.dtype = c.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    c.compile = bool(shutil.which("g++")) if c.compile is None else c.compile
    c.engine, c.preset = engines, c.preset or ([] if trained else ["small"])
    c.batch = sorted(c.batch or ([2] if train else [1, 8, 32] if trained else [1, 4]))
    c.length = c.length or (None if trained else [1024 if train else 128])
    c.steps = c.steps or [4, 8, 16, 32] + [64] * trained
    torch.set_num_threads(c.threads or torch.get_num_threads())


def bench(c, device, machine):
    """Measure, save and print everything that c asks for; returns the rows."""
    rows = []
    columns = COLUMNS[:-3] if c.preset else COLUMNS
    print(header(columns))
    for preset in c.preset or [None]:
        models = random_weights(c, device, preset) if preset else checkpoints(c, device)
        judged = functools.cache(functools.partial(quality, c, models, device))
        for L, B in itertools.product(c.length, c.batch):
            group = rows_of(c, models, preset, B, L)
            if not group:
                raise UserError(f"no checkpoint here is for --engine {' '.join(c.engine)}")
            measure(c, group, device, machine)
            new = [row for row, _ in group]
            for row in new if models.get("ar") and not preset else []:
                if row["engine"] in models and "error" not in row:
                    of = row["engine"], row["model"], row["steps"]
                    row["gen_ppl"], row["entropy"], row["of all"] = judged(*of)
            against_ar(new)
            rows += new
            save(c, machine, rows)
            print("\n".join(line(row, columns) for row in new), flush=True)
    print("\n".join(against_ar(rows)))
    if any((row["steps"] or 0) > row["length"] for row in rows):
        print("more steps than tokens: steps that open nothing call no network (nfe)")
    return rows


def save(c, machine, rows):
    """Write the rows to --json, if it is given."""
    if c.json:
        results = {"argv": sys.argv[1:], "machine": machine, "rows": rows}
        write_json(c.json, results)


def main():
    train = sys.argv[1:2] == ["train"]
    c = parse_flags(BenchConfig, __doc__, sys.argv[1 + train:])
    device = start(c.device).device
    settle(c, train, device)
    machine = limits(device, getattr(torch, c.dtype))
    print(describe(machine), flush=True)
    rows = (bench_train.bench if train else bench)(c, device, machine)
    save(c, machine, rows)
    if all("error" in row for row in rows):
        raise UserError("nothing fits in memory; choose a smaller --batch, --length or --preset")
    if c.plot:
        figures.draw_latency(rows, c.plot)


if __name__ == "__main__":
    command(main)
