"""What bench.py compares: its flags, what they are where they are not given, and models,
trained or random; and the columns of its table."""
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from common import seed_all
from data.checkpoints import load_model
from data.files import UserError
from data.measures import entropy, gen_ppl, make_judge, pooled_entropy
from data.results import round_files
from data.script import device_flag, flag, package
from model import CHOICES, PRESETS, ModelConfig, Transformer
from tools import figures
from tools.machine import prepare, transformers_gpt2, warn_of_emulation

VOCAB = 50257                            # of random weights: GPT-2's
WRITTEN = 32                             # texts at a time, for quality
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
        None, "[ar diffusion diffusion-kv, diffusion-naive at the first batch]; "
        "transformers is its GPT-2, greedy; ar-exact, diffusion-exact: see above")
    # in which shapes
    batch: list[int] | None = flag(None, "sequences [1 8 32; random 1 4]", low=1)
    length: list[int] | None = flag(
        None, "tokens of a text [the checkpoints' context; random weights 128]", low=2)
    steps: list[int] | None = flag(None, "of diffusion [4 8 16 32 64; random to 32]", low=1)
    repeats: int = flag(3, "timed runs of each, but of diffusion-naive one", low=1)
    samples: int = flag(128, "texts for perplexity and entropy", low=2)
    # where and how
    device: str = device_flag()
    dtype: str | None = flag(
        None, "[float32; on a GPU bfloat16]", choices=["float32", "bfloat16"])
    threads: int | None = flag(None, "CPU threads [PyTorch's choice]", low=1)
    compile: bool | None = flag(
        None, "torch.compile for AR's decoding step and diffusion's blocks [where there is "
        "a C++ compiler]")
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
    engines = config.engine or ["ar", "diffusion", "diffusion-kv", "diffusion-naive"]
    not_trained = config.plot and not trained
    not_random = "transformers" in engines and trained
    if not_trained or not_random:
        raise UserError("--plot is of trained weights (give --out), --engine transformers "
                        "of random ones (give --preset)")
    # packages that are needed only at the end
    figures.check_picture(config.plot)
    if "transformers" in engines:
        package("transformers")

    # what is measured
    config.engine = engines
    if trained:
        defaults = dict(preset=[], batch=[1, 8, 32], length=None, steps=[4, 8, 16, 32, 64])
    else:
        defaults = dict(preset=["small"], batch=[1, 4], length=[128], steps=[4, 8, 16, 32])
    for name, value in defaults.items():
        setattr(config, name, getattr(config, name) or value)
    config.batch = sorted(config.batch)

    # how it runs
    if config.dtype is None:
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    warn_of_emulation(config.dtype, device)
    if config.compile is None:
        config.compile = bool(shutil.which("g++"))
    if config.threads:
        torch.set_num_threads(config.threads)


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


def checkpoints(config, device):
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
        prepare(model, config.dtype, config.compile, device)
        found[model.config.attention][label] = model
    return found


def random_weights(config, device, preset, needed):
    """Models of random weights in the size of a preset, {attention: {"random": model}}, of
    each attention that is `needed`; among these may be "transformers", that package's."""
    sizes = dict(PRESETS[preset])
    sizes["context"] = max(*config.length, sizes["context"])
    seed_all("bench", preset)
    models = {}
    for attention in CHOICES["attention"]:
        if attention in needed:
            model = Transformer(ModelConfig(VOCAB, attention=attention, **sizes))
            prepare(model, config.dtype, config.compile, device)
            models[attention] = {"random": model}
    if "transformers" in needed:
        shape = ModelConfig(VOCAB, attention="causal", **sizes)
        models["transformers"] = {"random": transformers_gpt2(shape, device, config.dtype)}
    return models


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
