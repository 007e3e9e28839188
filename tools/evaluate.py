"""Quality: likelihood, samples, diversity, and last words of any checkpoints, side by side.

    python -m tools.evaluate out/stories-nano/teacher.pt out/stories-nano/round7.pt
    python -m tools.evaluate out/stories-nano/round7.pt --frontier --plot frontier.png
    python -m tools.evaluate out/stories-nano/teacher.pt --steps 1024 --joint --precision 32

Every number has a standard error, every row says how its samples were drawn. Perplexity can
be bought by repetition: rows whose entropy is too low are marked, and --frontier compares
models at equal entropy. The same seed gives the same table, on one process or on several.
"""
import dataclasses
import platform
import sys
import time
import typing
from pathlib import Path

import numpy as np
import torch

from common import seed_all
from data.checkpoints import load_model
from data.dataset import Data, load_data, make_tokenizer, oracle
from data.files import UserError, read_text, write_json
from data.lambada.prepare import parse_lambada
from data.measures import (NO_VALUE, add_mean, exp, make_judge, mean_se, perplexity,
                           step_key)
from data.orders import ORDERS, check_order
from data.processes import Processes, spread, start
from data.prompts import ends_of
from data.results import sample_row
from data.script import command, device_flag, flag, package, parse_flags
from model import Transformer
from sample import BATCH, EXACT, check_exact, draw_samples, steps_or_exact
from tools import figures, likelihood
from tools.joint import PublicSampling
from tools.metrics import diversity, mauve, self_bleu

TEMPERATURES = [0.7, 0.8, 0.9, 1.0, 1.1]     # of the frontier


@dataclasses.dataclass
class EvaluateConfig:
    """The flags of tools.evaluate."""
    checkpoint: list[str]            # the arguments without --
    # what is measured on what
    judge: str | None = flag(
        None, "AR checkpoint that reads the samples [ar.pt beside the first checkpoint]")
    teacher: str | None = flag(
        None, "checkpoint of those given whose entropy the others are measured by [the "
        "first that is not distilled]")
    dataset: str | None = flag(
        None, "folder of a dataset, or a text file [the first checkpoint's]")
    sequences: int | None = flag(
        None, "pieces of val.bin for the likelihood [32,768 tokens, but 32 at least]",
        low=2)
    likelihood_only: bool = flag(False, "no samples; then no judge is needed")
    # samples
    steps: list[int | str] | None = flag(
        None, "diffusion steps [8 16 32], or exact: see sample.py", type=steps_or_exact)
    ahead: int = flag(
        8, "with exact: each call asks for this many tokens, and one more for each that is "
        "final", low=1)
    max_calls: int | None = flag(
        None, "with exact: stop after so many calls, which is not exact", low=1)
    samples: int = flag(256, "texts for each row", low=3)
    length: int | None = flag(None, "tokens of a text [the least context]", low=9)
    temperature: list[float] | None = flag(None, "divides the logits [1]", low=0.01)
    frontier: bool = flag(
        False, "perplexity at equal entropy, from temperatures 0.7 to 1.1")
    precision: int = flag(64, "bits of the token draw", choices=[32, 64])
    order: list[str] | None = flag(
        None, "which tokens a step reveals [random]; confidence: the surest, with full "
        "attention, which is another law", choices=ORDERS)
    joint: bool = flag(
        False, "draw tokens and whether they are revealed together, as public code does")
    seed: int = flag(0, "seed of the samples")
    # last words
    lambada: str | None = flag(
        None, "JSONL file of passages to complete by the last word")
    last_word: str | None = flag(
        None, "text file; its passages of 20 words or more, likewise")
    tasks: int | None = flag(None, "passages at most [all]", low=2)
    # continuations
    continuations: int = flag(0, "of each prompt from val.bin, see --prompts", low=0)
    prompts: int = flag(64, "prompts to continue", low=2)
    prompt_tokens: int | None = flag(None, "tokens of a prompt [half the text's]", low=1)
    until_end: bool = flag(
        False, "continuations count up to their first end-of-text token, where the data "
        "have one; without self-BLEU, which is of texts of one length")
    mauve: str | None = flag(
        None, "converted GPT-2 whose features compare the continuations with the data's "
        "(needs mauve-text)")
    # where the results go, and where this runs
    plot: str | None = flag(None, "picture of the frontier (needs matplotlib)")
    json: str | None = flag(None, "file for everything measured")
    device: str = device_flag()


# ---- rows: each is one model's, under one setting

def quality_row(name, model, n, sampling, judge, data, procs):
    """sample_row, with tools.metrics.diversity too."""
    row, x = sample_row(name, model, n, sampling, judge, data, procs)
    began = time.time()
    row |= diversity(x, data)
    row["seconds"] = round(row["seconds"] + time.time() - began, 2)
    return row


def likelihood_row(name, model, x, procs, draws=8):
    """Nats per token of x (n, L): a diffusion model's bound in two estimates, or, where
    attention is in the order of reveal, exactly in `draws` orders; or AR's exact value. All
    models of one attention meet the same noise. Perplexity is exp of the better-known
    bound."""
    def batch(i):
        """{estimate: its values (B,)} of the texts i to i + BATCH."""
        seed_all("likelihood", i)
        part = x[i:i + BATCH].to(procs.device)                       # (B, L)
        if model.config.causal:
            return {"nll": likelihood.exact(model, part).cpu()}
        if model.config.attention == "reveal":
            orders, mixture = likelihood.in_orders(model, part, model.mask_id, draws)
            return {"any_order": orders.cpu(), "mixture": mixture.cpu()}
        bound = likelihood.bound(model, part, model.mask_id, draws)
        any_order = likelihood.any_order(model, part, model.mask_id, draws)
        return {"bound": bound.cpu(), "any_order": any_order.cpu()}

    parts = spread(range(0, len(x), BATCH), batch, procs, f"{name}, likelihood")
    row = {"model": name, "sequences": len(x), "tokens": x.numel()}
    estimates = list(parts[0])
    for key in estimates:
        values = torch.cat([part[key] for part in parts])            # (n,)
        add_mean(row, key, mean_se(values))
    # a mixture of orders is another model than one order, so it is not among these
    bounds = [key for key in estimates if key != "mixture"]
    best = min(bounds, key=lambda key: row[key + "_se"])
    ppl = exp(row[best])
    add_mean(row, "ppl", (ppl, ppl * row[best + "_se"]))
    return row


def last_word_row(name, model, tasks, procs):
    """The accuracies and the perplexity of the last words of tasks: see
    likelihood.last_word."""
    def batch(part):
        numbers, x, w = part
        seed_all("last word", numbers)
        answer = likelihood.answer(model, x.to(procs.device), w)
        return {key: values.cpu() for key, values in answer.items()}

    batches = likelihood.batches(tasks, BATCH)
    answers = spread(batches, batch, procs, f"{name}, last words")
    return {"model": name, **likelihood.last_word(answers, tasks)}


# ---- what is given: data, models, judge, tasks

def open_data(config, content, tokenizer, procs):
    """The dataset to measure on: a folder, or a text file in the tokens of the checkpoints,
    the first of which holds content. Raises UserError where it does not fit."""
    first = config.checkpoint[0]
    name = config.dataset or content["config"].get("dataset")
    if name is None:
        raise UserError(f"{first} does not say what it was trained on; give --dataset")
    # a file of text, for which a pipe will do
    if Path(name).exists() and not Path(name).is_dir():
        ids = np.array(tokenizer.encode(read_text(name)))
        return Data(Path(name), ids[:0], ids, tokenizer, None, False, None)
    # a folder
    data = load_data(name, procs)
    if data.tokenizer.spec != tokenizer.spec:
        raise UserError(f"{first} knows other tokens than {data.folder}; give --dataset a "
                        "folder of the same tokens, or a text file")
    if config.dataset is None and content.get("data") not in (None, data.fingerprint):
        raise UserError(f"{first} was trained on other text than {data.folder} holds now; "
                        "to measure on what is there, give --dataset too")
    return data


def with_oracle(data, length):
    """data as texts of `length` tokens can be measured, and a note for the user, or None:
    pieces of a row are no texts that an oracle could judge."""
    if not data.oracle or length == data.stride:
        return data, None
    note = (f"texts of {length} tokens are pieces of {data.folder.name}'s rows of "
            f"{data.stride}: whether they are valid is not measured")
    return dataclasses.replace(data, oracle=None), note


def open_models(config, procs):
    """{name: (model, content)} of the checkpoints. Raises UserError where they differ in
    tokens."""
    models = {}
    for name, path in figures.names(config.checkpoint).items():
        models[name] = load_model(path, procs.device)
    specs = [content["tokenizer"] for _, content in models.values()]
    if any(spec != specs[0] for spec in specs):
        raise UserError("the checkpoints know different tokens; evaluate them one by one")
    return models


@dataclasses.dataclass
class Judge:
    """What reads the samples."""
    read: typing.Callable | None         # see data.measures.make_judge; None: there is none
    model: Transformer | None            # where it has the samples' own tokens
    title: str                           # which file it is, and what it reads


def open_judge(config, data, procs):
    """The Judge of --judge, or of ar.pt beside the first checkpoint. Raises UserError where
    it cannot read the texts."""
    if config.likelihood_only and not config.judge:
        return Judge(None, None, "none")
    path = Path(config.judge or Path(config.checkpoint[0]).with_name("ar.pt"))
    if not config.judge and not path.exists():
        raise UserError(f"no {path} to judge the samples; give an AR checkpoint as --judge")
    model, content = load_model(path, procs.device, ("ar",))
    same = content["tokenizer"] == data.tokenizer.spec
    if same and config.length > model.config.context:
        raise UserError(f"{path} reads at most {model.config.context} tokens, the texts "
                        f"have {config.length}; give another --judge, or --length")
    read = make_judge(model, content["tokenizer"], data.tokenizer)
    # a try: a vocabulary of words may not have these texts' words
    try:
        read(data.pieces(1, config.length).to(procs.device))
    except UserError as e:
        raise UserError(f"{path} cannot read these texts ({e}); give another --judge")
    if same:
        return Judge(read, model, f"{path}, in tokens")
    return Judge(read, None, f"{path}, re-tokenised: in its own tokens")


def set_defaults(config, models, data):
    """Fill in the flags that were not given. Raises UserError on what does not fit
    together."""
    context = min(model.config.context for model, _ in models.values())
    config.length = config.length or min(context, data.stride or context)
    config.prompt_tokens = config.prompt_tokens or config.length // 2
    config.sequences = config.sequences or max(32, 2 ** 15 // config.length)
    config.steps = sorted(config.steps or [8, 16, 32], key=step_key)
    config.order = config.order or ["random"]
    if not config.temperature:
        config.temperature = [1.0]
        if config.frontier or config.plot:
            config.temperature = TEMPERATURES

    # lengths
    longest = min(context, data.stride or context)
    if config.length > longest:
        raise UserError(f"--length {config.length} is beyond the context of {context} "
                        f"tokens, or a row of {data.folder}")
    # errors need two texts, self-BLEU three
    size = data.stride or config.length
    if len(data.val) < 3 * size:
        raise UserError(f"{data.folder}: {len(data.val)} tokens to validate with, fewer "
                        f"than three texts of {size}; use more text or a smaller --length")
    if config.prompt_tokens >= config.length:
        raise UserError(f"--prompt_tokens {config.prompt_tokens} leaves nothing of a text "
                        f"of {config.length} tokens to write; give fewer")

    refuse_together(config, models, data)


def refuse_together(config, models, data):
    """Raise UserError for flags that need others, that contradict each other, or that need
    a package that is missing."""
    paths = figures.names(config.checkpoint)
    for name, (model, _) in models.items():
        check_exact(config.steps, config.max_calls, model, paths[name])
        for order in config.order:
            check_order(order, model, paths[name])
    if config.joint and EXACT in config.steps:
        raise UserError(f"--joint draws in steps; leave it or --steps {EXACT} out")
    if config.joint and config.order != ["random"]:
        raise UserError("--joint reveals in random order; leave it or --order out")
    if config.precision == 32 and EXACT in config.steps:
        raise UserError(f"--steps {EXACT} draws in 64 bits; leave it or --precision 32 out")
    if config.until_end and not config.continuations:
        raise UserError("--until_end is of continuations; give --continuations too, such "
                        "as 5")
    if config.until_end and data.tokenizer.end is None:
        raise UserError(f"--until_end: {data.folder} has no end-of-text token; leave it "
                        "out")
    if config.mauve and not config.continuations:
        raise UserError("--mauve compares continuations; give --continuations too, such as "
                        "5")
    figures.check_picture(config.plot)
    if config.mauve:
        package("mauve")
    reveal = any(model.config.attention == "reveal" for model, _ in models.values())
    if config.joint and reveal:
        raise UserError("--joint is not for models with attention reveal, whose order it "
                        "does not keep; leave it out")


def teacher_of(config, models):
    """The name of the checkpoint that others are measured by: --teacher's, a file among
    those that are given, or the first that is not distilled, or None. Raises UserError."""
    if config.teacher:
        for name, path in figures.names(config.checkpoint).items():
            if path.resolve() == Path(config.teacher).resolve():
                return name
        raise UserError(f"--teacher {config.teacher} is not among the checkpoints; name it "
                        "there too")
    for name, (_, content) in models.items():
        if content["kind"] == "mdlm":
            return name
    return None


def open_tasks(config, tokenizer, context):
    """{"lambada" or "last_word": tasks} of the files that are given, for models that read
    at most `context` tokens."""
    tasks = {}
    if config.lambada:
        texts = parse_lambada(read_text(config.lambada), config.lambada)[:config.tasks]
        tasks["lambada"] = likelihood.make_tasks(texts, tokenizer, context)
    if config.last_word:
        texts = likelihood.passages(read_text(config.last_word))[:config.tasks]
        tasks["last_word"] = likelihood.make_tasks(texts, tokenizer, context, cut=True)
    for name, some in tasks.items():
        if len(some) < 2:
            raise UserError(f"--{name} {getattr(config, name)} has a single passage, and "
                            "no standard error; give more")
    return tasks


# ---- everything that is asked for, part by part

@dataclasses.dataclass
class Evaluation:
    """What is measured, with what, and where the rows go."""
    config: EvaluateConfig
    procs: Processes
    models: dict                 # {name: model}
    judge: Judge
    data: Data
    results: dict                # what --json gets

    def add(self, part, row):
        """A new row of a part of the results, which are saved at once."""
        self.results[part].append(row)
        self.save()

    def save(self):
        if self.config.json and self.procs.rank == 0:
            write_json(self.config.json, self.results)

    def settings(self):
        """(name, model, steps, order) of the data, which are model None, and of every
        model."""
        yield "data", None, None, "random"
        for name, model in self.models.items():
            if model.config.causal:
                yield name, model, None, "random"
                if EXACT in self.config.steps:
                    yield name, model, EXACT, "random"
                continue
            for order in self.config.order:
                for steps in self.config.steps:
                    yield name, model, steps, order

    def sampling(self, model, steps, order="random", temperature=1.0):
        """How texts of a model are drawn."""
        config = self.config
        joint = config.joint and model is not None and not model.config.causal
        return PublicSampling(steps, config.seed, temperature, precision=config.precision,
                              joint=joint, order=order, length=config.length,
                              ahead=config.ahead, max_calls=config.max_calls)


def measure_readings(evaluation):
    """Likelihood and last words: what needs no samples."""
    config, procs, data = evaluation.config, evaluation.procs, evaluation.data
    # the judge is a model like the others here
    readers = dict(evaluation.models)
    if evaluation.judge.model:
        readers["judge"] = evaluation.judge.model
    context = min(model.config.context for model in readers.values())
    tasks = open_tasks(config, data.tokenizer, context)

    x = data.pieces(config.sequences, config.length)                 # (n, L)
    for name, model in readers.items():
        evaluation.add("likelihood", likelihood_row(name, model, x, procs))
    for part, some in tasks.items():
        evaluation.results[part] = []
        for name, model in readers.items():
            evaluation.add(part, last_word_row(name, model, some, procs))


def measure_samples(evaluation):
    """Texts of every model in every order, at every number of steps and temperature."""
    config, results = evaluation.config, evaluation.results
    for name, model, steps, order in evaluation.settings():
        temperatures = config.temperature
        if model is None:                # data have one temperature, their own
            temperatures = [1.0]
        for temperature in temperatures:
            sampling = evaluation.sampling(model, steps, order, temperature)
            row = quality_row(name, model, config.samples, sampling, evaluation.judge.read,
                              evaluation.data, evaluation.procs)
            results["samples"].append(row)
            figures.mark(results["samples"], results["teacher"])
            evaluation.save()
    if len(config.temperature) > 1:
        results["frontier"] = figures.frontier(results["samples"], results["teacher"])


def continuation_row(evaluation, name, model, sampling, x, gpt2):
    """Conditional text of a model: --continuations of the first --prompt_tokens tokens of
    each of x (n, L), of as many tokens as x has, drawn as `sampling` says; model None: x
    itself. Perplexity under the judge given the prompt, self-BLEU among the continuations
    of a prompt, the share of texts that are valid with their prompt, MAUVE against x where
    gpt2 is given, as (model, tokenizer). With --until_end texts are cut after their end, as
    x is, and the row says which share of them has one."""
    config, procs = evaluation.config, evaluation.procs
    P, m = config.prompt_tokens, config.continuations
    row = {"model": name, "steps": sampling.steps, "order": None}
    y = x
    if model is not None:
        if not model.config.causal:
            row["order"] = sampling.order
        # m texts for each prompt, one after the other: (n m, L)
        prompts = x[:, :P].repeat_interleave(m, 0)
        y = draw_samples(model, len(prompts), sampling, procs, prompts,
                         f"{name}, continuations")
        add_mean(row, "self_bleu4", NO_VALUE)
        if m > 2 and not config.until_end:
            alike = []
            for texts in y.split(m):     # of one prompt
                bleu4, _ = self_bleu(texts[:, P:])[-1]
                alike.append(bleu4)
            add_mean(row, "self_bleu4", mean_se(torch.tensor(alike)))

    # what counts of each text
    stop = None                          # all of it
    if config.until_end:
        end = evaluation.data.tokenizer.end
        stop = ends_of(y, P, end)                                    # (n m,)
        ended = (y[:, P:] == end).any(1).double()
        add_mean(row, "ended", mean_se(ended.view(len(x), -1).mean(1)))
    # nats and tokens of all continuations of a prompt: (n,), a prompt counts once
    nats, tokens = evaluation.judge.read(y.to(procs.device), P, stop)
    nats = nats.view(len(x), -1).sum(1)
    tokens = tokens.view(len(x), -1).sum(1)
    add_mean(row, "gen_ppl", perplexity(nats, tokens))
    verdict = oracle(y, evaluation.data)
    if verdict:                          # its mean for each prompt: (n,)
        valid = (verdict[0] == 0).double().view(len(x), -1).mean(1)
        add_mean(row, "valid", mean_se(valid))
    if gpt2 and model is not None:
        texts, others = x.tolist(), y.tolist()
        if config.until_end:
            texts, others = cut(x, ends_of(x, P, end)), cut(y, stop)
        add_mean(row, "mauve", mauve(gpt2, texts, others, evaluation.data.tokenizer))
    return row | {"prompts": len(x), "prompt_tokens": P, "texts": len(y)}


def cut(x, stop):
    """The texts x (n, L) as lists of their first stop (n,) ids."""
    return [ids[:n] for ids, n in zip(x.tolist(), stop.tolist())]


def measure_continuations(evaluation, gpt2):
    """Texts of every model that go on from prompts of the data. gpt2: see
    continuation_row."""
    config = evaluation.config
    evaluation.results["continuations"] = []
    x = evaluation.data.pieces(config.prompts, config.length)        # (n, L)
    for name, model, steps, order in evaluation.settings():
        sampling = evaluation.sampling(model, steps, order, config.temperature[0])
        row = continuation_row(evaluation, name, model, sampling, x, gpt2)
        evaluation.add("continuations", row)


def evaluate(evaluation):
    """Measure everything that the flags ask for; the results are saved after each row."""
    config = evaluation.config
    gpt2 = None
    if config.mauve:                     # first, so that a mistake shows at once
        gpt2_model, content = load_model(config.mauve, evaluation.procs.device, ("ar",))
        gpt2 = gpt2_model, make_tokenizer(content["tokenizer"])
    measure_readings(evaluation)
    if not config.likelihood_only:
        measure_samples(evaluation)
        if config.continuations:
            measure_continuations(evaluation, gpt2)
    evaluation.save()


def main():
    config = parse_flags(EvaluateConfig, __doc__,
                         checkpoint="of train.py, distill.py or tools.convert")
    procs = start(config.device)
    opened = open_models(config, procs)
    _, first_content = next(iter(opened.values()))
    tokenizer = make_tokenizer(first_content["tokenizer"])
    data = open_data(config, first_content, tokenizer, procs)
    set_defaults(config, opened, data)
    data, note = with_oracle(data, config.length)
    teacher = teacher_of(config, opened)
    judge = open_judge(config, data, procs)
    results = {"judge": judge.title, "data": data.folder.name, "teacher": teacher,
               "argv": sys.argv[1:], "torch": torch.__version__,
               "python": platform.python_version(), "likelihood": [], "samples": []}

    models = {name: model for name, (model, _) in opened.items()}
    evaluate(Evaluation(config, procs, models, judge, data, results))

    # what the reader sees
    if procs.rank > 0:
        return
    title = (f"{data.folder.name}; judge: {judge.title}; texts of {config.length} tokens, "
             f"seed {config.seed}")
    if config.joint:
        title += ", joint draws"
    if "confidence" in config.order:
        title += ("\norder confidence: the surest tokens are revealed first, which is "
                  "another law than the model's")
    if note:
        title += "\n" + note
    print(title + "\n")
    print(figures.show(results))
    if config.plot:
        figures.draw_frontier(results["samples"], config.plot)


if __name__ == "__main__":
    command(main)
