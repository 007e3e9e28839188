"""Quality: likelihood, samples, diversity, and last words of any checkpoints, side by side.

    python -m tools.evaluate out/stories-nano/teacher.pt out/stories-nano/round7.pt --steps 8 32
    python -m tools.evaluate out/stories-nano/round7.pt --frontier --plot frontier.png
    python -m tools.evaluate out/stories-nano/teacher.pt --steps 1024 --joint --precision 32

Every number has a standard error, every row says how its samples were drawn. Perplexity can be
bought by repetition: rows whose entropy is too low are marked, and --frontier compares models at
equal entropy. The same seed gives the same table, on one process or on several.
"""
import dataclasses
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common import command, flag, load_model, package, parse_flags, seed_all, start
from data.dataset import Data, load_data, make_tokenizer
from data.files import UserError, read_text, write_json
from data.lambada.prepare import parse_lambada
from sample import (BATCH, draw_samples, exp, make_judge, mean_se, perplexity, put, sample_row,
                    spread)
from tools import figures, likelihood
from tools.metrics import diversity, mauve, self_bleu

TEMPERATURES = [0.7, 0.8, 0.9, 1.0, 1.1]     # of the frontier


@dataclasses.dataclass
class EvaluateConfig:
    checkpoint: list[str]            # the arguments without --
    steps: list[int] | None = flag(None, "diffusion steps [8 16 32]", low=1)
    judge: str | None = flag(None, "AR checkpoint that reads the samples [ar.pt beside the first "
                             "checkpoint]")
    teacher: str | None = flag(None, "checkpoint of those given whose entropy the others are "
                               "measured by [the first that is not distilled]")
    dataset: str | None = flag(None, "folder of a dataset, or a text file [the first checkpoint's]")
    samples: int = flag(256, "texts for each row", low=3)
    length: int | None = flag(None, "tokens of a text [the least context]", low=9)
    sequences: int | None = flag(None, "pieces of val.bin for the likelihood [32,768 tokens, but "
                                 "32 at least]", low=2)
    temperature: list[float] | None = flag(None, "divides the logits [1]", low=0.01)
    frontier: bool = flag(False, "perplexity at equal entropy, from temperatures 0.7 to 1.1")
    precision: int = flag(64, "bits of the token draw", choices=[32, 64])
    likelihood_only: bool = flag(False, "no samples; then no judge is needed")
    joint: bool = flag(False, "draw tokens and whether they open together, as public code does")
    lambada: str | None = flag(None, "JSONL file of passages to complete by the last word")
    last_word: str | None = flag(None, "text file; its passages of 20 words or more, likewise")
    tasks: int | None = flag(None, "passages at most [all]", low=2)
    continuations: int = flag(0, "of each prompt from val.bin, see --prompts", low=0)
    prompts: int = flag(64, "prompts to continue", low=2)
    prompt_tokens: int | None = flag(None, "tokens of a prompt [half the text's]", low=1)
    mauve: str | None = flag(None, "converted GPT-2 whose features compare the continuations with "
                             "the data's (needs mauve-text)")
    plot: str | None = flag(None, "picture of the frontier (needs matplotlib)")
    json: str | None = flag(None, "file for everything measured")
    seed: int = flag(0, "seed of the samples")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])


# ---- samples

def evaluate(*args, more=False, **how):
    """sample_row, with more by metrics.diversity too."""
    row, x = sample_row(*args, **how)
    if more:
        began = time.time()
        row |= diversity(x, args[3])
        row["seconds"] = round(row["seconds"] + time.time() - began, 2)
    return row


# ---- likelihood and last words

def likelihood_row(name, model, x, p, draws=8):
    """Nats per token of x (n, L): a diffusion model's bound in two estimates, or AR's exact value.
    All models meet the same noise. Perplexity is exp of the better-known one."""
    def batch(i):
        seed_all("likelihood", i)
        part = x[i:i + BATCH].to(p.device)
        if model.config.causal:
            return {"nll": likelihood.exact(model, part, model.mask_id).cpu()}
        return {f.__name__: f(model, part, model.mask_id, draws).cpu()
                for f in (likelihood.bound, likelihood.any_order)}
    parts = spread(range(0, len(x), BATCH), batch, p, f"{name}, likelihood")
    row = {"model": name, "sequences": len(x), "tokens": x.numel()}
    for key in parts[0]:
        put(row, key, mean_se(torch.cat([part[key] for part in parts])))
    best = min(parts[0], key=lambda key: row[key + "_se"])
    put(row, "ppl", (exp(row[best]), exp(row[best]) * row[best + "_se"]))
    return row


def last_word_row(name, model, tasks, p):
    """The accuracies and the perplexity of the last words of tasks: see likelihood.last_word."""
    def batch(part):
        numbers, x, w = part
        seed_all("last word", numbers)
        found = likelihood.answer(model, x.to(p.device), w)
        return {key: values.cpu() for key, values in found.items()}
    answers = spread(likelihood.batches(tasks, BATCH), batch, p, f"{name}, last words")
    return {"model": name, **likelihood.last_word(answers, tasks)}


def continuation_row(name, model, judge, gpt2, data, steps, x, c, p, **how):
    """Conditional text: c.continuations of the first c.prompt_tokens tokens of each of x (n, L), of
    as many tokens as x has; model None: x itself. Perplexity under the judge given the prompt,
    self-BLEU among the continuations of a prompt, MAUVE against x where gpt2 is given."""
    row, P, m = {"model": name, "steps": steps}, c.prompt_tokens, c.continuations
    y, real = x, x.repeat_interleave(m, 0)
    if model is not None:
        y = draw_samples(model, len(real), steps, p, c.seed, f"{name}, continuations",
                         length=x.shape[1], prompts=real[:, :P], **how)
        put(row, "self_bleu4", mean_se(torch.tensor(
            [self_bleu(part[:, P:])[-1][0] for part in y.split(m)])) if m > 2 else (None, None))
    nats, tokens = (part.view(len(x), -1).sum(1) for part in judge(y.to(p.device), P))
    put(row, "gen_ppl", perplexity(nats, tokens))        # a prompt counts once
    if gpt2 and model is not None:
        put(row, "mauve", mauve(gpt2, x, y, data.tokenizer))
    return row | {"prompts": len(x), "prompt_tokens": P, "texts": len(y)}


# ---- the command

def open_data(c, content, tokenizer, p):
    """The dataset to measure on: a folder, or a text file in the tokens of the checkpoints, the
    first of which holds content. Raises UserError where it does not fit."""
    name = c.dataset or content["config"].get("dataset")
    if name is None:
        raise UserError(f"{c.checkpoint[0]} does not say what it was trained on; give --dataset")
    if Path(name).exists() and not Path(name).is_dir():      # a pipe will do
        ids = np.array(tokenizer.encode(read_text(name)))
        return Data(Path(name), ids[:0], ids, tokenizer, None, False, None)
    data = load_data(name, p)
    if data.tokenizer.spec != tokenizer.spec:
        raise UserError(f"{c.checkpoint[0]} knows other tokens than {data.folder}; give --dataset "
                        "a folder of the same tokens, or a text file")
    if c.dataset is None and content.get("data") not in (None, data.fingerprint):
        raise UserError(f"{c.checkpoint[0]} was trained on other text than {data.folder} holds now; "
                        "to measure on what is there, give --dataset too")
    return data


def with_oracle(data, length):
    """data as texts of `length` tokens can be measured, and a note for the user, or None: pieces of
    a row are no texts that an oracle could judge."""
    if data.oracle and length != data.stride:
        return dataclasses.replace(data, oracle=None), (
            f"texts of {length} tokens are pieces of {data.folder.name}'s rows of {data.stride}: "
            "whether they are valid is not measured")
    return data, None


def open_models(c, p):
    """{name: (model, content)} of the checkpoints. Raises UserError where they differ in tokens."""
    models = {name: load_model(path, p.device)
              for name, path in figures.names(c.checkpoint).items()}
    specs = [content["tokenizer"] for _, content in models.values()]
    if any(spec != specs[0] for spec in specs):
        raise UserError("the checkpoints know different tokens; evaluate them one by one")
    return models


def open_judge(c, data, p):
    """(judge, its model where it has the same tokens, what it reads), from --judge or ar.pt beside
    the first checkpoint."""
    path = Path(c.judge) if c.judge else Path(c.checkpoint[0]).with_name("ar.pt")
    if not c.judge and c.likelihood_only:
        return None, None, "none"
    if not c.judge and not path.exists():
        raise UserError(f"no {path} to judge the samples; give an AR checkpoint as --judge")
    model, content = load_model(path, p.device, ("ar",))
    same = content["tokenizer"] == data.tokenizer.spec
    if same and c.length > model.config.context:
        raise UserError(f"{path} reads at most {model.config.context} tokens, the texts have "
                        f"{c.length}; give another --judge, or --length")
    judge = make_judge(model, content["tokenizer"], data.tokenizer)
    try:
        judge(data.pieces(1, c.length).to(p.device))
    except UserError as e:                   # a vocabulary of words
        raise UserError(f"{path} cannot read these texts ({e}); give another --judge")
    return (judge, model if same else None,
            f"{path}, " + ("in tokens" if same else "re-tokenised: in its own tokens"))


def settle(c, models, data):
    """Fill in the flags that were not given. Raises UserError on what does not fit together."""
    least = min(model.config.context for model, _ in models.values())
    c.length = c.length or min(least, data.stride or least)
    c.prompt_tokens = c.prompt_tokens or c.length // 2
    if c.length > least or data.stride and c.length > data.stride:
        raise UserError(f"--length {c.length} is beyond the context of {least} tokens, or a row of "
                        f"{data.folder}")
    if len(data.val) < 3 * (size := data.stride or c.length):    # errors need two, self-BLEU three
        raise UserError(f"{data.folder}: {len(data.val)} tokens to validate with, fewer than three "
                        f"texts of {size}; use more text or a smaller --length")
    if c.prompt_tokens >= c.length:
        raise UserError(f"--prompt_tokens {c.prompt_tokens} leaves nothing of a text of {c.length} "
                        "tokens to write; give fewer")
    if c.mauve and not c.continuations:
        raise UserError("--mauve compares continuations; give --continuations too, such as 5")
    figures.check_picture(c.plot)
    if c.mauve:
        package("mauve")
    c.temperature = c.temperature or (TEMPERATURES if c.frontier or c.plot else [1.0])
    c.steps = sorted(c.steps or [8, 16, 32])
    c.sequences = c.sequences or max(32, 2 ** 15 // c.length)
    if c.joint and any(model.config.attention == "reveal" for model, _ in models.values()):
        raise UserError("--joint is not for models with attention reveal, whose order it does not "
                        "keep; leave it out")


def teacher_of(c, models):
    """The name of the checkpoint that others are measured by: --teacher's, a file among those that
    are given, or the first that is not distilled, or None. Raises UserError."""
    if c.teacher:
        for name, path in figures.names(c.checkpoint).items():
            if path.resolve() == Path(c.teacher).resolve():
                return name
        raise UserError(f"--teacher {c.teacher} is not among the checkpoints; name it there too")
    return next((name for name, (_, content) in models.items() if content["kind"] == "mdlm"), None)


def open_tasks(c, tokenizer, context):
    """{"lambada" or "last_word": tasks} of the files that are given, for models that read at most
    `context` tokens."""
    found = {}
    if c.lambada:
        texts = parse_lambada(read_text(c.lambada), c.lambada)[:c.tasks]
        found["lambada"] = likelihood.make_tasks(texts, tokenizer, context)
    if c.last_word:
        texts = likelihood.passages(read_text(c.last_word))[:c.tasks]
        found["last_word"] = likelihood.make_tasks(texts, tokenizer, context, cut=True)
    for part, tasks in found.items():
        if len(tasks) < 2:
            raise UserError(f"--{part} {getattr(c, part)} has a single passage, and no standard "
                            "error; give more")
    return found


def fill(c, p, models, judge, judge_model, data, results, save):
    """Measure everything that c asks for, part by part, into results; save() after each row."""
    readers = models | ({"judge": judge_model} if judge_model else {})
    context = min(model.config.context for model in readers.values())
    tasks, x = open_tasks(c, data.tokenizer, context), data.pieces(c.sequences, c.length)
    gpt2 = load_model(c.mauve, p.device, ("ar",)) if c.mauve else None
    for name, model in readers.items():
        results["likelihood"].append(likelihood_row(name, model, x, p))
        save()
    for part, some in tasks.items():
        results[part] = []
        for name, model in readers.items():
            results[part].append(last_word_row(name, model, some, p))
            save()
    if c.likelihood_only:
        return
    how = {"precision": c.precision, "length": c.length}
    for name, model in {"data": None, **models}.items():
        diffusion = model is not None and not model.config.causal
        for steps in c.steps if diffusion else [None]:
            for T in c.temperature if model is not None else [1.0]:
                results["samples"].append(evaluate(
                    name, model, judge, data, steps, c.samples, p, c.seed, c.length, more=True,
                    temperature=T, joint=c.joint and diffusion, **how))
                figures.mark(results["samples"], results["teacher"])
                save()
    if len(c.temperature) > 1:
        results["frontier"] = figures.frontier(results["samples"], results["teacher"])
    if c.continuations:
        results["continuations"] = []
        gpt2 = gpt2 and (gpt2[0], make_tokenizer(gpt2[1]["tokenizer"]))
        x = data.pieces(c.prompts, c.length)
        for name, model in {"data": None, **models}.items():
            diffusion = model is not None and not model.config.causal
            for steps in c.steps if diffusion else [None]:
                results["continuations"].append(continuation_row(
                    name, model, judge, gpt2, data, steps, x, c, p, precision=c.precision,
                    temperature=c.temperature[0], joint=c.joint and diffusion))
                save()


def main():
    c = parse_flags(EvaluateConfig, __doc__, checkpoint="of train.py, distill.py or tools.convert")
    p = start(c.device)
    models = open_models(c, p)
    content = next(iter(models.values()))[1]
    tokenizer = make_tokenizer(content["tokenizer"])
    data = open_data(c, content, tokenizer, p)
    settle(c, models, data)
    data, note = with_oracle(data, c.length)
    teacher = teacher_of(c, models)
    judge, judge_model, judged = open_judge(c, data, p)
    results = {"judge": judged, "data": data.folder.name, "teacher": teacher,
               "argv": sys.argv[1:], "torch": torch.__version__,
               "python": platform.python_version(), "likelihood": [], "samples": []}

    def save():
        if c.json and p.rank == 0:
            write_json(c.json, results)

    fill(c, p, {name: model for name, (model, _) in models.items()}, judge, judge_model, data,
         results, save)
    save()
    if p.rank == 0:
        print(f"{data.folder.name}; judge: {judged}; texts of {c.length} tokens, seed {c.seed}"
              + ", joint draws" * c.joint + (f"\n{note}" if note else "") + "\n")
        print(figures.show(results))
        if c.plot:
            figures.draw_frontier(results["samples"], c.plot)


if __name__ == "__main__":
    command(main)
