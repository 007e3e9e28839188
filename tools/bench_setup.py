"""What bench.py compares: its flags, what they are where they are not given; models,
trained or random; the rows of its table, before they are measured; how good texts are."""
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
from tools.machine import (bfloat16_gain, can_compile, prepare, warn_of_emulation,
                           with_stance)

VOCAB = 50257                            # of random weights: GPT-2's
WRITTEN = 32                             # texts at a time, for quality
GAIN = 1.2                               # bfloat16 is timed, too, where it gains this
# what a table shows of a row, and how
SPEED = (("engine", "<16"), ("model", "<17"), ("steps", ">5"), ("batch", ">6"),
         ("length", ">7"), ("seconds", ">8.3f"), ("spread", ">7.0%"),
         ("tokens/s", ">9,.0f"), ("vs AR", ">6.2f"), ("roofline", ">9.0%"),
         ("peak MB", ">8,.0f"), ("nfe", ">5"), ("reads", ">6.1f"))
QUALITY = (("gen_ppl", ">8.2f"), ("entropy", ">8.2f"), ("of all", ">7.2f"))


@dataclass
class BenchConfig:
    """The flags of bench.py; set_defaults fills in what is not given."""
    # what is compared
    preset: list[str] | None = flag(
        None, "random weights of these sizes [checkpoints, or small]",
        choices=list(PRESETS))
    checkpoint: list[str] | None = flag(
        None, "files to compare, such as tools.convert's [see --out]")
    out: str | None = flag(None, "folder of checkpoints [the newest under out/]")
    engine: list[str] | None = flag(
        None, "[ar diffusion diffusion-kv, diffusion-naive at the first batch]; the others "
        "are ar-exact and diffusion-exact")
    # in which shapes
    batch: list[int] | None = flag(None, "sequences [1 8 32; random 1 4]", low=1)
    length: list[int] | None = flag(
        None, "tokens of a text [the checkpoints' context; random weights 128]", low=2)
    steps: list[int] | None = flag(None, "of diffusion [4 8 16 32 64; random to 32]", low=1)
    repeats: int = flag(3, "timed runs of each, but of diffusion-naive one", low=1)
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


def set_defaults(config, device, known):
    """Fill in the flags that were not given. known: names of engines. Raises UserError on
    what cannot be done."""
    for name in config.engine or []:
        if name not in known:
            raise UserError(f"--engine {name}: give some of {', '.join(known)}")
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
    config.batch = sorted(config.batch)

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


def default_dtypes(device):
    """In which types of numbers each engine is timed: AR's and diffusion's best may
    differ."""
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

def models_of(config, device, preset, engines):
    """{dtype: {attention: {label: model}}}: random ones of a preset, or (None) checkpoints.
    engines: bench.ENGINES."""
    models = {}
    for dtype in config.dtype:
        if preset is None:
            models[dtype] = checkpoints(config, device, dtype)
        else:
            needed = {engines[name].attention for name in config.engine}
            models[dtype] = random_weights(config, device, preset, needed, dtype)
    return models


def files(config):
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
    if len(paths) == 1 and paths[0].exists():
        raise UserError(f"{folder} has no teacher.pt or round file beside ar.pt; run "
                        "distill.py or choose another --out")
    return paths


def checkpoints(config, device, dtype):
    """The models of files(config), {attention: {label: model}}. Raises UserError where they
    cannot be compared."""
    models = {}
    for name, path in figures.names(files(config)).items():
        models[name], _ = load_model(path)
    # texts of one length that all can write, of the same tokens
    context = min(model.config.context for model in models.values())
    config.length = config.length or [context]
    if max(config.length) > context:
        raise UserError(f"--length {max(config.length)} is beyond the context of the "
                        f"checkpoints, {context} tokens")
    vocab = {name: model.config.vocab for name, model in models.items()}
    if len(set(vocab.values())) > 1:
        raise UserError(f"checkpoints of different vocabularies, {vocab}, cannot be "
                        "compared; choose another --out")

    found = {attention: {} for attention in CHOICES["attention"]}
    for label, model in models.items():
        if model.config.causal and "judge" not in found:
            # the first AR model, in float32 whatever is timed
            found["judge"] = {label: copy.deepcopy(model).to(device).eval()}
        prepare(model, dtype, config.compile, device)
        found[model.config.attention][label] = model
    return found


def random_weights(config, device, preset, needed, dtype):
    """Models of random weights in the size of a preset, {attention: {"random": model}}, of
    each attention that is `needed`."""
    sizes = dict(PRESETS[preset])
    sizes["context"] = max(*config.length, sizes["context"])
    seed_all("bench", preset)
    models = {}
    for attention in CHOICES["attention"]:
        if attention in needed:
            model = Transformer(ModelConfig(VOCAB, attention=attention, **sizes))
            prepare(model, dtype, config.compile, device)
            models[attention] = {"random": model}
    return models


# ---- the rows

def rows_of(config, models, preset, B, L, engines):
    """What is to be measured at batch B and length L: [(row, model)], the rows not yet
    filled. models: see models_of; engines: bench.ENGINES."""
    rows = []
    for name, dtype in itertools.product(config.engine, config.dtype):
        engine = engines[name]
        chosen = list(models[dtype].get(engine.attention, {}).items())
        if engine.slow:
            # beside others it is timed once: at the first batch size, in one dtype, of the
            # last student
            first = B == config.batch[0] and dtype == config.dtype[0]
            if len(config.engine) > 1 and not first:
                continue
            chosen = chosen[-1:]
        all_steps = config.steps if engine.in_steps else [None]
        for (label, model), steps in itertools.product(chosen, all_steps):
            params = sum(p.numel() for p in model.parameters())      # all weights
            row = dict(engine=name, model=label, preset=preset, params=params, steps=steps,
                       batch=B, length=L, dtype=dtype)
            rows.append((row, model))    # times follow in bench.measure
    return rows


def fill_quality(config, group, models, known, engines):
    """Perplexity and entropies of the texts that each row's engine writes, into the rows.
    The folder's AR model, if there is one, is the judge. known: what is measured already;
    at another batch size it is the same."""
    judges = models[config.dtype[0]].get("judge")        # {label: model}
    if not judges:
        return
    judge = next(iter(judges.values()))
    for row, model in group:
        engine, L, steps = engines[row["engine"]], row["length"], row["steps"]
        if "error" in row or engine.slow:
            continue
        key = row["engine"], row["model"], row["dtype"], L, steps
        if key not in known:
            seed_all("quality", L, steps)
            # WRITTEN texts at a time, whatever the row's batch size: this is not timed, and
            # to compile for another size would take longer than to write them
            write = with_stance("force_eager", engine.make(model, WRITTEN, L, steps, False))
            known[key] = quality(judge, write, config.samples)
        row.update(known[key])


def quality(judge, write, n):
    """Perplexity of n texts under the AR model `judge`, and both entropies, without their
    standard errors. write() -> WRITTEN texts (WRITTEN, L)."""
    texts = []
    while len(texts) * WRITTEN < n:
        texts.append(write())
    x = torch.cat(texts)[:n]                                         # (n, L)
    gen, _ = gen_ppl(make_judge(judge), x)                           # exp of mean nats
    x, vocab = x.cpu(), judge.config.vocab               # all models here share it
    within, _ = entropy(x, vocab)                                    # in each text
    pooled, _ = pooled_entropy(x, vocab)                             # of all texts
    return {"gen_ppl": gen, "entropy": within, "of all": pooled}
