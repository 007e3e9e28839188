"""Self-Distillation Through Time (SDTT, arXiv 2410.21035): the whole path in one command.

    python distill.py --rounds 7

makes the dataset and trains the AR judge and the teacher where they are missing, then distils: in
every round the student learns to do in one step what its teacher, a frozen copy of itself, does in
k = 2 steps of size dt; then dt doubles. It ends with a table, text, and a folder of results.
Interrupt it at any time: the same command goes on where it was.
"""
import copy
import dataclasses
import functools
import json
import math
import platform

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import (GOES_ON, Processes, Run, agree, broadcast, command, fingerprint, first,
                    flag, load_model, make_optimizers, parse_flags, resume, start)
from data.dataset import load_data
from data.files import UserError, hold, write, write_json
from diffusion import q_sample, sample_t, states_at, unmask_step
from model import Transformer
from sample import draw_samples, make_judge, sample_row
from train import FREE, LoopConfig, TrainConfig, as_command, fit, prepare_model, train

COLUMNS = [4, 8, 16, 32, 128, 1024]          # sampling steps in the table
ANYTIME = FREE | {"rounds", "samples", "judge", "teacher"}   # flags that may change between runs
SHARED = ("dataset", "preset", "out", "context", "positions", "attention", "batch", "micro_batch",
          "seed", "device", "bf16", "compile", "recompute")  # flags for what is trained on the way


# ---- divergences: f(student, target), log-probabilities (N, V) both -> (N,), in nats

def reverse_kl(student, target):
    """KL(student || target), the paper's choice (section 3.2). It is mode-seeking: where one step
    cannot express what the teacher knew in two, the student commits to a likely choice."""
    return (student.exp() * (student - target)).sum(-1)


def forward_kl(student, target):
    """KL(target || student). Its best student is the mean of its targets, which is what the
    teacher predicts already: averaged over many steps there is nothing to learn."""
    return (target.exp() * (target - student)).sum(-1)


def jensen_shannon(student, target):
    """The mean of both KLs to the middle of the two laws; at most log 2."""
    middle = torch.logaddexp(student, target) - math.log(2)
    return (reverse_kl(student, middle) + reverse_kl(target, middle)) / 2


def total_variation(student, target):
    """1/2 sum |p - q|; at most 1."""
    return (student.exp() - target.exp()).abs().sum(-1) / 2


def squared_log_ratio(student, target):
    """Mean over V of (log p - log q)^2."""
    return (student - target).square().mean(-1)


# to try another one: a function above, and an entry here
DIVERGENCES = {"kld": reverse_kl, "fkl": forward_kl, "jsd": jensen_shannon,
               "tvd": total_variation, "mse": squared_log_ratio}


def divergence(student, target, kind):
    """The divergence of that name, see DIVERGENCES. Raises ValueError for another name."""
    if kind not in DIVERGENCES:
        raise ValueError(f"no divergence {kind!r}")
    return DIVERGENCES[kind](student, target)


# ---- the flags

@dataclasses.dataclass
class DistillConfig(LoopConfig):
    rounds: int = flag(7, "rounds; each divides the sampling steps by k", low=1)
    teacher_steps: int | None = flag(None, "steps of the first teacher, dt = 1/teacher_steps "
                                     "[1024; preset nano 256]", low=2)
    k: int = flag(2, "teacher steps that the student learns to do at once", low=1)
    divergence: str = flag("kld", "from the student's to the teacher's prediction: reverse KL, "
                           "forward KL, Jensen-Shannon, total variation, squared log-probability",
                           choices=list(DIVERGENCES))
    steps_per_round: int | None = flag(None, "optimizer steps in a round [stories 150, real text "
                                       "600]", low=1)
    handover: str = flag("ema", "weights that a round hands to the next as its student and "
                         "teacher: ema (averaged) or raw", choices=["ema", "raw"])
    reset_optimizer: bool = flag(False, "begin each round with a fresh optimizer")
    lr: float = flag(2e-3, "highest learning rate, reached anew in each round", low=0)
    warmup: int = flag(10, "steps of linear warm-up in each round", low=0)
    samples: int = flag(256, "samples for each number of a table with up to 32 steps; half as "
                        "many beyond; 0: no judge, no table, only the rounds", low=0)
    teacher: str | None = flag(None, "checkpoint of the teacher [teacher.pt of --out, trained if "
                               "it is missing]")
    judge: str | None = flag(None, "checkpoint of the AR judge [ar.pt of --out, likewise]")

    def __post_init__(self):
        if self.teacher_steps is None:
            self.teacher_steps = 256 if self.preset == "nano" else 1024
        if self.steps_per_round is None:
            self.steps_per_round = 150 if self.dataset == "stories" else 600
        if self.samples == 1:
            raise UserError("--samples 1 has no standard error; give 2 or more, or 0 for none")


# ---- the method

def schedule(teacher_steps, rounds, k=2):
    """Sampling steps of the teacher and of each round's student: 1024, 512, ..., 8 in the paper's 7
    rounds; preset nano has 256, 128, ..., 2.
    Round r (from 0) has teacher steps of dt = 1 / schedule[r] = k^r / teacher_steps.
    Raises UserError where the last student would need less than one step."""
    if k ** rounds > teacher_steps:
        raise UserError(f"--rounds {rounds} with --k {k} needs --teacher_steps of at least "
                        f"{k ** rounds}, not {teacher_steps}: the last student would have to do "
                        "more than everything in one step")
    return [teacher_steps / k ** r for r in range(rounds + 1)]


@torch.no_grad()
def sdtt_targets(teacher, z, t, dt, k, mask_id, rank=None):
    """What the student shall predict at each mask of z_t (SDTT, algorithm 1).
    The teacher takes k reverse steps of size dt from t; a position revealed in a step keeps that
    step's prediction, and those still masked at the end take the last step's. In the last step
    both are the same prediction, so nothing is drawn in it.
    z (B, L), t (B,); rank (B, L), numbers below 1: when the tokens of z were revealed, see
    model.reveal_mask. Returns the teacher's states (N, C) in the order of z[z == mask_id], from
    which teacher.head makes the N predictions: with V = 50,257 those take 65 times the memory."""
    masked = z == mask_id                                            # (B, L), N of them
    target = None
    for i in range(k):
        if i < k - 1:
            # a step from t_i to s_i, not below 0: what it reveals keeps this prediction
            t_i, s_i = (t - i * dt).clamp(min=0), (t - (i + 1) * dt).clamp(min=0)
            z, settled, h = unmask_step(teacher, z, t_i, s_i, mask_id, rank)
            if rank is not None:
                rank = rank + (i + 1) * settled                      # the new ones come last
        else:
            # the rest takes the last step's prediction
            settled = z == mask_id
            h = states_at(teacher, z, settled, rank)
        if target is None:
            target = h.new_empty(int(masked.sum()), h.shape[1])
        target[settled[masked]] = h
    return target


def sdtt_loss(student, x, teacher, dt, k, kind, mask_id):
    """The loss of one round (SDTT, algorithm 2), a scalar: the divergence on the masks of z_t,
    averaged over them. x (B, L) clean tokens."""
    t = sample_t(x.shape[0], x.device)                               # (B,)
    z = q_sample(x, t, mask_id)
    masked = z == mask_id                                            # (B, L), N of them
    rank = None
    if teacher.config.attention == "reveal":                         # one order for both
        rank = torch.rand(z.shape, device=z.device)

    target = sdtt_targets(teacher, z, t, dt, k, mask_id, rank)       # (N, C)
    h = states_at(student, z, masked, rank)                          # (N, C)

    def compare(logits, target):
        """A chunk: logits (n, V) of the student, states (n, C) of the teacher -> (n,)."""
        with torch.no_grad():
            wanted = F.log_softmax(teacher.head(target), dim=-1)
        return divergence(F.log_softmax(logits, dim=-1), wanted, kind)
    return student.chunked_sum(h, compare, target) / max(1, len(target))


# ---- the rounds

def distill_round(c, p, data, r, student, ema, previous, origin):
    """Round r (from 0), or what is left of it: student and ema are trained in place.
    previous: the Run of the round before, whose optimizers go on, or None; origin: fingerprint of
    the first teacher. Returns this round's Run."""
    dt = 1 / schedule(c.teacher_steps, c.rounds, c.k)[r]
    for model in (student, ema):             # processes may have rounded differently
        broadcast(model, p)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    if previous is None or c.reset_optimizer:
        optimizers = make_optimizers(student, c)
    else:
        optimizers = previous.optimizers
    content = dict(kind="sdtt", round=r + 1, sampling_steps=round(1 / (c.k * dt)), origin=origin,
                   tokenizer=data.tokenizer.spec, data=data.fingerprint,
                   config=dataclasses.asdict(c), teacher=teacher.state_dict())
    run = Run(c.folder / f"round{r + 1}.pt", c.steps_per_round, student, ema, optimizers, content,
              averaged=r * c.steps_per_round)
    if previous:
        run.micro = previous.micro

    # an unfinished round goes on with the teacher that it began with
    saved = resume(run, c, ANYTIME)
    if saved and saved["teacher"]:
        teacher.load_state_dict(saved["teacher"])
    agree(p, fingerprint(teacher), f"teachers of round {r + 1}")
    teacher = prepare_model(teacher, c, p)
    loss = functools.partial(sdtt_loss, teacher=teacher, dt=dt, k=c.k, kind=c.divergence,
                             mask_id=student.mask_id)
    fit(c, p, data, run, loss)
    if c.handover == "ema":
        student.load_state_dict(ema.state_dict())
    return run


# ---- the results

def open_results(c):
    """results.json of an earlier run, or a new one."""
    try:
        old = json.loads((c.folder / "results.json").read_bytes())
        rows, models = old["rows"], old["models"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        rows, models = [], {}
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "machine": platform.machine(), "threads": torch.get_num_threads()}
    return {"rows": rows, "models": models, "config": dataclasses.asdict(c), "seconds": {},
            "versions": versions}


def fill_rows(c, p, data, results, name, model, judge, digest, context):
    """Measure what results["rows"] lacks of one model (None: the data), and save it, row by row.
    Rows of an earlier run are kept only if they came from the same weights, judge and settings."""
    key = f"{digest} {c.samples} {c.seed}"
    if results["models"].get(name) != key:
        results["rows"] = [row for row in results["rows"] if row["model"] != name]
        results["models"][name] = key

    # data and AR have no number of steps
    diffusion = model is not None and not model.config.causal
    columns = COLUMNS if diffusion else [None]
    done = {row["steps"] for row in results["rows"] if row["model"] == name}
    for steps in columns:
        if steps in done:
            continue
        n = c.samples
        if steps and steps > 32:             # they take long
            n = max(2, c.samples // 2)
        row, _ = sample_row(name, model, judge, data, steps, n, Processes(p.device), c.seed,
                            context)
        results["rows"].append(row)
        write_json(c.folder / "results.json", results)

    mine = [row for row in results["rows"] if row["model"] == name]
    shown = next(row for row in mine if row["steps"] in (None, 8))
    title = f"{name}, 8 steps" if diffusion else name
    print(f"{title}: {summary(shown)}", flush=True)


def summary(row):
    """A row in one line of text."""
    text = f"{row['gen_ppl']:.2f} (±{row['gen_ppl_se']:.2f}) at entropy {row['entropy']:.2f}"
    if row["valid"] is not None:
        text += f", {row['valid']:.0%} valid, {row['contradictions']:.2f} contradictions"
    return text


# of a model in the table: (label, key, its format); a line is left out where nothing has a value
LINES = (("perplexity", "gen_ppl", ".2f"), ("entropy", "entropy", ".2f"),
         ("entropy of all", "pooled_entropy", ".2f"), ("valid", "valid", ".0%"),
         ("contradictions", "contradictions", ".2f"), ("copies", "copies", ".0%"))


def table(rows):
    """Rows as text: a block of labelled lines for each model, a column for each number of steps;
    data and AR, which take no steps, have one column of their own."""
    columns = sorted({row["steps"] for row in rows if row["steps"]})
    lines = [f"{'sampling steps':26}{'-':>9}" + "".join(f"{steps:>9}" for steps in columns)]
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = {row["steps"]: row for row in rows if row["model"] == name}
        title = name
        for label, key, form in LINES:
            if all(row[key] is None for row in cells.values()):
                continue
            line = f"{title:10}{label:16}"
            for steps in [None, *columns]:
                text = format(cells[steps][key], form) if steps in cells else ""
                line += f"{text:>9}"
            lines.append(line.rstrip())
            title = ""
    return "\n".join(lines)


def show_samples(c, p, data, models):
    """Text of each model at 8 and at 32 steps, one under the other, also in samples.txt."""
    text = ""
    for steps in (8, 32):
        for name, model in models.items():
            text += f"\n{name}, {steps} steps:\n"
            for row in draw_samples(model, 3, steps, Processes(p.device), c.seed).tolist():
                one = data.tokenizer.decode(row).strip().replace("\n", "\n    ")
                text += f"  * {one}\n"
    write(c.folder / "samples.txt", lambda f: f.write(text.encode()))
    print(text)


def conclude(c, p, data, results, models):
    """Put the rows in order, and write and print everything that there is to see."""
    seconds = results["seconds"]
    seconds["evaluation"] = round(sum(row["seconds"] for row in results["rows"]), 1)
    order = ["data", "ar", "teacher"] + [f"round {r + 1}" for r in range(c.rounds)]
    known = [row for row in results["rows"] if row["model"] in order]
    results["rows"] = sorted(known, key=lambda row: order.index(row["model"]))
    write_json(c.folder / "results.json", results)
    print(f"\nperplexity under the judge (of {results['judged']}), entropies in nats: within a text, "
          "and of all texts together")
    print(table(results["rows"]))
    show_samples(c, p, data, models)
    print(f"{c.folder}: {sum(seconds.values()):.0f} s in all; python -m tools.figures {c.folder} "
          "draws the curves")


# ---- judge and teacher: given, there, or trained now

def load_fitting(path, p, data, kinds):
    """The model of a checkpoint and the checkpoint: (model, content). Raises UserError where it
    does not fit data."""
    model, content = load_model(path, p.device, kinds)
    context = model.config.context
    known = content["tokenizer"] == data.tokenizer.spec
    # only a judge may have other tokens: it reads the texts anew in its own
    if not known and not model.config.causal:
        raise UserError(f"{path} knows {model.config.vocab} tokens, {data.folder} other ones "
                        f"({data.tokenizer.vocab}); give the --dataset it was trained on")
    if known and data.context(context) != context:
        raise UserError(f"{path} writes {context} tokens, a text of {data.folder} has "
                        f"{data.stride}; give the --dataset it was trained on")
    return model, content


def train_on_the_way(c, p, objective, init=None):
    """Train what is missing in --out, or what is left of it, with c's own flags where they are
    shared; returns the checkpoint's path. init: what it begins from, see TrainConfig."""
    t = TrainConfig(objective=objective, init=init, **{name: getattr(c, name) for name in SHARED})
    if p.rank == 0 and not t.path.exists():
        print(f"no {t.path} yet; the same as: {as_command('train.py', t)}", flush=True)
    return train(t, p, as_saved=init is None)


def get_teacher(c, p, data):
    """The teacher and its checkpoint. One that is given with another attention than --attention is
    adapted: trained on, with that attention."""
    kinds = ("mdlm", "sdtt")
    path = c.teacher
    if path is None:
        path = train_on_the_way(c, p, "mdlm")
    elif c.attention is not None:
        given, _ = load_model(path, kinds=kinds)
        if given.config.attention != c.attention:
            path = train_on_the_way(c, p, "mdlm", init=path)
    return load_fitting(path, p, data, kinds)


def get_judge(c, p, data):
    """The AR judge and its checkpoint; (None, None) where nothing is measured."""
    if not c.samples:
        return None, None
    path = c.judge or train_on_the_way(c, p, "ar")
    return load_fitting(path, p, data, ("ar",))


def judge_and_teacher(c, p, data):
    """Both, see get_judge and get_teacher; a given teacher first, so that a mistake shows before
    anything trains. Raises UserError where the judge cannot read what the teacher writes."""
    if c.teacher:
        teacher, judge = get_teacher(c, p, data), get_judge(c, p, data)
    else:
        judge, teacher = get_judge(c, p, data), get_teacher(c, p, data)
    if c.samples and judge[1]["tokenizer"] == data.tokenizer.spec:
        reads, writes = judge[0].config.context, teacher[0].config.context
        if reads < writes:
            raise UserError(f"the judge reads at most {reads} tokens, the teacher writes {writes}; "
                            "give a longer --judge")
    return judge, teacher


# ---- the whole path

def announce(c, data, sampling_steps):
    """Say, before anything trains, which files are used and how much there is to do.
    sampling_steps: see schedule."""
    teacher = c.teacher or c.folder / "teacher.pt"
    judge = "none, so no table"
    if c.samples:
        judge = c.judge or c.folder / "ar.pt"
    print(f"data: {data.folder}; teacher: {teacher}; judge: {judge}; results: {c.folder}\n"
          f"{c.rounds} rounds of {c.steps_per_round} optimizer steps: from "
          f"{sampling_steps[0]:g} sampling steps to {sampling_steps[-1]:g}", flush=True)


def distill(c, p):
    """The whole path that DistillConfig c describes, or what is left of it, in processes p."""
    sampling_steps = schedule(c.teacher_steps, c.rounds, c.k)
    data = load_data(c.dataset, p)
    if p.rank == 0:
        announce(c, data, sampling_steps)
    (judge, judge_file), (teacher, teacher_file) = judge_and_teacher(c, p, data)
    first(p, lambda: hold(c.folder / "results.json"))    # one run at a time in this folder
    broadcast(teacher, p)
    origin = fingerprint(teacher)

    # what is measured: nothing without a judge
    results = open_results(c)
    seconds = results["seconds"]
    seconds["teacher"] = teacher_file["seconds"]
    if judge:
        foreign = judge_file["tokenizer"] != data.tokenizer.spec
        results["judged"] = "text, in the judge's own tokens" if foreign else "tokens"
        seconds["ar"] = judge_file["seconds"]
        judged_by = fingerprint(judge)
        judged = make_judge(judge, judge_file["tokenizer"], data.tokenizer)

    def report(name, model, digest):
        """Measure a model, in process 0, for which the others wait."""
        if judge and p.rank == 0:
            fill_rows(c, p, data, results, name, model, judged,
                      f"{digest} {judged_by} {data.fingerprint}", teacher.config.context)
        if p.world > 1:
            dist.barrier()

    report("data", None, "")
    if judge and not foreign:
        report("ar", judge, judged_by)
    report("teacher", teacher, origin)

    # the student begins as the teacher; each round begins where the one before ended
    student = Transformer(dataclasses.replace(teacher.config, dropout=c.dropout))
    student = prepare_model(student, c, p)
    student.load_state_dict(teacher.state_dict())
    ema, run = copy.deepcopy(teacher), None
    for r in range(c.rounds):
        if p.rank == 0:
            before, after = sampling_steps[r], sampling_steps[r + 1]
            print(f"round {r + 1}: {c.k} steps of 1/{before:g} in one, for {after:g} steps")
        run = distill_round(c, p, data, r, student, ema, run, origin)
        seconds[f"round {r + 1}"] = run.seconds
        report(f"round {r + 1}", ema, fingerprint(ema))
    if judge and p.rank == 0:
        conclude(c, p, data, results, {"teacher": teacher, f"round {c.rounds}": ema})


def main():
    c = parse_flags(DistillConfig, __doc__)
    distill(c, start(c.device))


main.stopped = GOES_ON

if __name__ == "__main__":
    command(main)
