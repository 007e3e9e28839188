"""Speed and memory of training: `python bench.py train`.

One step of each objective (loss, gradient, AdamW) as train.py and distill.py do it, with chunks of
logits at the masked positions only, against the plain form: logits and log-probabilities (B, L, V)
everywhere, as in the papers' pseudo-code. The two forms have the same loss (tests/test_bench.py).
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
from tools.machine import (fill_times, first_run, header, in_new_process, keep_blocks_below, line,
                     peak_bytes, seconds, training_flop)
from model import PRESETS, ModelConfig, Transformer, shifted
from train import ar_loss

OBJECTIVES = ["ar", "mdlm", "sdtt"]
COLUMNS = (("objective", "<10"), ("form", "<10"), ("preset", "<8"), ("batch", ">5"),
           ("length", ">7"), ("seconds", ">8.3f"), ("spread", ">7.0%"), ("tokens/s", ">9,.0f"),
           ("utilisation", ">12.0%"), ("peak MB", ">8,.0f"))
VOCAB, DT, K = 50257, 1 / 1024, 2


# ---- the plain forms

def plain_ar(model, x, mask_id):
    """train.ar_loss of x (B, L) with all logits at once."""
    logits = model(shifted(x, mask_id))                              # (B, L, V)
    return F.cross_entropy(logits.flatten(0, 1), x.flatten())


def plain_mdlm(model, x, mask_id):
    """diffusion.nelbo of x (B, L) with all log-probabilities at once."""
    t = sample_t(len(x), x.device)
    z = q_sample(x, t, mask_id)
    log_p = F.log_softmax(model(z), dim=-1)                          # (B, L, V)
    nll = -log_p.gather(2, x[..., None])[..., 0]                     # (B, L)
    weight = mask_rate(t) / mask_share(t)                            # (B,)
    return ((z == mask_id) * nll * weight[:, None]).sum() / x.numel()


def plain_sdtt(student, x, teacher, dt, k, kind, mask_id):
    """SDTT's algorithms 1 and 2 with whole tensors; the last step draws nothing here either."""
    t = sample_t(len(x), x.device)
    z_t = z = q_sample(x, t, mask_id)
    target = None
    with torch.no_grad():
        for i in range(k):
            log_p = F.log_softmax(teacher(z), dim=-1)                # (B, L, V)
            masked = (z == mask_id)[..., None]
            target = log_p if i == 0 else torch.where(masked, log_p, target)
            if i < k - 1:
                t_i, s_i = (t - i * dt).clamp(min=0), (t - (i + 1) * dt).clamp(min=0)
                reveal = torch.rand(z.shape, device=z.device) < reveal_share(t_i, s_i)[:, None]
                z = torch.where((z == mask_id) & reveal, categorical(log_p), z)
    every = divergence(F.log_softmax(student(z_t), dim=-1), target, kind)        # (B, L)
    masked = z_t == mask_id
    return (every * masked).sum() / masked.sum().clamp(min=1)


# ---- what is measured

def steps_of(model, teacher):
    """{(objective, form): loss(x)}."""
    sdtt = dict(teacher=teacher, dt=DT, k=K, kind="kld", mask_id=model.mask_id)
    plain, chunks = "plain", "chunked"
    losses = {("ar", chunks): ar_loss, ("ar", plain): plain_ar, ("mdlm", chunks): nelbo,
              ("mdlm", plain): plain_mdlm, ("sdtt", chunks): sdtt_loss, ("sdtt", plain): plain_sdtt}
    losses |= {(objective, "recompute"): losses[objective, chunks] for objective in OBJECTIVES}
    return {(objective, form): functools.partial(
                loss, model, **(sdtt if objective == "sdtt" else {"mask_id": model.mask_id}))
            for (objective, form), loss in losses.items()}


def step(model, objective, form, loss, optimizer, x):
    """One step of training."""
    model.config.attention = "causal" if objective == "ar" else "full"
    model.recompute = form == "recompute"
    loss(x).backward()
    optimizer.step()
    optimizer.zero_grad()


def runs(preset, L, B, vocab, dtype, device):
    """A model, and {(objective, form): function that makes a step of training}."""
    sizes = PRESETS[preset] | {"context": max(L, PRESETS[preset]["context"])}
    seed_all("bench", preset)
    model = Transformer(ModelConfig(vocab, **sizes)).to(device)
    model.bf16 = dtype == "bfloat16"                     # autocast; the weights stay float32
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    x = torch.randint(vocab, (B, L), device=device)
    return model, {(objective, form): functools.partial(
        step, model, objective, form, loss, optimizer, x)
        for (objective, form), loss in steps_of(model, teacher).items()}


def peak_alone(of, *sizes):
    """peak_bytes of a step in a process in which no other form has run: what the C library keeps
    of one's memory would hide how much the next needs."""
    keep_blocks_below(2 ** 20)
    run = runs(*sizes)[1][of]
    run()                                                # makes AdamW's averages
    return peak_bytes(run, sizes[-1])[1]


def bench(c, device, machine):
    """Measure and print the steps of all objectives and forms; returns the rows."""
    rows = []
    print(header(COLUMNS))
    for preset, L, B in itertools.product(c.preset, c.length, c.batch):
        sizes = preset, L, B, VOCAB, c.dtype, device
        model, steps = runs(*sizes)
        running = []
        for of, run in steps.items():
            row = dict(objective=of[0], form=of[1], preset=preset, batch=B, length=L, dtype=c.dtype,
                       params=sum(p.numel() for p in model.parameters()),
                       device=machine["device"], threads=machine["threads"])
            rows.append(row)
            least = 4 * B * L * VOCAB * (8 if of[1] == "plain" else 0)
            times = first_run(row, run, run, least, device)
            if times:
                running.append((row, run, times))
            if times and device.type == "cpu":
                row["peak_bytes"] = in_new_process(peak_alone, of, *sizes)
        for _ in range(c.repeats - 1):
            for _, run, times in running:
                times.append(seconds(run, device))
        for row, _, times in running:
            fill_times(row, times)
            row["utilisation"] = (training_flop(row["objective"], model.config, B, L, DT)
                                  / row["seconds"] / machine["flop_per_s"])
        print("\n".join(line(row, COLUMNS) for row in rows[-9:]), flush=True)
    return rows
