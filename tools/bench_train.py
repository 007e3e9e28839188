"""Speed and memory of training steps.

    python -m tools.bench_train --preset small --batch 2

One step of each objective (loss, gradient, AdamW) with the losses of train.py and
distill.py, not compiled: with chunks of logits at the masked positions only, against the
plain form: logits and log-probabilities (B, L, V) everywhere, as in the papers'
pseudo-code. The two forms have the same loss (tests/test_bench.py). "recompute" is the
first form with --recompute.
"""
import copy
import functools
import itertools
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import seed_all
from data.files import UserError, write_json
from data.processes import start
from data.script import command, device_flag, flag, parse_flags
from diffusion import (categorical, mask_rate, mask_share, nelbo, q_sample, reveal_share,
                       sample_t)
from distill import divergence, sdtt_loss
from model import PRESETS, ModelConfig, Transformer, shifted
from tools.fast_models import warn_of_emulation
from tools.machine import (OutOfMemory, describe, fill_times, header, in_new_process,
                           keep_blocks_below, limits, line, room_for, seconds,
                           training_flop, with_peak_bytes)
from train import ar_loss

COLUMNS = (("objective", "<10"), ("form", "<10"), ("preset", "<8"), ("batch", ">5"),
           ("length", ">7"), ("seconds", ">8.3f"), ("spread", ">7.0%"),
           ("tokens/s", ">9,.0f"), ("utilisation", ">12.0%"), ("peak MB", ">8,.0f"))
VOCAB, DT, K = 50257, 1 / 1024, 2        # GPT-2's tokens, the paper's first round


@dataclass
class BenchTrainConfig:
    """The flags of tools.bench_train."""
    preset: list[str] | None = flag(
        None, "sizes of the model [small]", choices=list(PRESETS))
    batch: list[int] | None = flag(None, "sequences of a step [2]", low=1)
    length: list[int] | None = flag(None, "tokens of a sequence [1024]", low=2)
    repeats: int = flag(3, "timed runs of each", low=1)
    device: str = device_flag()
    dtype: str | None = flag(
        None, "inside the blocks [float32; on a GPU bfloat16]",
        choices=["float32", "bfloat16"])
    threads: int | None = flag(None, "CPU threads [PyTorch's choice]", low=1)
    json: str | None = flag(None, "file for the rows")


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


def plain_sdtt(student, x, teacher, leap, kind, mask_id):
    """SDTT's algorithms 1 and 2 with whole tensors; the last step draws nothing here
    either."""
    dt, k = leap                                         # k steps of size dt
    t = sample_t(len(x), x.device)                                   # (B,)
    z_t = q_sample(x, t, mask_id)                                    # (B, L)
    z, target = z_t, None
    with torch.no_grad():
        for i in range(k):
            log_p = F.log_softmax(teacher(z), dim=-1)                # (B, L, V)
            masked = z == mask_id
            # what is still masked takes this step's prediction
            if target is None:
                target = log_p
            else:
                target = torch.where(masked[..., None], log_p, target)
            if i < k - 1:
                t_i = (t - i * dt).clamp(min=0)
                s_i = (t - (i + 1) * dt).clamp(min=0)
                share = reveal_share(t_i, s_i)[:, None]              # (B, 1)
                reveal = torch.rand(z.shape, device=z.device) < share
                z = torch.where(masked & reveal, categorical(log_p), z)
    every = divergence(F.log_softmax(student(z_t), dim=-1), target, kind)        # (B, L)
    masked = z_t == mask_id
    return (every * masked).sum() / masked.sum().clamp(min=1)


# ---- what is measured

def steps_of(model, teacher):
    """{(objective, form): loss(x)}."""
    mask = dict(mask_id=model.mask_id)
    sdtt = dict(teacher=teacher, leap=(DT, K), kind="kld", mask_id=model.mask_id)
    losses = {}
    for objective, chunked, plain, how in (("ar", ar_loss, plain_ar, mask),
                                           ("mdlm", nelbo, plain_mdlm, mask),
                                           ("sdtt", sdtt_loss, plain_sdtt, sdtt)):
        losses[objective, "chunked"] = functools.partial(chunked, model, **how)
        losses[objective, "plain"] = functools.partial(plain, model, **how)
        # the blocks run again in backward: see `step`
        losses[objective, "recompute"] = functools.partial(chunked, model, **how)
    return losses


def step(model, objective, form, loss, optimizer, x):
    """One step of training on x (B, L)."""
    model.config.attention = "causal" if objective == "ar" else "full"
    model.recompute = form == "recompute"
    loss(x).backward()
    optimizer.step()
    optimizer.zero_grad()


def runs(preset, L, B, vocab, dtype, device):
    """A model, and {(objective, form): function that makes a step of training}."""
    sizes = dict(PRESETS[preset])
    sizes["context"] = max(L, sizes["context"])
    seed_all("bench", preset)
    model = Transformer(ModelConfig(vocab, **sizes)).to(device)
    model.bf16 = dtype == "bfloat16"     # autocast; the weights stay float32
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    x = torch.randint(vocab, (B, L), device=device)
    steps = {}
    for (objective, form), loss in steps_of(model, teacher).items():
        steps[objective, form] = functools.partial(step, model, objective, form, loss,
                                                   optimizer, x)
    return model, steps


def peak_alone(of, *sizes):
    """Peak bytes of a step in a process in which no other form has run: what the C library
    keeps of one's memory would hide how much the next needs."""
    keep_blocks_below(2 ** 20)
    _, steps = runs(*sizes)
    run = steps[of]
    run()                                # makes AdamW's averages
    _, peak = with_peak_bytes(run, sizes[-1])
    return peak


def measure(config, machine, device, preset, L, B):
    """Rows of all objectives and forms in one size."""
    sizes = preset, L, B, VOCAB, config.dtype, device
    model, steps = runs(*sizes)
    params = sum(p.numel() for p in model.parameters())
    rows, running = [], []
    # the first run of each, and its memory
    for (objective, form), run in steps.items():
        row = dict(objective=objective, form=form, preset=preset, batch=B, length=L,
                   dtype=config.dtype, params=params, device=machine["device"],
                   threads=machine["threads"])
        rows.append(row)
        least = 0
        if form == "plain":              # eight float32 arrays (B, L, V)
            least = 8 * 4 * B * L * VOCAB
        try:
            with room_for(least, device):
                run()                    # warm up
                time, row["peak_bytes"] = with_peak_bytes(lambda: seconds(run, device),
                                                          device)
        except OutOfMemory:
            row["error"] = "does not fit in memory"
            continue
        running.append((row, run, [time]))
        if device.type == "cpu":
            row["peak_bytes"] = in_new_process(peak_alone, (objective, form), *sizes)
    # the others in turn
    for _ in range(config.repeats - 1):
        for _, run, times in running:
            times.append(seconds(run, device))
    for row, _, times in running:
        fill_times(row, times)
        flop = training_flop(row["objective"], model.config, B, L, DT)
        row["utilisation"] = flop / row["seconds"] / machine["flop_per_s"]
    return rows


def main():
    config = parse_flags(BenchTrainConfig, __doc__)
    device = start(config.device).device
    if config.dtype is None:
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if config.threads:
        torch.set_num_threads(config.threads)
    warn_of_emulation([config.dtype], device)
    machine = limits(device, getattr(torch, config.dtype))
    print(describe(machine), flush=True)

    rows = []
    print(header(COLUMNS))
    shapes = itertools.product(config.preset or ["small"], config.length or [1024],
                               config.batch or [2])
    for preset, L, B in shapes:
        new = measure(config, machine, device, preset, L, B)
        rows += new
        if config.json:                  # after each size: a run may be stopped
            results = {"argv": sys.argv[1:], "machine": machine, "rows": rows}
            write_json(config.json, results)
        print("\n".join(line(row, COLUMNS) for row in new), flush=True)
    if all("error" in row for row in rows):
        raise UserError("nothing fits in memory; choose a smaller --batch, --length or "
                        "--preset")


if __name__ == "__main__":
    command(main)
