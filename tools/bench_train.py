"""Speed and memory of training: `python bench.py train`.

One step of each objective (loss, gradient, AdamW) as train.py and distill.py do it, with
chunks of logits at the masked positions only, against the plain form: logits and
log-probabilities (B, L, V) everywhere, as in the papers' pseudo-code. The two forms have
the same loss (tests/test_bench.py).
"""
import copy
import functools
import itertools

import torch
import torch.nn.functional as F

from common import seed_all
from diffusion import (categorical, mask_rate, mask_share, nelbo, q_sample, reveal_share,
                       sample_t)
from distill import divergence, sdtt_loss
from tools.machine import (fill_times, first_run, header, in_new_process, keep_blocks_below,
                           line, peak_bytes, seconds, training_flop)
from model import PRESETS, ModelConfig, Transformer, shifted
from train import ar_loss

OBJECTIVES = ["ar", "mdlm", "sdtt"]
COLUMNS = (("objective", "<10"), ("form", "<10"), ("preset", "<8"), ("batch", ">5"),
           ("length", ">7"), ("seconds", ">8.3f"), ("spread", ">7.0%"),
           ("tokens/s", ">9,.0f"), ("utilisation", ">12.0%"), ("peak MB", ">8,.0f"))
VOCAB = 50257                                # tokens of GPT-2
DT = 1 / 1024                                # of SDTT: a step of the first teacher,
K = 2                                        # and how many the student learns at once


# ---- the plain forms

def plain_ar(model, x, mask_id):
    """train.ar_loss of x (B, L) with all logits at once."""
    logits = model(shifted(x, mask_id))                              # (B, L, V)
    return F.cross_entropy(logits.flatten(0, 1), x.flatten())


def plain_mdlm(model, x, mask_id):
    """diffusion.nelbo of x (B, L) with all log-probabilities at once."""
    t = sample_t(len(x), x.device)                                   # (B,)
    z = q_sample(x, t, mask_id)
    log_p = F.log_softmax(model(z), dim=-1)                          # (B, L, V)
    nll = -log_p.gather(2, x[..., None])[..., 0]                     # (B, L)
    weight = mask_rate(t) / mask_share(t)                            # (B,)
    return ((z == mask_id) * nll * weight[:, None]).sum() / x.numel()


def plain_sdtt(student, x, teacher, dt, k, kind, mask_id):
    """SDTT's algorithms 1 and 2 with whole tensors, x (B, L); the last step draws nothing
    here either."""
    t = sample_t(len(x), x.device)                                   # (B,)
    z_t = q_sample(x, t, mask_id)

    # the teacher takes k steps from z_t
    z = z_t
    target = None
    with torch.no_grad():
        for i in range(k):
            # what is still masked takes this step's prediction
            log_p = F.log_softmax(teacher(z), dim=-1)                # (B, L, V)
            masked = z == mask_id                                    # (B, L)
            if target is None:
                target = log_p
            else:
                target = torch.where(masked[..., None], log_p, target)
            # a step from t_i to s_i; after the last one nothing is asked
            if i < k - 1:
                t_i = (t - i * dt).clamp(min=0)                      # (B,)
                s_i = (t - (i + 1) * dt).clamp(min=0)
                share = reveal_share(t_i, s_i)[:, None]              # (B, 1)
                reveal = torch.rand(z.shape, device=z.device) < share
                z = torch.where(masked & reveal, categorical(log_p), z)

    # the student predicts from z_t alone
    log_q = F.log_softmax(student(z_t), dim=-1)                      # (B, L, V)
    every = divergence(log_q, target, kind)                          # (B, L)
    masked = z_t == mask_id
    return (every * masked).sum() / masked.sum().clamp(min=1)


# ---- what is measured

def steps_of(model, teacher):
    """{(objective, form): loss(x)} for x (B, L); the losses are scalars, in nats."""
    losses = {("ar", "chunked"): ar_loss, ("ar", "plain"): plain_ar,
              ("mdlm", "chunked"): nelbo, ("mdlm", "plain"): plain_mdlm,
              ("sdtt", "chunked"): sdtt_loss, ("sdtt", "plain"): plain_sdtt}
    # the same loss, with blocks that run again in backward: see step
    for objective in OBJECTIVES:
        losses[objective, "recompute"] = losses[objective, "chunked"]

    # each with what it takes beside x
    steps = {}
    for (objective, form), loss in losses.items():
        given = dict(mask_id=model.mask_id)
        if objective == "sdtt":
            given |= dict(teacher=teacher, dt=DT, k=K, kind="kld")
        steps[objective, form] = functools.partial(loss, model, **given)
    return steps


def step(model, objective, form, loss, optimizer, x):
    """One step of training on x (B, L)."""
    # one model serves all objectives and forms
    model.config.attention = "causal" if objective == "ar" else "full"
    model.recompute = form == "recompute"
    loss(x).backward()
    optimizer.step()
    optimizer.zero_grad()


def runs(preset, L, B, vocab, dtype, device):
    """A model, and {(objective, form): function that makes a step of training}."""
    # random weights; the teacher of SDTT is as large as the student
    sizes = PRESETS[preset] | {"context": max(L, PRESETS[preset]["context"])}
    seed_all("bench", preset)
    model = Transformer(ModelConfig(vocab, **sizes)).to(device)
    model.bf16 = dtype == "bfloat16"     # autocast; the weights stay float32
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    x = torch.randint(vocab, (B, L), device=device)      # as good as text here

    made = {}
    for (objective, form), loss in steps_of(model, teacher).items():
        made[objective, form] = functools.partial(
            step, model, objective, form, loss, optimizer, x)
    return model, made


def peak_alone(of, preset, L, B, vocab, dtype, device):
    """peak_bytes of a step, of = (objective, form), in a process in which no other form has
    run: what the C library keeps of one's memory would hide how much the next needs."""
    keep_blocks_below(2 ** 20)
    _, made = runs(preset, L, B, vocab, dtype, device)
    run = made[of]
    run()                                                # makes AdamW's averages
    _, peak = peak_bytes(run, device)
    return peak


def measure(config, machine, preset, L, B, device):
    """The rows of one size, one for each objective and form."""
    sizes = preset, L, B, VOCAB, config.dtype, device
    model, made = runs(*sizes)
    params = sum(p.numel() for p in model.parameters())

    # a first time, with the memory that it takes; what fits is in `running`
    rows = []
    running = []
    for (objective, form), run in made.items():
        row = dict(objective=objective, form=form, preset=preset, batch=B, length=L,
                   dtype=config.dtype, params=params, device=machine["device"],
                   threads=machine["threads"])
        rows.append(row)
        # the plain form has about eight tensors (B, L, V) of float32
        least = 0
        if form == "plain":
            least = 8 * 4 * B * L * VOCAB
        times = first_run(row, run, run, least, device)
        if times:
            running.append((row, run, times))
            if device.type == "cpu":
                row["peak_bytes"] = in_new_process(peak_alone, (objective, form), *sizes)

    # in turn, so that what else the machine does falls on all alike
    for _ in range(config.repeats - 1):
        for _, run, times in running:
            times.append(seconds(run, device))

    # utilisation: the share of the machine's rate of operations
    for row, _, times in running:
        fill_times(row, times)
        flop = training_flop(row["objective"], model.config, B, L, DT)
        row["utilisation"] = flop / row["seconds"] / machine["flop_per_s"]
    return rows


def bench(config, device, machine):
    """Measure and print the steps of all objectives and forms; returns the rows."""
    rows = []
    print(header(COLUMNS))
    for preset, L, B in itertools.product(config.preset, config.length, config.batch):
        found = measure(config, machine, preset, L, B, device)
        print("\n".join(line(row, COLUMNS) for row in found), flush=True)
        rows += found
    return rows
