"""Self-Distillation Through Time (SDTT, arXiv 2410.21035): the whole path in one command.

    python distill.py --rounds 7

makes the dataset and trains the AR judge and the teacher where they are missing, then distils: in
every round the student learns to do in one step what its teacher, a frozen copy of itself, does in
k = 2 steps of size dt; then dt doubles. It ends with a table, text, and a folder of results.
Stopped at any moment, the same command goes on where it was.
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

from common import (GOES_ON, Processes, Run, UserError, agree, broadcast, command, fingerprint,
                    first, flag, hold, load_model, make_optimizers, parse_flags, resume, start,
                    write, write_json)
from data.dataset import load_data
from diffusion import q_sample, sample_t, states_at, unmask_step
from model import Transformer
from sample import draw_samples, make_judge, sample_row
from train import FREE, LoopConfig, TrainConfig, as_command, fit, prepare_model, train


@dataclasses.dataclass
class DistillConfig(LoopConfig):
    rounds: int = flag(7, "rounds; each divides the sampling steps by k", low=1)
    teacher_steps: int | None = flag(None, "steps of the first teacher, dt = 1/teacher_steps "
                                     "[1024; preset nano 256]", low=2)
    k: int = flag(2, "teacher steps that the student learns to do at once", low=1)
    divergence: str = flag("kld", "from the student's to the teacher's prediction: reverse KL, "
                           "forward KL, Jensen-Shannon, total variation, squared log-probability",
                           choices=["kld", "fkl", "jsd", "tvd", "mse"])
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
        self.teacher_steps = self.teacher_steps or {"nano": 256}.get(self.preset, 1024)
        self.steps_per_round = self.steps_per_round or (150 if self.dataset == "stories" else 600)
        if self.samples == 1:
            raise UserError("--samples 1 has no standard error; give 2 or more, or 0 for none")


COLUMNS = [4, 8, 16, 32, 128, 1024]          # sampling steps in the table
ANYTIME = FREE | {"rounds", "samples", "judge", "teacher"}   # flags that may change between runs
SHARED = ("dataset", "preset", "out", "context", "positions", "attention", "batch", "micro_batch",
          "seed", "device", "bf16", "compile", "recompute")  # flags for what is trained on the way


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


def divergence(student, target, kind):
    """Divergence between log-probabilities student and target (N, V), per position (N,), in nats.
    'kld' = KL(student || target), the paper's choice (section 3.2); 'fkl' = KL(target || student);
    'jsd' Jensen-Shannon; 'tvd' = 1/2 sum |p - q|; 'mse' = mean squared log-ratio over V."""
    if kind == "kld":
        return (student.exp() * (student - target)).sum(-1)
    if kind == "fkl":
        return (target.exp() * (target - student)).sum(-1)
    if kind == "jsd":
        middle = torch.logaddexp(student, target) - math.log(2)
        return (divergence(student, middle, "kld") + divergence(target, middle, "kld")) / 2
    if kind == "tvd":
        return (student.exp() - target.exp()).abs().sum(-1) / 2
    if kind == "mse":
        return (student - target).square().mean(-1)
    raise ValueError(f"no divergence {kind!r}")


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
    run = Run(c.folder / f"round{r + 1}.pt", c.steps_per_round, student, ema, optimizers, dict(
        kind="sdtt", round=r + 1, sampling_steps=round(1 / (c.k * dt)), origin=origin,
        tokenizer=data.tokenizer.spec, data=data.fingerprint, config=dataclasses.asdict(c),
        teacher=teacher.state_dict()), averaged=r * c.steps_per_round)
    run.micro = previous.micro if previous else None
    saved = resume(run, c, ANYTIME)
    if saved and saved["teacher"]:
        teacher.load_state_dict(saved["teacher"])
    agree(p, fingerprint(teacher), f"teachers of round {r + 1}")
    fit(c, p, data, run, functools.partial(sdtt_loss, teacher=prepare_model(teacher, c, p), dt=dt,
                                           k=c.k, kind=c.divergence, mask_id=student.mask_id))
    if c.handover == "ema":
        student.load_state_dict(ema.state_dict())
    return run


# ---- the results

def fill_rows(c, p, data, results, name, model, judge, digest, context):
    """Measure what results["rows"] lacks of one model (None: the data), and save it, row by row.
    Rows of an earlier run are kept only if they came from the same weights, judge and settings."""
    path, key = c.folder / "results.json", f"{digest} {c.samples} {c.seed}"
    if results["models"].get(name) != key:
        results["rows"] = [row for row in results["rows"] if row["model"] != name]
        results["models"][name] = key
    diffusion = model is not None and not model.config.causal
    for steps in COLUMNS if diffusion else [None]:
        if not any(row["model"] == name and row["steps"] == steps for row in results["rows"]):
            n = c.samples if (steps or 0) <= 32 else max(2, c.samples // 2)
            row, _ = sample_row(name, model, judge, data, steps, n, Processes(p.device), c.seed,
                                context)
            results["rows"].append(row)
            write_json(path, results)
    shown = [row for row in results["rows"] if row["model"] == name and row["steps"] in (None, 8)]
    print(f"{name}{', 8 steps' * diffusion}: {summary(shown[0])}", flush=True)


def open_results(c):
    """results.json of an earlier run, or a new one."""
    try:
        old = json.loads((c.folder / "results.json").read_text())
        rows, models = old["rows"], old["models"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        rows, models = [], {}
    return {"rows": rows, "models": models, "config": dataclasses.asdict(c), "seconds": {},
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "machine": platform.machine(), "threads": torch.get_num_threads()}}


def show_samples(c, p, data, models):
    """Text of each model at 8 and at 32 steps, one under the other, also in samples.txt."""
    text = ""
    for steps in (8, 32):
        for name, model in models.items():
            rows = draw_samples(model, 3, steps, Processes(p.device), c.seed).tolist()
            texts = [data.tokenizer.decode(row).strip().replace("\n", "\n    ") for row in rows]
            text += f"\n{name}, {steps} steps:\n" + "".join(f"  * {one}\n" for one in texts)
    write(c.folder / "samples.txt", lambda f: f.write(text.encode()))
    print(text)


def get_model(c, p, data, objective, given, kinds):
    """The model of a checkpoint that is given, or else of the one in --out, trained now, or what
    is left of it, if need be: (model, checkpoint). Raises UserError where it does not fit data."""
    adapt = given and objective == "mdlm" and c.attention not in (
        None, load_model(given, kinds=kinds)[0].config.attention)
    t = TrainConfig(objective=objective, init=given if adapt else None, **{
        name: getattr(c, name) for name in SHARED})
    if (adapt or not given) and p.rank == 0 and not t.path.exists():
        print(f"no {t.path} yet; the same as: {as_command('train.py', t)}", flush=True)
    path = given if given and not adapt else train(t, p, as_saved=not adapt)
    model, content = load_model(path, p.device, kinds)
    context, known = model.config.context, content["tokenizer"] == data.tokenizer.spec
    if not known and objective == "mdlm":
        raise UserError(f"{path} knows {model.config.vocab} tokens, {data.folder} other ones "
                        f"({data.tokenizer.vocab}); give the --dataset it was trained on")
    if known and data.context(context) != context:
        raise UserError(f"{path} writes {context} tokens, a text of {data.folder} has "
                        f"{data.stride}; give the --dataset it was trained on")
    return model, content


def judge_and_teacher(c, p, data):
    """Both, as get_model does; the given ones first, so that a mistake shows before training. The
    judge is (None, None) where nothing is measured."""
    wanted = [("ar", c.judge, ("ar",)), ("mdlm", c.teacher, ("mdlm", "sdtt"))]
    found = {one[0]: get_model(c, p, data, *one) for one in sorted(
        wanted[c.samples == 0:], key=lambda one: one[1] is None)}
    if not c.samples:
        return (None, None), found["mdlm"]
    reads, writes = (found[objective][0].config.context for objective in ("ar", "mdlm"))
    if found["ar"][1]["tokenizer"] == data.tokenizer.spec and reads < writes:
        raise UserError(f"the judge reads at most {reads} tokens, the teacher writes {writes}; "
                        "give a longer --judge")
    return found["ar"], found["mdlm"]


def distill(c, p):
    """The whole path that DistillConfig c describes, or what is left of it, in processes p."""
    plan = schedule(c.teacher_steps, c.rounds, c.k)
    data = load_data(c.dataset, p)
    (judge, judge_file), (teacher, teacher_file) = judge_and_teacher(c, p, data)
    first(p, lambda: hold(c.folder / "results.json"))
    broadcast(teacher, p)
    results, origin = open_results(c), fingerprint(teacher)
    seconds = results["seconds"]
    seconds |= {"teacher": teacher_file["seconds"]}
    if judge:
        foreign, judged_by = judge_file["tokenizer"] != data.tokenizer.spec, fingerprint(judge)
        seconds |= {"ar": judge_file["seconds"]}
        results["judged"] = "text, in the judge's own tokens" if foreign else "tokens"
        judged = make_judge(judge, judge_file["tokenizer"], data.tokenizer)

    def report(name, model, digest):
        if judge and p.rank == 0:
            fill_rows(c, p, data, results, name, model, judged, f"{digest} {judged_by} {data.fingerprint}",
                      teacher.config.context)
        if p.world > 1:
            dist.barrier()

    report("data", None, "")
    if judge and not foreign:
        report("ar", judge, judged_by)
    report("teacher", teacher, origin)
    student = prepare_model(Transformer(dataclasses.replace(teacher.config, dropout=c.dropout)),
                            c, p)
    student.load_state_dict(teacher.state_dict())
    ema, run = copy.deepcopy(teacher), None
    for r in range(c.rounds):
        if p.rank == 0:
            print(f"round {r + 1}: {c.k} steps of 1/{plan[r]:g} in one, for {plan[r + 1]:g} steps")
        run = distill_round(c, p, data, r, student, ema, run, origin)
        seconds[f"round {r + 1}"] = run.seconds
        report(f"round {r + 1}", ema, fingerprint(ema))
    if judge and p.rank == 0:
        conclude(c, p, data, results, {"teacher": teacher, f"round {c.rounds}": ema})


def summary(row):
    """A row in one line of text."""
    text = f"{row['gen_ppl']:.2f} (±{row['gen_ppl_se']:.2f}) at entropy {row['entropy']:.2f}"
    if row["valid"] is not None:
        text += f", {row['valid']:.0%} valid, {row['contradictions']:.2f} contradictions"
    return text


LINES = (("gen_ppl", "entropy", "9.2f", "5.2f"), ("valid", "contradictions", "9.0%", "5.2f"),
         ("pooled_entropy", "copies", "9.2f", "5.0%"))   # of a model in the table


def table(rows):
    """Rows as text: for each model and number of steps generative perplexity and entropy; below,
    where there is an oracle, valid share and contradictions; below, pooled entropy and copies."""
    columns = sorted({row["steps"] for row in rows if row["steps"]})
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"{'steps':10}" + "".join(f"{steps:>14}" for steps in columns)]
    for name in names:
        cells = {row["steps"]: row for row in rows if row["model"] == name}
        if None in cells:                                # data and AR have no number of steps
            cells = {columns[0]: cells[None]}
        for i, (left, right, *formats) in enumerate(LINES):
            line = name if i == 0 else ""
            for j, steps in enumerate(columns):
                values = [cells[steps][key] for key in (left, right)] if steps in cells else []
                cell = "".join(format(v, f) for v, f in zip(values, formats) if v is not None)
                line = f"{line:<{10 + 14 * j}}{cell}"
            lines += [line.rstrip()] if line.strip() else []
    return "\n".join(lines)


def conclude(c, p, data, results, models):
    """Put the rows in order, and print and write everything that there is to see."""
    seconds = results["seconds"]
    seconds["evaluation"] = round(sum(row["seconds"] for row in results["rows"]), 1)
    order = ["data", "ar", "teacher"] + [f"round {r + 1}" for r in range(c.rounds)]
    results["rows"] = [row for name in order for row in results["rows"] if row["model"] == name]
    write_json(c.folder / "results.json", results)
    print(f"\ngenerative perplexity and entropy (judged: {results['judged']})"
          + "\nshare of valid texts, contradictions per text" * bool(data.oracle)
          + "\nentropy of all texts together"
          + ", share that are training texts" * data.texts)
    print(table(results["rows"]))
    show_samples(c, p, data, models)
    print(f"{c.folder}: {sum(seconds.values()):.0f} s in all")


def main():
    c = parse_flags(DistillConfig, __doc__)
    distill(c, start(c.device))


main.stopped = GOES_ON

if __name__ == "__main__":
    command(main)
