"""Self-Distillation Through Time (SDTT, arXiv 2410.21035): the whole path in one command.

    python distill.py --rounds 7

makes the dataset and trains the AR judge and the teacher where they are missing, then
distils: in every round the student learns to do in one step what its teacher, a frozen copy
of itself, does in k steps of size dt (k = 2 unless --k says otherwise); then dt is k times
as large. It ends with a table, text, and a folder of results. Interrupt it at any time: the
same command goes on, and ends with the same weights.

The method comes first: `sdtt_targets`, `sdtt_loss` and the divergences; then the flags, a
round (`distill_round`), and the path from nothing to a table. What is measured, and kept,
is in data/results.py.
"""
import copy
import dataclasses
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from common import make_optimizers
from data.checkpoints import Run, fingerprint, load_for, load_model, resume
from data.dataset import load_data
from data.files import UserError, hold
from data.processes import agree, broadcast, run_in_first, start
from data.results import announce, announce_round, conclude, fill_rows, open_exam
from data.script import GOES_ON, as_command, command, flag, parse_flags
from diffusion import q_sample, rank_prompt_first, sample_t, states_at, unmask_step
from model import SHORT, Transformer
from train import MAY_CHANGE, LoopConfig, TrainConfig, fit, prepare_model, train


# ---- the method

@torch.no_grad()
def sdtt_targets(teacher, z, t, dt, k, mask_id, rank=None):
    """What the student learns to predict at each mask of z_t (SDTT, algorithm 1).
    The teacher takes k reverse steps of size dt from t. The target at a mask is the
    teacher's prediction in the step that reveals it; masks that no step reveals get that of
    the last. So the first k - 1 steps draw tokens, and the last one only predicts, at all
    masks that are left. With k = 2:

        z_t                       _     met   _     .     he   was   _
        step 1 draws              sam   met   _     .     he   was   _
        step 2 only predicts      sam   met   _     .     he   was   _
        target: that of step      1           2                      2

    The student sees only z_t, and must predict all three.
    z (B, L) = z_t; t (B,). rank (B, L), for attention "reveal": the order in which the
    tokens of z_t count as revealed: random numbers, a prompt's below 0, others' in [0, 1).
    Returns the targets as the teacher's states (B, L, C), its last layer's output, at the
    masks of z_t (elsewhere 0). (Their predictions, made by teacher.head, would take V / C
    times the memory.)"""
    parts = []                           # of each step: where, and the states there
    for i in range(k - 1):
        # the times of step i, not below 0: a step that ends at 0 reveals all masks that are
        # left, and later ones find none
        t_i = (t - i * dt).clamp(min=0)                              # (B,)
        s_i = (t - (i + 1) * dt).clamp(min=0)
        # the step chooses what is revealed, runs the teacher, and draws it: n positions
        # `revealed`; h (n, C), the teacher's states there
        z, revealed, h = unmask_step(teacher, z, t_i, s_i, mask_id, rank)
        parts.append((revealed, h))
        if rank is not None:
            # what this step reveals comes after all that was revealed before: its rank
            # moves from [0, 1) to [i + 1, i + 2). (A mask's rank does not matter)
            rank = rank.clone()          # the caller's stays as it is
            rank[revealed] += i + 1
    # the last step draws nothing, so it needs no times (no network is told t): the rest,
    # revealed in it or not, takes its prediction
    rest = (z == mask_id).nonzero(as_tuple=True)
    h_rest = states_at(teacher, z, rest, rank)
    parts.append((rest, h_rest))

    # each mask of z_t was revealed in one of the steps, or is in the rest
    target_h = h_rest.new_zeros(*z.shape, h_rest.shape[1])           # (B, L, C)
    for where, h in parts:
        target_h[where] = h
    return target_h


def sdtt_loss(student, x, teacher, leap, kind, mask_id, keep=None):
    """The loss of a batch (SDTT, algorithm 2), a scalar: the divergence of this kind
    between student and target on the masks of z_t, averaged over them. x (B, L) clean
    tokens, keep (B, L) those that are given, see q_sample. leap = (dt, k): the student
    learns to do k steps of size dt at once. No weight 1/t (only a bound needs it): each
    mask counts the same, so texts with more masks count more."""
    dt, k = leap
    # the noise
    t = sample_t(x.shape[0], x.device)                               # (B,)
    z = q_sample(x, t, mask_id, keep)    # (B, L), some tokens masked
    masked = (z == mask_id).nonzero(as_tuple=True)                   # N of them
    # attention "reveal" needs an order: one for teacher and student, a prompt first
    rank = None
    if teacher.config.attention == "reveal":
        rank = torch.rand(z.shape, device=z.device)
        if keep is not None:
            rank = rank_prompt_first(keep)

    # the teacher takes k steps from z_t, the student predicts from z_t alone
    target_h = sdtt_targets(teacher, z, t, dt, k, mask_id, rank)     # (B, L, C)
    target_h = target_h[masked]                                      # (N, C)
    h = states_at(student, z, masked, rank)                          # (N, C)

    # chunked_sum makes the logits of n masks at a time (all N would be too many), and hands
    # them to compare, with the n rows of target_h that belong to them
    def compare(logits, target_rows):
        """Logits (n, V) of the student, states (n, C) of the teacher -> (n,)."""
        with torch.no_grad():            # the target has no gradient
            log_q = F.log_softmax(teacher.head(target_rows), dim=-1)     # (n, V)
        return divergence(F.log_softmax(logits, dim=-1), log_q, kind)

    # N is 0 if the noise masked nothing
    return student.chunked_sum(h, compare, target_h) / max(1, len(target_h))


# ---- divergences between p, the student's prediction, and q, the target. Each takes log_p
# and log_q (N, V), for N masks and V tokens, and returns (N,): a number for each mask, from
# its own row alone, as rows come in chunks. Both are finite and float32; log_p has a
# gradient

def kl(log_a, log_b):
    """KL(a || b), in nats."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)                   # sum over V


def reverse_kl(log_p, log_q):
    """KL(student || target), the paper's choice (section 3.2)."""
    # the teacher's first step is random, so the same masks get many targets q. The p with
    # the least mean KL(p || q) has log p = mean of log q + a constant: their geometric
    # mean, normalised. If 60 % of the targets give tom 99 %, sam 1 %, and 40 % the reverse,
    # tom gets 71 %, where the plain mean has 60 %. A q near 0 is like a veto, as it pulls p
    # to near 0, and tom meets fewer vetoes than sam
    return kl(log_p, log_q)


def forward_kl(log_p, log_q):
    """KL(target || student)."""
    # the best p is the mean of the targets. Second predictions, averaged over what the
    # first step may reveal, are roughly the first prediction again: little to learn
    return kl(log_q, log_p)


def jensen_shannon(log_p, log_q):
    """Jensen-Shannon: the mean of both KLs to the middle of the two distributions."""
    # bounded, by log 2: no target can be infinitely far
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)              # m = (p + q) / 2
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def total_variation(log_p, log_q):
    """1/2 sum |p - q| over V; at most 1."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def squared_log_ratio(log_p, log_q):
    """Mean over V of (log p - log q)^2."""
    return (log_p - log_q).square().mean(-1)


# to try another one: a function above, and an entry here; with a parameter the entry is
# functools.partial(f, alpha=0.1)
DIVERGENCES = {"kld": reverse_kl, "fkl": forward_kl, "jsd": jensen_shannon,
               "tvd": total_variation, "mse": squared_log_ratio}


def divergence(log_p, log_q, kind):
    """The divergence of that name, see DIVERGENCES. Raises ValueError for another name."""
    if kind not in DIVERGENCES:
        raise ValueError(f"no divergence {kind!r}")
    return DIVERGENCES[kind](log_p, log_q)


# ---- the flags

COLUMNS = [4, 8, 16, 32, 128, 1024]          # sampling steps in the table
# flags that may change between a run and its continuation. --teacher may name another path,
# but not other weights: `resume` compares the teacher's fingerprint, a hash of its weights
ANYTIME = MAY_CHANGE | {"rounds", "samples", "judge", "teacher"}
# flags that are handed on to the training of teacher and judge
SHARED = ("dataset", "preset", "out", "context", "positions", "attention", "batch",
          "micro_batch", "seed", "device", "bf16", "compile", "recompute")


@dataclasses.dataclass
class DistillConfig(LoopConfig):
    """The flags of distill.py."""
    # the method
    rounds: int = flag(7, "rounds; each divides the sampling steps by k", low=1)
    teacher_steps: int | None = flag(
        None, "steps of the first teacher, dt = 1/teacher_steps [1024; nano, mini 256]",
        low=2)
    k: int = flag(2, "teacher steps that the student learns to do at once", low=1)
    divergence: str = flag(
        "kld", "between the student's and the teacher's predictions: kld is KL(student || "
        "teacher), fkl KL(teacher || student), jsd Jensen-Shannon, tvd total variation, "
        "mse the squared difference of log-probabilities",
        choices=list(DIVERGENCES))
    steps_per_round: int | None = flag(
        None, "optimizer steps in a round [stories 150, real text 600]", low=1)
    handover: str = flag(
        "ema", "weights that the next round begins from, as student and teacher: ema "
        "(averaged) or raw", choices=["ema", "raw"])
    reset_optimizer: bool = flag(False, "begin each round with a fresh optimizer")
    lr: float = flag(2e-3, "highest learning rate, reached anew in each round", low=0)
    warmup: int = flag(10, "steps of linear warm-up in each round", low=0)
    # what is measured
    samples: int = flag(
        256, "samples for each number of a table with up to 32 steps; half as many beyond; "
        "0: no judge, no table, only the rounds", low=0)
    teacher: str | None = flag(
        None, "checkpoint of the teacher [teacher.pt of --out, trained if it is missing]")
    judge: str | None = flag(
        None, "checkpoint of the AR judge [ar.pt of --out, likewise]")

    def __post_init__(self):
        if self.teacher_steps is None:
            # SHORT presets have at most 64 tokens: 256 steps reveal most of them one by one
            self.teacher_steps = 256 if self.preset in SHORT else 1024
        if self.steps_per_round is None:
            # optimizer steps; the paper takes 10,000
            stories = Path(self.dataset).name == "stories"
            self.steps_per_round = 150 if stories else 600
        # the mean of one text has no error to show
        if self.samples == 1:
            raise UserError("--samples 1 has no standard error; give 2 or more, or 0 for "
                            "none")


# ---- the rounds

def schedule(teacher_steps, rounds, k=2):
    """Sampling steps: [of the first teacher, of the first round's student, of the second's,
    ...]; in the paper 1024, 512, 256, ..., 8, in preset nano 256, 128, 64, ..., 2.
    Round r, counted from 0, has dt = 1 / steps[r] = k^r / teacher_steps, and makes a
    student for steps[r + 1] steps.
    Raises UserError where the last student would need less than one step."""
    if k ** rounds > teacher_steps:
        raise UserError(f"--rounds {rounds} with --k {k} needs --teacher_steps of at least "
                        f"{k ** rounds}, not {teacher_steps}: the last student would need "
                        "less than one step")
    # k steps of the teacher become one of the student
    return [teacher_steps / k ** r for r in range(rounds + 1)]


def distill_round(config, procs, data, r, before, origin):
    """Round r (from 0), or what is left of it; a finished round is only loaded. before: the
    Run of the round before (at first a copy of the teacher), whose model and ema this round
    continues to train, in place. origin: fingerprint of the first teacher. Returns
    this round's Run, for the next one to begin from."""
    student, ema = before.model, before.ema
    dt = 1 / schedule(config.teacher_steps, config.rounds, config.k)[r]
    # all processes have the same weights, unless their GPUs round differently: make sure
    broadcast(student, procs)
    broadcast(ema, procs)
    run, teacher = open_round(config, data, r, before, origin)
    agree(procs, fingerprint(teacher), f"teachers of round {r + 1}")
    # a copy is not compiled: prepare it like the student
    teacher = prepare_model(teacher, config, procs)

    # train.py's loop, which calls loss(student, x, keep=keep). Only the loss knows of the
    # round: the student learns a step of k * dt
    loss = functools.partial(sdtt_loss, teacher=teacher, leap=(dt, config.k),
                             kind=config.divergence, mask_id=student.mask_id)
    fit(config, procs, data, run, loss)
    if config.handover == "ema":
        student.load_state_dict(ema.state_dict())                    # also the next teacher
    return run


def open_round(config, data, r, before, origin):
    """The Run of round r, see distill_round, as far as its checkpoint has it, and the
    round's teacher."""
    student = before.model
    # the teacher is the student as it was when the round began: a frozen copy, made before
    # a half-trained student is loaded below
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizers = before.optimizers
    # the first student has none yet
    if r == 0 or config.reset_optimizer:
        optimizers = make_optimizers(student, config)

    # what the round's checkpoint stores beside the weights. The teacher is for resuming a
    # round halfway: once the last step is done, data/checkpoints.py stores None instead
    steps = round(schedule(config.teacher_steps, config.rounds, config.k)[r + 1])
    content = dict(kind="sdtt", round=r + 1, sampling_steps=steps,
                   origin=origin, tokenizer=data.tokenizer.spec, data=data.fingerprint,
                   config=dataclasses.asdict(config), teacher=teacher.state_dict())
    run = Run(config.folder / f"round{r + 1}.pt", config.steps_per_round, student,
              before.ema, optimizers, content, micro=before.micro)
    # the average goes on from round to round, and its decay counts earlier rounds' updates
    run.updates_before = r * config.steps_per_round

    # a half-done round keeps the teacher that it began with, even if the round before was
    # run again since. (content["teacher"] shares its tensors)
    saved = resume(run, config, ANYTIME)
    if saved and saved["teacher"]:
        teacher.load_state_dict(saved["teacher"])
    return run, teacher


# ---- judge and teacher: given, there, or trained now

def train_on_the_way(config, procs, objective, init=None):
    """Train the teacher or the judge that --out lacks, or finish an interrupted one, with
    the config's flags that are SHARED, and train.py's defaults for the rest. One that is
    finished is left as it is. Returns the checkpoint's path. init: see TrainConfig."""
    shared = {name: getattr(config, name) for name in SHARED}
    wanted = TrainConfig(objective=objective, init=init, **shared)   # else its defaults
    if procs.rank == 0 and not wanted.path.exists():
        # the user may prefer to run it alone, or with other flags
        same = as_command("train.py", wanted)
        print(f"no {wanted.path} yet; the same as: {same}", flush=True)
    # as_saved: a teacher.pt or ar.pt that is there keeps its own flags; but with init it
    # must be one that began from that
    return train(wanted, procs, as_saved=init is None)


def get_teacher(config, procs, data):
    """The teacher and its checkpoint. A given teacher with another attention than
    --attention is first trained further with the one that is asked for."""
    kinds = ("mdlm", "sdtt")             # a student can teach, too
    path = config.teacher
    if path is None:
        path = train_on_the_way(config, procs, "mdlm")
    elif config.attention is not None:
        # full attention becomes reveal, or the other way round
        given, _ = load_model(path, kinds=kinds)
        if given.config.attention != config.attention:
            path = train_on_the_way(config, procs, "mdlm", init=path)
    return load_for(data, path, procs.device, kinds, config.bf16)


def get_judge(config, procs, data):
    """The AR judge and its checkpoint; (None, None) where nothing is measured."""
    if not config.samples:
        return None, None                                            # --samples 0
    # a given one, that of an earlier run, or a new one
    path = config.judge or train_on_the_way(config, procs, "ar")
    return load_for(data, path, procs.device, ("ar",), config.bf16)


def judge_and_teacher(config, procs, data):
    """(judge, its checkpoint), (teacher, its checkpoint). Raises UserError if the judge, of
    the same tokens, has too short a context for the teacher's texts."""
    # what is given comes first: if it is wrong, that shows before the other is trained
    if config.teacher:
        teacher = get_teacher(config, procs, data)
        judge = get_judge(config, procs, data)
    else:
        judge = get_judge(config, procs, data)
        teacher = get_teacher(config, procs, data)
    # a judge with the same tokens reads each text whole: it must fit into its context
    if config.samples and judge[1]["tokenizer"] == data.tokenizer.spec:
        reads, writes = judge[0].config.context, teacher[0].config.context
        if reads < writes:
            raise UserError(f"the judge reads at most {reads} tokens, the teacher writes "
                            f"{writes}; give a longer --judge")
    return judge, teacher


# ---- the whole path

def first_student(teacher, config, procs):
    """The Run that the first round begins from: a student with the teacher's weights, and
    no steps taken."""
    student = Transformer(dataclasses.replace(teacher.config, dropout=config.dropout))
    student = prepare_model(student, config, procs)
    student.load_state_dict(teacher.state_dict())
    return Run(path=None, steps=0, model=student, ema=copy.deepcopy(teacher),
               optimizers=[], content={})


def distill(config, procs):
    """The whole path that a DistillConfig describes, or what is left of it."""
    # an impossible number of rounds is refused before anything trains
    sampling_steps = schedule(config.teacher_steps, config.rounds, config.k)
    data = load_data(config.dataset, procs)          # stories are made if missing
    if data.prompts and config.samples:
        raise UserError(f"--dataset {config.dataset} has prompts, the table's texts have "
                        "none; give --samples 0, then tools.evaluate --continuations")
    if procs.rank == 0:
        announce(config, data, sampling_steps)

    # judge and teacher, trained where they are missing
    judge_pair, teacher_pair = judge_and_teacher(config, procs, data)
    teacher, _ = teacher_pair            # without its checkpoint's other content
    # a lock: one run at a time in this folder (train.py's own locks served until here)
    run_in_first(procs, lambda: hold(config.folder / "results.json"))
    broadcast(teacher, procs)            # one set of weights for all
    origin = fingerprint(teacher)        # all rounds belong to this one

    # how all models are measured (without a judge: not at all), and the table's rows.
    # fill_rows adds those of one model, unless results.json has them for its fingerprint
    exam = open_exam(config, procs, data, judge_pair, teacher_pair, COLUMNS)
    # first what needs no distillation
    fill_rows(exam, "data", None, "")    # no model, so no fingerprint
    if exam.same_tokens:                 # then the judge is the AR baseline, too
        judge, _ = judge_pair
        fill_rows(exam, "ar", judge, fingerprint(judge))
    fill_rows(exam, "teacher", teacher, origin)

    # each round begins where the one before ended
    run = first_student(teacher, config, procs)
    for r in range(config.rounds):
        if procs.rank == 0:
            # run.seconds, of the round before: what this one may take
            announce_round(config, sampling_steps, r, run.seconds)
        run = distill_round(config, procs, data, r, run, origin)     # trained in place
        exam.seconds[f"round {r + 1}"] = run.seconds
        # the averaged weights, whatever is handed over
        fill_rows(exam, f"round {r + 1}", run.ema, fingerprint(run.ema))
    # the table, and text to look at
    if exam.judge and procs.rank == 0:
        # the first teacher beside the last student
        conclude(exam, {"teacher": teacher, f"round {config.rounds}": run.ema})


def main():
    config = parse_flags(DistillConfig, __doc__)
    distill(config, start(config.device))


if __name__ == "__main__":
    command(main, stopped=GOES_ON)
