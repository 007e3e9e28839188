"""Pretrain what distillation starts from: the MDLM teacher, or the AR baseline and judge.

    python train.py --objective mdlm         # out/stories-nano/teacher.pt
    python train.py --objective ar           # out/stories-nano/ar.pt
    torchrun --standalone --nproc_per_node=8 train.py --preset small --dataset openwebtext ...

Interrupt it at any time: the same command goes on from the last checkpoint, to the same weights.
`fit` is the project's only training loop; distill.py uses it for its rounds.
"""
import contextlib
import copy
import dataclasses
import functools
import json
import math
import shlex
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (GOES_ON, Run, agree, command, ema_update, finite, fingerprint, first,
                    flag, load_checkpoint, load_model, lr_factor, make_optimizers,
                    parse_flags, resume, save, seed_all, start)
from data.dataset import load_data
from data.files import UserError, hold, reason, remedy, to_json, write
from diffusion import nelbo
from model import PRESETS, ModelConfig, Transformer, cross_entropy, shifted


# ---- the flags

@dataclasses.dataclass
class LoopConfig:
    """What train.py and distill.py share."""
    dataset: str = flag("stories", "a folder under data/, or the path of one")
    preset: str = flag("nano", "size of the model", choices=list(PRESETS))
    context: int | None = flag(None, "positions [the preset's, or a row of the dataset]", low=2)
    positions: str | None = flag(None, "rope, learned or both [rope; both where each row of the "
                                 "dataset begins a text]", choices=["rope", "learned", "both"])
    attention: str | None = flag(None, "full, or reveal: in the order of reveal, with an exact KV "
                                 "cache [full; of a given teacher its own]",
                                 choices=["full", "reveal"])
    out: str | None = flag(None, "folder of the results [out/DATASET-PRESET]")
    batch: int = flag(32, "sequences per step, over all processes", low=1)
    micro_batch: int | None = flag(None, "sequences per forward pass [batch / processes]", low=1)
    lr: float = flag(4e-3, "highest learning rate", low=0)
    warmup: int = flag(50, "steps of linear warm-up", low=0)
    final_lr: float = flag(0.1, "last learning rate as a share of the highest", low=0, high=1)
    optimizer: str = flag("muon", "muon: Muon for the hidden matrices, AdamW for the rest",
                          choices=["muon", "adamw"])
    weight_decay: float = flag(0.0, "decoupled weight decay", low=0)
    clip: float = flag(1.0, "largest norm of the gradient; 0: any", low=0)
    dropout: float = flag(0.0, "dropout, in training only", low=0, high=0.9)
    ema: float = flag(0.99, "decay of the averaged weights, which are evaluated", low=0, high=1)
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda"])
    bf16: bool | None = flag(None, "bfloat16 inside the blocks [on a GPU only]")
    compile: bool = flag(False, "compile the blocks with torch.compile")
    recompute: bool = flag(False, "run the blocks again in backward: less memory, a fifth slower")
    log_every: int = flag(200, "steps between log lines", low=1)
    save_every: int = flag(200, "steps between checkpoints", low=1)

    @property
    def folder(self):
        name = f"{Path(self.dataset).name}-{self.preset}"
        if self.attention == "reveal":
            name += "-reveal"
        return Path(self.out or Path("out") / name)


DEFAULT_STEPS = {"mdlm": (1500, 6000), "ar": (300, 1000)}        # on stories, on real text
FILES = {"mdlm": "teacher.pt", "ar": "ar.pt"}
# flags that may change between a run and its continuation: they change no weight
FREE = {"out", "device", "bf16", "compile", "recompute", "log_every", "save_every"}


@dataclasses.dataclass
class TrainConfig(LoopConfig):
    objective: str = flag("mdlm", "mdlm: masked diffusion; ar: next token",
                          choices=["mdlm", "ar"])
    steps: int | None = flag(None, "optimizer steps [mdlm 1500, ar 300; on text 6000, 1000]", low=1)
    init: str | None = flag(None, "checkpoint whose weights, and sizes, training begins with")

    def __post_init__(self):
        if self.steps is None:
            on_stories, on_text = DEFAULT_STEPS[self.objective]
            self.steps = on_stories if self.dataset == "stories" else on_text
            if self.init:                    # it need not begin from nothing
                self.steps //= 3

    @property
    def causal(self):
        return self.objective == "ar"

    @property
    def path(self):
        return self.folder / FILES[self.objective]


# ---- the loop

class Loss(torch.nn.Module):
    """A model with its loss: what DistributedDataParallel needs as one forward pass."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x):
        """x (B, L) -> a scalar, in nats per token."""
        return self.loss(self.model, x)


def fit(c, p, data, run, loss):
    """The training loop: from run.step to run.steps, with a log and checkpoints on the way.
    c: LoopConfig; p: Processes; loss: f(model, x (B, L)) -> scalar, in nats per token.
    Raises UserError at the first loss or gradient that is not a finite number; the last checkpoint
    stays as it was."""
    agree(p, (run.step, run.steps), "steps of " + run.path.name)
    if run.step == run.steps:
        return
    if p.rank == 0:
        rewind_log(run)
    run.micro, count = micro_batches(c, p, run)
    net = Loss(run.model, loss)
    if p.world > 1:
        # the buffers are constants (cos, sin): nothing to broadcast in every step
        net = DistributedDataParallel(net, broadcast_buffers=False)
    run.model.train()
    begin, spent, began = run.step, run.seconds, time.time()
    bad = torch.zeros((), device=p.device)       # the first step that was not finite, 0: none
    with tqdm(total=run.steps, initial=begin, desc=run.path.stem, disable=p.rank > 0,
              mininterval=1, ncols=90) as bar:
        for step in range(begin, run.steps):
            # what happens after this step
            last = step + 1 == run.steps
            shown = (step + 1) % 20 == 0
            logged = last or (step + 1) % c.log_every == 0
            saved = last or (step + 1) % c.save_every == 0

            # the gradient of the global batch, clipped
            total = backward(c, p, data, run, net, count)                # this process's loss
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), c.clip or math.inf)

            # stop before a step that would spoil the weights; on a GPU not at every step, because to
            # read a number there is to wait for it
            fine = total.isfinite() & norm.isfinite()
            bad = torch.where(fine | (bad > 0), bad, step + 1)
            if p.device.type == "cpu" or shown or logged or saved:
                stop_if_not_finite(c, p, run, bad)

            # the step: linear warm-up, then a cosine; then the averaged weights follow
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = c.lr * lr_factor(step, run.steps, c.warmup, c.final_lr)
                optimizer.step()
                optimizer.zero_grad()
            ema_update(run.ema, run.model, c.ema, run.averaged + step)

            # the clock and the bar
            seconds = time.time() - began
            run.step, run.seconds = step + 1, spent + seconds
            speed = (run.step - begin) * c.batch * run.model.config.context / seconds    # tokens/s
            if shown:
                bar.set_postfix_str(f"loss {total.item():.3f}, {speed:,.0f} tokens/s", False)
            bar.update()

            # validation, before anything is saved: the step itself may have been too large
            if logged or saved:
                val_loss = validate(run.ema, loss, data, c, p.device, 4 if logged else 1)
                if not (math.isfinite(val_loss) and finite(run.model)):
                    bad.fill_(run.step)
                    stop_if_not_finite(c, p, run, bad)
            if logged:
                if p.world > 1:
                    dist.all_reduce(total)
                write_log(p, run, loss=total.item() / p.world, tokens_per_s=speed, val_loss=val_loss)
            if saved and p.rank == 0:
                save(run)


def backward(c, p, data, run, net, count):
    """The gradient of one step, left in the parameters; returns this process's loss. The global
    batch is a list of micro-batches, each with a seed of its own, dealt out to the processes in
    turn: so several processes see what one would have seen."""
    total = torch.zeros((), device=p.device)
    for i in range(count):
        seed_all(c.seed, run.path.stem, run.step, i * p.world + p.rank)
        x = data.batch("train", run.micro, run.model.config.context, p.device)       # (micro, L)
        # gradients are averaged between processes after the last micro-batch only
        alone = p.world == 1 or i == count - 1
        with contextlib.nullcontext() if alone else net.no_sync():
            value = net(x) / count
            value.backward()
        total += value.detach()
    return total


def stop_if_not_finite(c, p, run, bad):
    """Raise UserError, in all processes, if `bad`, the first step of any of them whose loss or
    gradient was not finite, is not 0."""
    if p.world > 1:
        bad = bad.clone()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    if not bad:
        return
    kept = "no checkpoint was written yet"
    if run.path.exists():
        kept = f"{run.path} is as it was saved last"
    clip = "" if c.clip else ", or with --clip 1"
    raise UserError(f"{run.path.stem}: the loss or its gradient is no finite number at step "
                    f"{int(bad)} of {run.steps}; {kept}; begin anew in another --out with a lower "
                    f"--lr (it is {c.lr:g}) or a longer --warmup{clip}")


def micro_batches(c, p, run=None):
    """Sequences of a micro-batch, and how many micro-batches each process has in a step.
    Each micro-batch has a seed of its own, so the noise of a run depends on their size. It is
    --micro_batch; else a run that goes on keeps the size that it began with, if it can."""
    share = max(1, c.batch // p.world)
    begun = run.micro if run else None
    micro = c.micro_batch or begun or share
    if c.micro_batch is None and begun and c.batch % (begun * p.world):
        micro = share
        if p.rank == 0:
            print(f"{run.path.stem}: the run began with micro-batches of {begun} sequences, which "
                  f"do not fit {p.world} processes and a batch of {c.batch}. It goes on with "
                  f"{micro}: from here its noise is another than it would have been. (With "
                  "--micro_batch nothing depends on the number of processes.)")
    if c.batch % (micro * p.world):
        raise UserError(f"--batch {c.batch} is not a multiple of {p.world} processes x {micro} "
                        "sequences; choose another --batch or --micro_batch")
    return micro, c.batch // (micro * p.world)


@torch.no_grad()
def validate(model, loss, data, c, device, batches=4):
    """Mean loss on validation text, always with the same text and noise; leaves the RNG alone."""
    total = 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i in range(batches):
            seed_all("validation", i)
            x = data.batch("val", 128 if c.preset == "nano" else 16, model.config.context, device)
            total += loss(model, x).item() / batches
    return total


def write_log(p, run, **entry):
    """One line for the reader, one line of JSON beside the checkpoint."""
    if p.rank == 0:
        tqdm.write(f"{run.path.stem}: step {run.step}, loss {entry['loss']:.4f}, validation "
                   f"{entry['val_loss']:.4f}, {entry['tokens_per_s']:,.0f} tokens/s")
        path = run.path.with_suffix(".jsonl")
        try:
            with open(path, "a") as f:
                f.write(to_json({"step": run.step, **entry}) + "\n")
        except OSError as e:
            raise UserError(f"{path} cannot be written ({reason(e)}); {remedy(e)}")


def rewind_log(run):
    """Drop the lines after run.step: a stop may have come between a line and a checkpoint."""
    path = run.path.with_suffix(".jsonl")
    lines = []
    if path.exists() and run.step:
        lines = path.read_text().split("\n")[:-1]        # what no line end follows is half a line
    kept = [line + "\n" for line in lines if json.loads(line)["step"] <= run.step]
    write(path, lambda f: f.write("".join(kept).encode()))


# ---- pretraining

def prepare_model(model, c, p):
    """Onto the device, with bfloat16 inside the blocks and compiled blocks where asked for."""
    model = model.to(p.device)
    model.bf16 = p.device.type == "cuda" if c.bf16 is None else c.bf16
    model.recompute = c.recompute
    if c.compile:
        for block in model.blocks:           # one is compiled, all share it
            block.compile()
    return model


def as_command(script, c):
    """The command line that gives the config c."""
    defaults, words = dataclasses.asdict(type(c)()), ["python", script]
    for name, value in dataclasses.asdict(c).items():
        if value == defaults[name] and name != "objective":
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def ar_loss(model, x, mask_id):
    """Mean next-token loss of x (B, L), a scalar in nats per token; the start symbol is mask_id."""
    h = model.hidden(shifted(x, mask_id)).flatten(0, 1)              # (B L, C)
    return model.chunked_sum(h, cross_entropy, x.flatten()) / x.numel()


def with_saved_flags(c):
    """c with the flags that its unfinished or finished checkpoint was made with."""
    saved = load_checkpoint(c.path, kinds=(c.objective,))
    if "objective" not in saved["config"]:
        raise UserError(f"{c.path} was made by tools.convert, not by train.py; move it to another "
                        f"folder and give it as --{'judge' if c.causal else 'teacher'}")
    kept = FREE
    if saved.get("data"):                    # resume() compares the data, not their name
        kept = FREE | {"dataset"}
    return dataclasses.replace(c, **{k: v for k, v in saved["config"].items() if k not in kept})


def initial_model(c, data):
    """What training begins with, on the CPU: a new Transformer that fits data, or one of the sizes
    and weights of --init; and a fingerprint of these weights, or None. Raises UserError."""
    attention = "causal" if c.causal else c.attention or "full"
    seed_all(c.seed, c.objective)
    if c.init is None:
        sizes = dict(PRESETS[c.preset])
        sizes["context"] = data.context(c.context or sizes["context"])
        positions = c.positions or ("both" if data.texts else "rope")
        config = ModelConfig(data.tokenizer.vocab, attention=attention, positions=positions,
                             dropout=c.dropout, **sizes)
        # MDLM has no biases in attention: without them tools.convert can export what is trained
        config.attention_bias = not config.relative
        return Transformer(config), None
    kinds = ("ar",) if c.causal else ("mdlm", "sdtt")
    given, content = load_model(c.init, kinds=kinds)
    if content["tokenizer"] != data.tokenizer.spec:
        raise UserError(f"--init {c.init} knows other tokens than {data.folder}; give the --dataset "
                        "it was trained on")
    data.context(given.config.context)       # is there enough of it?
    model = Transformer(dataclasses.replace(given.config, attention=attention, dropout=c.dropout))
    model.load_state_dict(given.state_dict())
    return model, fingerprint(given)


def train(c, p, as_saved=False):
    """Train what TrainConfig c says, or what is left of it; returns the checkpoint's path, where
    the whole file is when it returns, in all processes.
    as_saved: a checkpoint made with other flags goes on with its own instead of being refused."""
    if as_saved and c.path.exists():
        c = with_saved_flags(c)
    data = load_data(c.dataset, p)
    model, init = initial_model(c, data)
    model = prepare_model(model, c, p)
    ema = prepare_model(copy.deepcopy(model).eval(), c, p)
    content = dict(kind=c.objective, config=dataclasses.asdict(c), tokenizer=data.tokenizer.spec,
                   data=data.fingerprint)
    if init:
        content["init"] = init
    run = Run(c.path, c.steps, model, ema, make_optimizers(model, c), content)

    first(p, lambda: hold(c.path))           # one run at a time writes it
    if resume(run, c, FREE) and run.step == run.steps and p.rank == 0:
        print(f"{c.path} is there: {run.steps} steps, {run.seconds:.0f} s")
    loss = {"ar": ar_loss, "mdlm": nelbo}[c.objective]
    fit(c, p, data, run, functools.partial(loss, mask_id=model.mask_id))
    if p.world > 1:
        dist.barrier()                       # process 0 has saved: now the others may read
    return c.path


def main():
    c = parse_flags(TrainConfig, __doc__)
    train(c, start(c.device))


main.stopped = GOES_ON

if __name__ == "__main__":
    command(main)
