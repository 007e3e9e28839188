"""Pretrain what distillation starts from: the masked diffusion (MDLM) teacher, or the AR
baseline and judge.

    python train.py --objective mdlm         # out/stories-nano/teacher.pt
    python train.py --objective ar           # out/stories-nano/ar.pt
    torchrun --standalone --nproc_per_node=8 train.py --preset small --dataset openwebtext

Interrupt it at any time: the same command goes on from the last checkpoint, and ends with
the same weights. `fit` is the project's only training loop: distill.py's rounds use it too.
Seeds and optimizers are in common.py. Checkpoints, and the class Run, which is a training
run that can be resumed, are in data/checkpoints.py, the guard against NaN in data/watch.py,
several processes in data/processes.py: all that touches files, or is no part of the method,
is under data/.
"""
import contextlib
import copy
import dataclasses
import functools
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import ema_update, lr_factor, make_optimizers, seed_all
from data.checkpoints import Run, model_from, resume, save, with_saved_flags
from data.dataset import load_data
from data.files import UserError, hold
from data.log import rewind_log, write_log
from data.processes import agree, run_in_first, start
from data.script import GOES_ON, command, device_flag, flag, parse_flags
from data.watch import Clock, Guard
from diffusion import nelbo
from exact import order_loss
from model import PRESETS, SHORT, ModelConfig, Transformer, cross_entropy, shifted


# ---- pretraining. Names that are used from here on:
#
# config    the flags: a LoopConfig, at the end of the file
# procs     the processes: this one is number .rank of .world, on .device
# run       a Run, all that a checkpoint keeps:
#     .path           the file
#     .step, .steps   steps done, and all of them
#     .model, .ema    the model, and its averaged copy, in eval mode
#     .optimizers     with their state
#     .content        what else the file says
#     .seconds        time that they took so far
#     .micro          sequences of a micro-batch, see micro_batches
#     .updates_before updates of ema in earlier rounds; 0 in train.py
# loss      f(model, x, keep=keep) -> scalar, a mean over tokens (in distill.py over masked
#           ones). It draws its own noise: t and the masks
# data      the dataset: data.batch draws x and keep; data.texts: whether each row begins a
#           text
# x         a batch of clean tokens (B, L)
# keep      bool (B, L): True for a prompt's tokens, which are never masked and have no
#           loss; None if there are no prompts

def prepare_model(model, config, procs):
    """The model on the device. On a GPU its blocks compute in bfloat16 and are compiled,
    unless a flag says no; on a CPU they do so only if a flag says yes."""
    model = model.to(procs.device)                                   # weights stay float32
    model.recompute = config.recompute   # see Transformer.run
    on_gpu = procs.device.type == "cuda"
    # few CPUs are faster in bfloat16
    model.bf16 = on_gpu if config.bf16 is None else config.bf16
    # on a CPU compiling takes a minute and needs a C++ compiler
    compiled = on_gpu if config.compile is None else config.compile
    if compiled:
        for block in model.blocks:       # the same code in each: compiled once
            block.compile()
    return model


def ar_loss(model, x, mask_id, keep=None):
    """Mean next-token loss of x (B, L), a scalar in nats per token; tokens to keep (B, L)
    do not count. mask_id: an AR model masks nothing, so this id is its start symbol."""
    # the state that has read a token's predecessors predicts it
    h = model.hidden(shifted(x, mask_id)).flatten(0, 1)              # (B L, C)
    target = x.flatten()                                             # (B L,)
    if keep is not None:
        h, target = h[~keep.flatten()], target[~keep.flatten()]
    # never all logits at once, not even for backward, see chunked_sum
    return model.chunked_sum(h, cross_entropy, target) / len(target)


def new_model(config, data):
    """A Transformer with random weights that fits the data, on the CPU. Raises UserError
    where there are not enough data for it."""
    # the preset's sizes, with what the data or a flag say
    sizes = dict(PRESETS[config.preset])
    sizes["context"] = data.context(config.context or sizes["context"])
    sizes["attention"] = config.attention or "full"
    if config.causal:
        sizes["attention"] = "causal"    # whatever --attention says
    # if every row of the data begins a text, absolute positions carry information, too
    sizes["positions"] = config.positions or ("both" if data.texts else "rope")
    model_config = ModelConfig(data.tokenizer.vocab, dropout=config.dropout, **sizes)
    # attention's linear layers have biases, as in GPT-2; but none in a diffusion model with
    # rope alone, as in the published MDLM
    model_config.attention_bias = config.causal or model_config.positions != "rope"
    return Transformer(model_config)


def train(config, procs, as_saved=False):
    """Train what a TrainConfig says, or what is left of it. Returns the checkpoint's path;
    by then the file is complete, for all processes.
    as_saved: a checkpoint made with other flags goes on with those; without as_saved it is
    refused."""
    if as_saved and config.path.exists():
        config = with_saved_flags(config, MAY_CHANGE)
    data = load_data(config.dataset, procs)          # stories are made if missing

    # the model, and what its checkpoint stores beside the weights
    content = dict(kind=config.objective, config=dataclasses.asdict(config),
                   tokenizer=data.tokenizer.spec, data=data.fingerprint)
    seed_all(config.seed, config.objective)          # for the random weights
    if config.init is None:
        model = new_model(config, data)
    else:
        model, fingerprint = model_from(config, data)
        content["init"] = fingerprint    # of the weights that it begins with
    ema = prepare_model(copy.deepcopy(model).eval(), config, procs)  # the averaged copy
    model = prepare_model(model, config, procs)
    optimizers = make_optimizers(model, config)                      # Muon and AdamW
    run = Run(config.path, config.steps, model, ema, optimizers, content)

    # go on where the checkpoint stands, if there is one
    run_in_first(procs, lambda: hold(config.path))       # a lock: one run at a time
    saved = resume(run, config, MAY_CHANGE)      # weights, optimizers, counters into run
    if saved and run.step == run.steps and procs.rank == 0:
        print(f"{config.path} is there: {run.steps} steps, {run.seconds:.0f} s")

    # what is minimized: for diffusion the bound, for AR the next-token loss, -log p itself
    loss = functools.partial(nelbo, mask_id=model.mask_id)
    if config.causal:
        loss = functools.partial(ar_loss, mask_id=model.mask_id)
    # and what is shown of validation text: the same; but with attention "reveal" one pass
    # (exact.py) scores each token given those before it in a random order: the same bound
    # with less noise (but it gives no gradient to train with)
    val_loss = None
    if model.config.attention == "reveal":
        val_loss = functools.partial(order_loss, mask_id=model.mask_id)
    fit(config, procs, data, run, loss, val_loss)
    if procs.world > 1:
        dist.barrier()                   # process 0 has saved: now the others may read
    return config.path


# ---- the loop

def fit(config, procs, data, run, loss, val_loss=None):
    """The training loop: from run.step to run.steps, with a log and checkpoints on the way.
    config: LoopConfig; procs: Processes; run: a Run; loss: a function, see above; val_loss:
    the loss of validation, if different.
    Raises UserError if a loss or gradient becomes NaN or infinite (on a GPU up to 20 steps
    later), and always before such weights are saved."""
    # every process reads the checkpoint: is it the same file for all?
    agree(procs, (run.step, run.steps), "steps of " + run.path.name)
    if run.step == run.steps:
        return
    if procs.rank == 0:
        rewind_log(run)                  # without lines from after the last checkpoint

    # the batch of a step, `count` micro-batches in each process
    run.micro, count = micro_batches(config, procs, run)
    # the model with its loss; with several processes, wrapped in DDP
    net = with_loss(run.model, loss, procs)                          # x, keep -> scalar
    run.model.train()                    # dropout, if any, is on
    begin = run.step                     # not 0 if the run was stopped
    clock, guard = Clock(config, run), Guard(config, procs, run)
    with tqdm(total=run.steps, initial=begin, desc=run.path.stem, disable=procs.rank > 0,
              mininterval=1, ncols=90) as bar:
        for step in range(begin, run.steps):
            # what is to be done after this step
            last = step + 1 == run.steps
            show_now = (step + 1) % 20 == 0
            log_now = last or (step + 1) % config.log_every == 0
            save_now = last or (step + 1) % config.save_every == 0

            # the gradient of the global batch, clipped; and the mean loss in this process
            loss_here = forward_backward(config, procs, data, run, step, net, count)
            norm = clip_gradient(run.model, config.clip)

            # reading a number makes the CPU wait for a GPU, so on a GPU NaN is looked for
            # every 20 steps only, and before each log line and checkpoint
            guard.record(loss_here, norm)
            if procs.device.type == "cpu" or show_now or log_now or save_now:
                guard.check_losses()

            # the step; then the averaged weights. Their decay begins low and rises to
            # config.ema: so the random first weights are soon forgotten. (In distill.py the
            # updates of earlier rounds count, too)
            optimizer_step(config, run, step)
            ema_update(run.ema, run.model, config.ema, run.updates_before + step)
            run.step = step + 1          # steps done

            # the clock and the bar, which shows process 0's loss
            speed = clock.tick()
            if show_now:
                text = f"loss {loss_here.item():.3f}, {speed:,.0f} tokens/s"
                bar.set_postfix_str(text, refresh=False)     # shown at the next update
            bar.update()

            # validation: 4 batches for a log line, 1 before a save, as a guard: loss_here
            # is of the weights before this step, so NaN made by it shows only here. (All
            # processes get the same value, and so stop together)
            if log_now or save_now:
                batches = 4 if log_now else 1
                value = validate(run.ema, val_loss or loss, data, config, batches)
                guard.check_validation(value)
            if log_now:
                loss_of_all = loss_here.clone()
                if procs.world > 1:
                    dist.all_reduce(loss_of_all)     # the sum over processes
                write_log(procs, run, loss=loss_of_all.item() / procs.world,
                          tokens_per_s=speed, val_loss=value)
            # process 0 saves for all: their weights are equal
            if save_now and procs.rank == 0:
                save(run)                                            # whole or not at all


def forward_backward(config, procs, data, run, step, net, count):
    """The gradient of one step, left in the parameters; returns this process's loss, a
    scalar. The global batch is a list of micro-batches, each with a seed of its own, dealt
    out to the processes in turn: with the same --micro_batch several processes see exactly
    what one would see."""
    total = torch.zeros((), device=procs.device)     # read only when it is shown
    for i in range(count):
        # all that is drawn below (texts, noise, dropout) comes from a seed of its own: that
        # of this kind of run ("teacher", "round1", ...), step and micro-batch. So a resumed
        # run repeats exactly
        seed_all(config.seed, run.path.stem, step, i * procs.world + procs.rank)
        x, keep = data.batch("train", run.micro, run.model.config.context, procs.device)
        # DDP averages over the processes in the backward pass of the last micro-batch only
        mode = contextlib.nullcontext()
        if procs.world > 1 and i < count - 1:
            mode = net.no_sync()
        with mode:
            # x (micro, L). backward adds gradients up, and their mean is wanted: / count
            value = net(x, keep) / count
            value.backward()
        total += value.detach()
    return total


def clip_gradient(model, largest):
    """Scale the gradient down to the norm `largest` at most (0: no clipping); returns the
    norm that it had."""
    if largest == 0:
        largest = math.inf               # the norm is wanted anyway, to look for NaN
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)


def optimizer_step(config, run, step):
    """One step of each optimizer, at the learning rate of step number `step`."""
    # linear warm-up, then a cosine
    factor = lr_factor(step, run.steps, config.warmup, config.final_lr)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor     # one rate: Muon's steps have AdamW's size
        optimizer.step()                 # see common.make_optimizers
        optimizer.zero_grad()            # the next step's gradient begins at zero


@torch.no_grad()
def validate(model, loss, data, config, batches=4):
    """Mean loss on validation text of a model in eval mode. Text and noise are the same
    each time, and the random state is restored afterwards."""
    device = model.embed.weight.device
    size = 128 if config.preset in SHORT else 16         # sequences, more of short ones
    total = 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i in range(batches):         # 4 for a log line, 1 for a save
            seed_all("validation", i)                    # the noise of batch i
            # (size, L) both; keep is None where the data have no prompts
            x, keep = data.batch("val", size, model.config.context, device)
            total += loss(model, x, keep=keep).item() / batches
    return total


# ---- several processes, and micro-batches; skip it at a first reading

class ModelWithLoss(torch.nn.Module):
    """A model and its loss as one forward pass, which DistributedDataParallel needs."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x, keep):
        """x (B, L), keep (B, L) or None -> a scalar, see fit."""
        return self.loss(self.model, x, keep=keep)


def with_loss(model, loss, procs):
    """A module (x, keep) -> this process's loss, a scalar; its backward averages the
    gradients over all processes."""
    net = ModelWithLoss(model, loss)
    if procs.world == 1:
        return net
    # the gradients are views into the memory that is sent: no copy
    net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    # the buffers (cos, sin) are constants: do not broadcast them in every step. (Not an
    # argument above, as some versions of PyTorch warn about it)
    net.broadcast_buffers = False
    return net


def micro_batches(config, procs, run=None):
    """(micro, count): sequences of a micro-batch, micro-batches of each process in a step.
    micro is --micro_batch, if given; else the size that the run used before, if it still
    fits; else batch / processes. Another size means different noise: a run that must change
    it says so. Raises UserError if the batch cannot be divided."""
    before = run.micro if run else None      # no run: only the flags are looked at
    fits = before is not None and config.batch % (before * procs.world) == 0
    if config.micro_batch is not None:
        micro = config.micro_batch
    elif fits:
        micro = before
    else:
        micro = max(1, config.batch // procs.world)      # 1 if too few: refused below
        if before and procs.rank == 0:
            print(f"{run.path.stem}: the run began with micro-batches of {before} "
                  f"sequences, which do not fit {procs.world} processes and a batch of "
                  f"{config.batch}. It goes on with {micro}: from here on it draws "
                  "different noise. (With --micro_batch nothing depends on the number of "
                  "processes.)")
    # the mean over micro-batches is the batch's mean for a loss per token; with prompts, or
    # distill.py's loss per mask, nearly so
    if config.batch % (micro * procs.world):
        raise UserError(f"--batch {config.batch} is not a multiple of {procs.world} "
                        f"processes x {micro} sequences; choose another --batch or "
                        "--micro_batch")
    return micro, config.batch // (micro * procs.world)


# ---- the flags; [in brackets]: the default, where it depends on other things

@dataclasses.dataclass
class LoopConfig:
    """What train.py and distill.py share."""
    # what is trained, on what, and where it goes
    dataset: str = flag("stories", "a folder under data/, or the path of one")
    preset: str = flag("nano", "size of the model", choices=list(PRESETS))
    context: int | None = flag(
        None, "tokens of a sequence [the preset's, or a row of the dataset]", low=2)
    positions: str | None = flag(
        None, "rope, learned or both [rope; both where each row of the dataset begins a "
        "text]",
        choices=["rope", "learned", "both"])
    attention: str | None = flag(
        None, "of diffusion models: full, or reveal: in the order of reveal, with an exact "
        "KV cache [full; in distill.py that of --teacher, if given]",
        choices=["full", "reveal"])
    out: str | None = flag(
        None, "folder of the results [out/DATASET-PRESET, with --attention reveal "
        "out/DATASET-PRESET-reveal]")

    # the batch. Each micro-batch draws texts and noise from a seed of its own, so another
    # size is another run
    batch: int = flag(32, "sequences per step, over all processes", low=1)
    micro_batch: int | None = flag(
        None, "sequences per forward pass [batch / processes]", low=1)

    # the optimizer: linear warm-up, then a cosine
    lr: float = flag(4e-3, "highest learning rate", low=0)
    warmup: int = flag(50, "steps of linear warm-up", low=0)
    final_lr: float = flag(
        0.1, "last learning rate as a share of the highest", low=0, high=1)
    # Muon: see common.make_optimizers
    optimizer: str = flag("muon", "muon: Muon for the hidden matrices, AdamW for the rest",
                          choices=["muon", "adamw"])
    weight_decay: float = flag(0.0, "decoupled weight decay", low=0)
    clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", low=0)
    dropout: float = flag(0.0, "dropout, in training only", low=0, high=0.9)
    ema: float = flag(
        0.99, "decay of the averaged weights, which are evaluated", low=0, high=1)
    seed: int = flag(0, "seed of everything random")

    # where and how it runs: bf16 and compile change rounding only; another kind of device
    # also draws different noise
    device: str = device_flag()
    bf16: bool | None = flag(None, "bfloat16 inside the blocks [on a GPU only]")
    compile: bool | None = flag(
        None, "compile the blocks with torch.compile [on a GPU only]")
    recompute: bool = flag(
        False, "run the blocks again in backward: less memory, more arithmetic")
    log_every: int = flag(200, "steps between log lines", low=1)
    save_every: int = flag(200, "steps between checkpoints", low=1)

    @property
    def folder(self):                    # of checkpoints, logs and results
        name = f"{Path(self.dataset).name}-{self.preset}"
        if self.attention == "reveal":
            name += "-reveal"
        return Path(self.out or Path("out") / name)


DEFAULT_STEPS = {"mdlm": (1500, 6000), "ar": (300, 1000)}        # on stories, on real text
# names of the checkpoints, in the folder of results
FILES = {"mdlm": "teacher.pt", "ar": "ar.pt"}
# flags that may change between a run and its continuation
MAY_CHANGE = {"out", "device", "bf16", "compile", "recompute", "log_every", "save_every"}


@dataclasses.dataclass
class TrainConfig(LoopConfig):
    """The flags of train.py."""
    objective: str = flag("mdlm", "mdlm: masked diffusion; ar: next token",
                          choices=["mdlm", "ar"])
    steps: int | None = flag(
        None, "optimizer steps [mdlm 1500, ar 300; on text 6000, 1000; with --init a "
        "third]", low=1)
    init: str | None = flag(
        None, "checkpoint whose weights, and sizes, training begins with")

    def __post_init__(self):
        if self.steps is None:
            on_stories, on_text = DEFAULT_STEPS[self.objective]
            stories = Path(self.dataset).name == "stories"
            # real text has more to learn than stories
            self.steps = on_stories if stories else on_text
            if self.init:                # it need not begin from nothing
                self.steps //= 3

    @property
    def causal(self):
        return self.objective == "ar"                                # AR sees the past only

    @property
    def path(self):
        return self.folder / FILES[self.objective]


def main():
    config = parse_flags(TrainConfig, __doc__)
    train(config, start(config.device))


if __name__ == "__main__":
    command(main, stopped=GOES_ON)       # after Ctrl-C: that the same command goes on
