"""What bench.py needs around its timing: the flags and their defaults, the models, the rows
that are to be measured, and how good the texts are."""
import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from common import seed_all
from data.checkpoints import load_model
from data.files import UserError
from data.measures import entropy, gen_ppl, make_judge, pooled_entropy
from data.results import round_files
from data.script import device_flag, flag
from model import CHOICES, PRESETS, ModelConfig, Transformer
from tools import figures
from tools.compiled_ar import can_draw
from tools.fast_models import (bfloat16_gain, can_compile, prepare, warn_of_emulation,
                               with_stance)

VOCAB = 50257                            # of random weights: GPT-2's
QUALITY_BATCH = 32                       # texts at a time, where quality is measured
GAIN = 1.2               # bfloat16 is timed, too, if its products are this much faster
# what a table shows of a row, and how
SPEED = (("engine", "<16"), ("model", "<17"), ("steps", ">5"), ("batch", ">6"),
         ("length", ">7"), ("seconds", ">8.3f"), ("spread", ">7.0%"),
         ("tokens/s", ">9,.0f"), ("vs AR", ">6.2f"), ("roofline", ">9.0%"),
         ("peak MB", ">8,.0f"), ("nfe", ">5"), ("reads", ">6.1f"))
QUALITY = (("gen_ppl", ">8.2f"), ("entropy", ">8.2f"), ("of all", ">7.2f"))


@dataclass
class BenchConfig:
    """The flags of bench.py, [defaults] in brackets; set_defaults and set_length fill in
    what is not given."""
    # what is compared
    preset: list[str] | None = flag(
        None, "random weights of these sizes [checkpoints, or small]",
        choices=list(PRESETS))
    checkpoint: list[str] | None = flag(
        None, "files to compare, such as tools.convert's [see --out]")
    out: str | None = flag(None, "folder of checkpoints [the newest under out/]")
    engine: list[str] | None = flag(
        None, "[ar diffusion diffusion-kv, and at the smallest batch diffusion-naive]; the "
        "others are ar-exact and diffusion-exact")
    # in which shapes
    batch: list[int] | None = flag(None, "sequences [1 8 32; random 1 4]", low=1)
    length: list[int] | None = flag(
        None, "tokens of a text [the checkpoints' context; random weights 128]", low=2)
    steps: list[int] | None = flag(
        None, "of diffusion [4 8 16 32 64; random weights 4 8 16 32]", low=1)
    repeats: int = flag(3, "timed runs of each engine, one of diffusion-naive", low=1)
    samples: int = flag(128, "texts for perplexity and entropy", low=2)
    # where and how
    device: str = device_flag()
    dtype: list[str] | None = flag(
        None, "one or both [float32; and bfloat16 where this CPU gains by it; on a GPU "
        "bfloat16]", choices=["float32", "bfloat16"])
    threads: int | None = flag(None, "CPU threads [PyTorch's choice]", low=1)
    compile: bool | None = flag(
        None, "torch.compile for AR's decoding step, diffusion's network or whole steps "
        "[where there is a C++ compiler]")
    json: str | None = flag(None, "file for the rows")
    plot: str | None = flag(None, "picture of perplexity against latency (needs "
                                  "matplotlib)")


def set_defaults(config, device, engines):
    """Fill in the flags that were not given. engines: bench.ENGINES. Raises UserError on
    what cannot be done."""
    for name in config.engine or []:
        if name not in engines:
            raise UserError(f"--engine {name}: give some of {', '.join(engines)}")
    if config.preset and (config.checkpoint or config.out):
        raise UserError("--preset means random weights: give no --checkpoint or --out "
                        "beside it")
    # trained weights, where there are some and no others are asked for
    found = any(Path("out").glob("*/ar.pt"))
    trained = not config.preset and bool(config.checkpoint or config.out or found)
    if config.plot and not trained:
        raise UserError("--plot is of trained weights: give --out or --checkpoint, and no "
                        "--preset")
    figures.check_picture(config.plot)               # a package that is needed at the end

    # what is measured
    config.engine = config.engine or ["ar", "diffusion", "diffusion-kv", "diffusion-naive"]
    if trained:
        defaults = dict(preset=[], batch=[1, 8, 32], length=None, steps=[4, 8, 16, 32, 64])
    else:
        defaults = dict(preset=["small"], batch=[1, 4], length=[128], steps=[4, 8, 16, 32])
    for name, value in defaults.items():
        setattr(config, name, getattr(config, name) or value)
    config.batch = sorted(set(config.batch))

    # how it runs
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.dtype:
        config.dtype = list(dict.fromkeys(config.dtype))             # each once
    else:
        config.dtype = default_dtypes(device)
    warn_of_emulation(config.dtype, device)
    if config.compile is None:
        config.compile = can_compile()
    # AR's compiled step draws, in float64. On a device that has none nothing is compiled,
    # so that AR and diffusion stay alike
    config.compile = config.compile and can_draw(device)


def default_dtypes(device):
    """The dtypes that each engine is timed in: a GPU's is bfloat16, a CPU's are both where
    bfloat16 gains, as it may do so for one engine and not for another."""
    if device.type == "cuda":
        return ["bfloat16"]
    if device.type == "cpu" and bfloat16_gain() > GAIN:
        return ["float32", "bfloat16"]
    return ["float32"]


def columns_of(config):
    """What the table shows: ((name, format), ...)."""
    columns = SPEED
    if not config.preset:                # random texts have no quality
        columns += QUALITY
    if len(config.dtype) > 1:
        columns = (columns[0], ("dtype", "<9"), *columns[1:])
    return columns


# ---- the models

def checkpoint_files(config):
    """The checkpoints to compare: --checkpoint, or AR, teacher and last student of a
    folder."""
    if config.checkpoint:
        return [Path(path) for path in config.checkpoint]
    # the folder that is given, or the one that was written last
    if config.out:
        folder = Path(config.out)
    else:
        ar_files = Path("out").glob("*/ar.pt")
        folder = max(ar_files, key=lambda path: path.stat().st_mtime).parent
    paths = [folder / "ar.pt"]
    if (folder / "teacher.pt").exists():
        paths.append(folder / "teacher.pt")
    rounds = round_files(folder)
    if rounds:
        paths.append(rounds[-1])
    # (without ar.pt, too, load_model has the better message)
    if len(paths) == 1 and paths[0].exists():
        raise UserError(f"{folder} has no teacher.pt or round file beside ar.pt; run "
                        "distill.py or choose another --out")
    return paths


def load_checkpoints(config):
    """The trained models to compare, {label: model}, on the CPU; {} with --preset. Raises
    UserError where they cannot be compared."""
    models = {}
    if config.preset:
        return models
    for label, path in figures.names(checkpoint_files(config)).items():
        models[label], _ = load_model(path)
    vocab = {label: model.config.vocab for label, model in models.items()}
    if len(set(vocab.values())) > 1:
        raise UserError(f"checkpoints of different vocabularies, {vocab}, cannot be "
                        "compared; choose another --out")
    return models


def judge_of(trained, device):
    """The first AR model among the trained ones {label: model}, a copy in float32 whatever
    is timed; None if there is none. (So that model judges its own texts, too.)"""
    for model in trained.values():
        if model.config.causal:
            return copy.deepcopy(model).to(device).eval()
    return None


def set_length(config, trained):
    """Fill in --length, if it is not given: the most that all trained models {label: model}
    can write. Raises UserError if it is too long for them."""
    if not trained:
        return
    context = min(model.config.context for model in trained.values())
    config.length = config.length or [context]
    if max(config.length) > context:
        raise UserError(f"--length {max(config.length)} is beyond the context of the "
                        f"checkpoints, {context} tokens")


def models_of(config, device, preset, trained, engines):
    """What is timed, {dtype: {attention: {label: model}}}: the trained models {label:
    model}, or those of a preset with random weights. engines: bench.ENGINES."""
    models = {}
    for dtype in config.dtype:
        found = trained.items()
        if preset:
            found = random_models(config, preset, engines)
        models[dtype] = {attention: {} for attention in CHOICES["attention"]}
        for label, model in found:
            if not preset:               # the trained ones stay as they are
                model = copy.deepcopy(model)
            prepare(model, dtype, config.compile, device)
            models[dtype][model.config.attention][label] = model
    return models


def random_models(config, preset, engines):
    """Yields (label, model): a model of the preset's size, with random weights, for each
    attention that an engine of the config needs."""
    needed = {engines[name].attention for name in config.engine}
    seed_all("bench", preset)
    for attention in CHOICES["attention"]:
        if attention in needed:
            shape = shape_of(preset, attention, max(config.length))
            yield "random", Transformer(shape)


def shape_of(preset, attention, length):
    """The ModelConfig of a preset, its context at least `length`."""
    sizes = dict(PRESETS[preset])
    sizes["context"] = max(length, sizes["context"])
    return ModelConfig(VOCAB, attention=attention, **sizes)


# ---- the rows

def rows_of(config, models, preset, B, L, engines):
    """What is to be measured at batch B and length L: [(row, engine, model)], the rows not
    yet filled. models: see models_of; engines: bench.ENGINES."""
    group = []
    for name, dtype in itertools.product(config.engine, config.dtype):
        engine = engines[name]
        chosen = list(models[dtype][engine.attention].items())
        if engine.slow and len(config.engine) > 1:
            # beside others: at the smallest batch, in one dtype
            if B != config.batch[0] or dtype != config.dtype[0]:
                continue
        if engine.slow:
            chosen = chosen[-1:]                         # the last student
        all_steps = config.steps if engine.in_steps else [None]
        for label, model in chosen:
            params = sum(p.numel() for p in model.parameters())
            for steps in all_steps:
                row = dict(engine=name, model=label, preset=preset, params=params,
                           steps=steps, batch=B, length=L, dtype=dtype)
                group.append((row, engine, model))
    return group


# ---- how good texts are

def fill_quality(config, group, judge, known):
    """Perplexity and entropies of the texts that each row's engine writes, into the rows of
    a group, see rows_of. judge: an AR model. known: what is measured already; at another
    batch size it is the same."""
    for row, engine, model in group:
        if "error" in row or engine.slow:
            continue
        L, steps = row["length"], row["steps"]
        key = row["engine"], row["model"], row["dtype"], L, steps
        if key not in known:
            seed_all("quality", L, steps)
            # QUALITY_BATCH at a time, and uncompiled: to compile for another size would
            # take longer than to write them
            write = engine.make(model, QUALITY_BATCH, L, steps, False)
            write = with_stance("force_eager", write)
            known[key] = quality(judge, write, config.samples)
        row.update(known[key])


def quality(judge, write, n):
    """Of n texts: perplexity under the AR model `judge`, entropy within a text and of all.
    write() -> QUALITY_BATCH texts (QUALITY_BATCH, L)."""
    texts = []
    while len(texts) * QUALITY_BATCH < n:
        texts.append(write())
    x = torch.cat(texts)[:n]                                         # (n, L)
    # (without their standard errors)
    gen, _ = gen_ppl(make_judge(judge), x)               # exp of the mean nats per token
    x, vocab = x.cpu(), judge.config.vocab               # all models here share it
    within, _ = entropy(x, vocab)
    pooled, _ = pooled_entropy(x, vocab)
    return {"gen_ppl": gen, "entropy": within, "of all": pooled}
