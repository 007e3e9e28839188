"""Pretrain what distillation starts from: the MDLM teacher, or the AR baseline and judge.

    python train.py --objective mdlm         # out/stories-nano/teacher.pt
    python train.py --objective ar           # out/stories-nano/ar.pt
    torchrun --standalone --nproc_per_node=8 train.py --preset small --dataset openwebtext ...

Stopped at any moment, the same command goes on from the last checkpoint as if nothing had been.
`fit` is the project's only training loop; distill.py uses it for its rounds.
"""
import contextlib
import copy
import dataclasses
import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (ROOT, UserError, command, flag, load_checkpoint, load_data, parse_flags,
                    save_checkpoint, seed_all, start, write)
from diffusion import nelbo
from model import PRESETS, ModelConfig, Transformer, nll


@dataclass
class LoopConfig:
    """What train.py and distill.py share."""
    dataset: str = flag("stories", "a folder under data/, or the path of one")
    preset: str = flag("nano", "size of the model", choices=list(PRESETS))
    context: int | None = flag(None, "positions [the preset's, or a row of the dataset]", low=2)
    positions: str | None = flag(None, "rope, learned or both [rope; both where each row of the "
                                 "dataset begins a text]", choices=["rope", "learned", "both"])
    out: str | None = flag(None, "folder of the results [out/DATASET-PRESET]")
    batch: int = flag(32, "sequences per step, over all processes", low=1)
    micro_batch: int | None = flag(None, "sequences per forward pass [batch / processes]", low=1)
    lr: float = flag(4e-3, "highest learning rate", low=0)
    warmup: int = flag(50, "steps of linear warm-up", low=0)
    final_lr: float = flag(0.1, "last learning rate as a share of the highest", low=0, high=1)
    optimizer: str = flag("muon", "muon: Muon for the hidden matrices, AdamW for the rest",
                          choices=["muon", "adamw"])
    weight_decay: float = flag(0.0, "decoupled weight decay", low=0)
    clip: float = flag(1.0, "largest norm of the gradient", low=0)
    dropout: float = flag(0.0, "dropout, in training only", low=0, high=0.9)
    ema: float = flag(0.99, "decay of the averaged weights, which are what is evaluated", low=0,
                      high=1)
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])
    bf16: bool | None = flag(None, "bfloat16 inside the blocks [on a GPU only]")
    compile: bool = flag(False, "compile the blocks with torch.compile")
    log_every: int = flag(200, "steps between log lines", low=1)
    save_every: int = flag(200, "steps between checkpoints", low=1)

    @property
    def folder(self):
        return Path(self.out or Path("out") / f"{Path(self.dataset).name}-{self.preset}")


@dataclass
class TrainConfig(LoopConfig):
    objective: str = flag("mdlm", "mdlm: masked diffusion; ar: next token",
                          choices=["mdlm", "ar"])
    steps: int | None = flag(None, "optimizer steps [mdlm 1500, ar 300]", low=1)

    def __post_init__(self):
        self.steps = self.steps or {"mdlm": 1500, "ar": 300}[self.objective]

    @property
    def path(self):
        return self.folder / {"mdlm": "teacher.pt", "ar": "ar.pt"}[self.objective]


FREE = {"out", "device", "bf16", "compile", "log_every", "save_every"}  # may change in a resume


def lr_factor(step, steps, warmup, final):
    """Linear warm-up to 1, then a cosine to `final` at the last step; final = 1 stays constant."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizers(model, c):
    """[Muon on the blocks' matrices, AdamW on the rest], or [AdamW]. Muon's steps are scaled to
    AdamW's size, so that one learning rate serves both (arXiv 2502.16982)."""
    matrices = [w for w in model.blocks.parameters() if w.ndim == 2 and c.optimizer == "muon"]
    ids = {id(w) for w in matrices}
    rest = [w for w in model.parameters() if id(w) not in ids]
    adamw = torch.optim.AdamW(rest, c.lr, weight_decay=c.weight_decay, foreach=True)
    return [adamw] if not matrices else [adamw, torch.optim.Muon(
        matrices, c.lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw")]


@torch.no_grad()
def ema_update(ema, model, decay, step):
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)), a warm-up."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


@torch.no_grad()
def validate(model, loss, data, c, device, batches=4):
    """Mean loss on validation text, always with the same text and noise; leaves the RNG alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        total = 0.0
        for i in range(batches):
            seed_all("validation", i)
            x = data.batch("val", 128 if c.preset == "nano" else 16, model.config.context, device)
            total += loss(model, x).item() / batches
    return total


def backward(c, p, net, model, data, loss, name, step):
    """One step's gradient of the mean loss over the global batch, left in the parameters; returns
    this process's share of the loss. The batch is a list of micro-batches, each with a seed of
    its own, dealt out to the processes in turn; gradients are averaged after the last."""
    micro = c.micro_batch or c.batch // p.world                      # sequences
    count = c.batch // micro // p.world                              # micro-batches per process
    total = torch.zeros((), device=p.device)
    for i in range(count):
        seed_all(c.seed, name, step, i * p.world + p.rank)
        x = data.batch("train", micro, model.config.context, p.device)       # (micro, L)
        alone = p.world == 1 or i == count - 1
        with contextlib.nullcontext() if alone else net.no_sync():
            value = loss(net, x) / count
            value.backward()
        total += value.detach()
    return total


def rewind_log(path, done):
    """Drop the lines after step `done`: a stop may have come between a line and a checkpoint."""
    lines = path.read_text().splitlines(True) if path.exists() and done else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done]
    write(path, lambda f: f.write("".join(kept).encode()))


def fit(c, p, name, data, model, ema, optimizers, loss, path, save, done, steps, before=0):
    """The training loop: model and ema are trained in place from step `done` to `steps`.

    c: LoopConfig; p: Processes; name: of the run, part of every seed; loss: f(model, x (B, L)) ->
    scalar; path: of the checkpoint, beside which the log is kept; save(step, seconds): writes the
    checkpoint; before: steps that ema has seen in earlier runs. Returns the seconds it took.
    """
    if done >= steps:
        return 0.0
    if p.rank == 0:
        rewind_log(path.with_suffix(".jsonl"), done)
    net = DistributedDataParallel(model) if p.world > 1 else model
    model.train()
    began = time.time()
    bar = tqdm(total=steps, initial=done, desc=name, disable=p.rank > 0, mininterval=1, ncols=90)
    for step in range(done, steps):
        total = backward(c, p, net, model, data, loss, name, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = c.lr * lr_factor(step, steps, c.warmup, c.final_lr)
            optimizer.step()
            optimizer.zero_grad()
        ema_update(ema, model, c.ema, before + step)
        now, seconds = step + 1, time.time() - began
        speed = (now - done) * c.batch * model.config.context / seconds
        if now % 20 == 0:                            # reading the loss waits for the GPU
            bar.set_postfix_str(f"loss {total.item():.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if now % c.log_every == 0 or now == steps:
            if p.world > 1:
                dist.all_reduce(total)
            write_log(p, name, path, step=now, loss=total.item() / p.world, tokens_per_s=speed,
                      val_loss=validate(ema, loss, data, c, p.device))
        if p.rank == 0 and (now % c.save_every == 0 or now == steps):
            save(now, seconds)
    bar.close()
    return time.time() - began


def write_log(p, name, path, **entry):
    """One line for the reader, one line of JSON beside the checkpoint."""
    if p.rank == 0:
        tqdm.write(f"{name}: step {entry['step']}, loss {entry['loss']:.4f}, validation "
                   f"{entry['val_loss']:.4f}, {entry['tokens_per_s']:,.0f} tokens/s")
        with open(path.with_suffix(".jsonl"), "a") as f:
            f.write(json.dumps(entry) + "\n")


# ---- checkpoints of a run, and running one

def state(model, ema, optimizers):
    """What a checkpoint holds of a run (common.save_checkpoint)."""
    return dict(model_config=dataclasses.asdict(model.config), model=model.state_dict(),
                ema=ema.state_dict(), optimizer=[o.state_dict() for o in optimizers])


def load_state(saved, model, ema, optimizers):
    """Put a checkpoint's state back."""
    model.load_state_dict(saved["model"])
    ema.load_state_dict(saved["ema"])
    for optimizer, content in zip(optimizers, saved["optimizer"], strict=True):
        optimizer.load_state_dict(content)


def check_same(path, saved, c, free):
    """Raise UserError where a checkpoint was made with other flags than c, but for the `free`."""
    for key, value in dataclasses.asdict(c).items():
        if key not in free and saved[key] != value:
            raise UserError(f"{path} was made with --{key} {saved[key]}, not {value}; give the "
                            "same flag, remove the file, or choose another --out")


def prepare_model(model, c, p):
    """Onto the device, with bfloat16 blocks and compiled where asked for."""
    model = model.to(p.device)
    model.bf16 = c.bf16 if c.bf16 is not None else p.device.type == "cuda"
    if c.compile:
        model.hidden = torch.compile(model.hidden)
    return model


def as_command(script, c):
    """The command line that gives the config c."""
    flags = [f"--{f.name} {getattr(c, f.name)}" for f in dataclasses.fields(c)
             if getattr(c, f.name) != type(c)().__dict__[f.name] or f.name == "objective"]
    return " ".join(["python", script] + flags)


def ar_loss(model, x, mask_id):
    """Mean next-token loss of x (B, L), a scalar in nats per token; the start symbol is mask_id."""
    return nll(model, x, mask_id).mean()


def train(c, p, as_saved=False):
    """Train what TrainConfig c says, or what is left of it; returns the checkpoint's path.

    as_saved: a checkpoint made with other flags goes on with its own instead of being refused.
    """
    saved = load_checkpoint(c.path, kinds=(c.objective,)) if c.path.exists() else None
    if saved and as_saved:
        c = dataclasses.replace(c, **{k: v for k, v in saved["config"].items() if k not in FREE})
    if saved:
        check_same(c.path, saved["config"], c, FREE)
    done, spent = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    if done >= c.steps:
        if p.rank == 0:
            print(f"{c.path} is there: {done} steps, {spent:.0f} s")
        return c.path
    data = load_data(c.dataset, p)
    sizes = PRESETS[c.preset] | {"context": data.context(c.context or PRESETS[c.preset]["context"])}
    seed_all(c.seed, c.objective)
    config = ModelConfig(data.tokenizer.vocab, causal=c.objective == "ar", dropout=c.dropout,
                         positions=c.positions or ("both" if data.stride else "rope"), **sizes)
    model = Transformer(config).to(p.device)
    ema, optimizers = copy.deepcopy(model).eval(), make_optimizers(model, c)
    if saved:
        load_state(saved, model, ema, optimizers)
    loss = functools.partial({"ar": ar_loss, "mdlm": nelbo}[c.objective], mask_id=model.mask_id)

    def save(step, seconds):
        save_checkpoint(c.path, kind=c.objective, step=step, steps=c.steps,
                        seconds=spent + seconds, config=dataclasses.asdict(c),
                        tokenizer=data.tokenizer.spec, **state(model, ema, optimizers))
    fit(c, p, c.path.stem, data, prepare_model(model, c, p), prepare_model(ema, c, p), optimizers,
        loss, c.path, save, done, c.steps)
    return c.path


def main():
    c = parse_flags(TrainConfig, __doc__)
    train(c, start(c.device))


if __name__ == "__main__":
    command(main)
