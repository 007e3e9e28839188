"""What several scripts share: devices and processes, optimizers, checkpoints, runs.

Randomness: every random draw here and in diffusion.py comes from torch's global generator,
and `seed_all(seed, step, i)` sets it before each micro-batch i of each step. So a run that
was stopped goes on exactly as it would have. Several processes share the micro-batches of a
step, and each micro-batch gets the same draws whichever process computes it.
"""
import dataclasses
import datetime
import hashlib
import math
import os
import typing
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import UserError, reason, write
from data.foreign import as_today, content_kind, file_kind, folder_kind
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent


# ---- device, processes, seeds

class Processes(typing.NamedTuple):
    """Where this process computes, and which of how many it is."""
    device: torch.device
    rank: int = 0                # of this process; 0 alone writes and prints
    world: int = 1               # how many there are


def start(device):
    """Device and processes: 'auto' | 'cpu' | 'cuda' -> Processes.
    Under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK) the processes are joined, by
    NCCL on GPUs and gloo on the CPU. Raises UserError if CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this PyTorch finds no CUDA GPU; use --device "
                        "cpu")
    if device == "auto":
        # a GPU is used automatically
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # without torchrun there is one process, number 0
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # a GPU for each process of this machine
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)  # for NCCL, and for plain 'cuda'
    # the others may wait for hours while process 0 trains a judge or fills a table
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl",
                                timeout=datetime.timedelta(hours=12))
    return Processes(torch.device(device), rank, world)      # cpu, or cuda:0, cuda:1, ...


def first(procs, f):
    """f(), in process 0 alone, for which all others wait; its UserError is raised in
    all."""
    error = [None]                       # a list, as broadcasts want it
    if procs.rank == 0:
        try:
            f()
        except UserError as e:
            error = [str(e)]             # as text: it goes to all
    if procs.world > 1:
        dist.broadcast_object_list(error, 0)                         # the others wait here
    if error[0]:
        raise UserError(error[0])                                    # in every process


def agree(procs, value, what):
    """Check that all processes hold an equal value (of plain ones, such as a fingerprint).
    Raises UserError in all of them where they do not. what: the value's name, for the
    sentence."""
    if procs.world == 1:
        return
    values = [None for _ in range(procs.world)]
    dist.all_gather_object(values, value)                            # one from each process
    # each process sees the same list, so all raise or none does
    if any(one != values[0] for one in values):
        raise UserError(f"the processes hold different {what} ({values}); --out and the "
                        "dataset must be the same files for all of them")


@torch.no_grad()
def broadcast(model, procs):
    """Give all processes the weights that process 0 has."""
    if procs.world == 1:
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)                                    # into the same memory


def seed_all(*key):
    """Seed torch's global generators with a hash of the key, for example (seed, step,
    i)."""
    # a hash: near keys, as step 1 and step 2, give unrelated seeds
    digest = hashlib.sha256(repr(key).encode()).digest()
    # a signed number of 64 bits, for the CPU and all GPUs
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


# ---- learning rate, optimizers, averaged weights

def lr_factor(step, steps, warmup, final):
    """Linear warm-up to 1, then a cosine to `final` at the last step; final = 1 stays
    constant."""
    if step < warmup:
        return (step + 1) / warmup       # not 0 at the first step
    progress = (step - warmup) / max(1, steps - warmup)              # 0 to 1
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


class Muon(torch.optim.Muon):
    """PyTorch's Muon with products in float32, for a CPU. The original's are in bfloat16,
    which many CPUs only emulate: with AVX2 alone a step of it took four times as long as
    the loss and its gradient (preset nano), and this one takes a quarter of that time."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]
            for w in group["params"]:                                # (out, in), a matrix
                if w.grad is None:
                    continue
                # the average of the gradients (Nesterov's form: the newest counts more)
                average = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                average.lerp_(w.grad, 1 - momentum)
                update = orthogonal(w.grad.lerp(average, momentum),
                                    group["ns_coefficients"], group["ns_steps"])
                # of the size that AdamW's steps have, see make_optimizers
                size = 0.2 * math.sqrt(max(w.shape))
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix, coefficients, steps):
    """About the orthogonal matrix U V^T that is nearest to matrix = U S V^T, by Newton and
    Schulz' iteration: an odd polynomial, applied to the matrix, is applied to each singular
    value, and this one brings all of them near 1 (K. Jordan et al., 2024)."""
    a, b, c = coefficients
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.T     # the products below are then the smaller ones
    x = x / x.norm().clamp(min=1e-7)     # no singular value is above 1
    for _ in range(steps):
        # a S + b S^3 + c S^5
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T


def make_optimizers(model, config):
    """[AdamW on vectors, embedding and head, Muon on the blocks' matrices], or [AdamW] for
    all. Muon's steps are scaled to AdamW's size, so that one learning rate serves both
    (arXiv 2502.16982)."""
    matrices = []
    if config.optimizer == "muon":
        # Muon is for matrices between hidden layers, not for embedding and head
        matrices = [w for w in model.blocks.parameters() if w.ndim == 2]
    ids = {id(w) for w in matrices}      # `w in matrices` would compare numbers
    rest = [w for w in model.parameters() if id(w) not in ids]       # for AdamW
    decay = config.weight_decay
    adamw = torch.optim.AdamW(rest, config.lr, weight_decay=decay, foreach=True)
    if not matrices:                                                 # --optimizer adamw
        return [adamw]
    kind = Muon if matrices[0].device.type == "cpu" else torch.optim.Muon
    muon = kind(matrices, config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


@torch.no_grad()
def ema_update(ema, model, decay, step):
    """ema <- d ema + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)): at first
    the average follows quickly, so that it forgets the random weights of the beginning."""
    d = min(decay, (1 + step) / (10 + step))
    # all tensors in one call: this runs at every step
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


# ---- checkpoints: one file, plain values and tensors only

# what every checkpoint has
KEYS = {"kind", "model_config", "model", "ema", "optimizer", "step", "steps", "seconds",
        "config", "tokenizer"}


def save_checkpoint(path, **content):
    """Save {'format', 'kind', 'model_config', 'model', 'ema', 'tokenizer', 'step', ...}."""
    write(path, lambda f: torch.save({"format": 1, **content}, f))


def load_checkpoint(path, kinds=("mdlm", "sdtt", "ar")):
    """Read a checkpoint onto the CPU. Raises UserError on a missing, foreign or wrong
    one."""
    makers = "train.py, distill.py or tools.convert"                 # for the sentences
    try:
        # weights_only: a file that is not ours cannot run code
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train.py and distill.py make them")
    except OSError as e:
        what = f"cannot be read ({reason(e)})"
        if Path(path).is_dir():
            what = folder_kind(Path(path))
        raise UserError(f"{path} {what}; name a checkpoint of {makers}")
    except Exception as e:       # torch.load fails in many ways on what is not a checkpoint
        raise UserError(f"{path} is not a checkpoint of this project: "
                        f"{file_kind(Path(path), e)}")
    # a file of PyTorch's: is it one of ours, of this format, of the kind that is needed?
    ours = isinstance(content, dict) and content.get("format") == 1
    if not ours or not KEYS <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project: "
                        f"{content_kind(content)}")
    as_today(content)                                                # older versions' words
    if content["kind"] not in kinds:
        raise UserError(f"{path} holds a model of kind {content['kind']!r}, but "
                        f"{' or '.join(kinds)} is needed here")
    return content


def load_model(path, device="cpu", kinds=("mdlm", "sdtt", "ar")):
    """The averaged (EMA) model of a checkpoint in eval mode, and the checkpoint's content.
    Raises UserError, also for weights that are not finite numbers."""
    content = load_checkpoint(path, kinds)
    try:
        # the file says its own sizes; the averaged weights are what is evaluated
        model = Transformer(ModelConfig(**content["model_config"]))
        model.load_state_dict(content["ema"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}: its weights do not fit its model_config ({in_short(e)}); "
                        "make it again, or name another")
    # a diverged run cannot have saved such weights, but other programs can
    if not finite(model):
        raise UserError(f"{path} holds weights that are not finite numbers: its training "
                        "diverged; train anew with a lower --lr")
    return model.to(device).eval(), content                          # no dropout


def in_short(error):
    """The first 150 characters of an exception's message, in one line."""
    return " ".join(str(error).split())[:150]


def finite(model):
    """Whether all weights are finite numbers."""
    return all(bool(w.isfinite().all()) for w in model.parameters())


def fingerprint(model):
    """A short hash of a model's weights: which model a file or a result belongs to."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        # the bytes themselves, whatever the dtype
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]       # 48 bits tell models apart


# ---- a run: training that can be stopped, and goes on from its checkpoint

@dataclasses.dataclass
class Run:
    """A model in training, and what its checkpoint says of it."""
    path: Path                   # of the checkpoint; the log is kept beside it
    steps: int                   # optimizer steps from beginning to end
    model: Transformer
    ema: Transformer             # the averaged weights, which are what is evaluated
    optimizers: list
    content: dict             # what else the checkpoint holds: kind, config, tokenizer, ...
    averaged: int = 0            # steps behind the ema that step 0 began with
    step: int = 0                # steps done
    seconds: float = 0.0         # time they took
    micro: int | None = None    # sequences of a micro-batch so far: the noise depends on it


def save(run):
    """Write run's checkpoint."""
    content = dict(run.content)          # a copy: run keeps its teacher
    # the frozen teacher of a round is kept only as long as the round needs it
    if run.step == run.steps:
        content["teacher"] = None  # half of the file's size
    save_checkpoint(run.path, **content, step=run.step, steps=run.steps,
                    seconds=run.seconds, micro=run.micro,
                    model_config=dataclasses.asdict(run.model.config),
                    model=run.model.state_dict(), ema=run.ema.state_dict(),
                    optimizer=[optimizer.state_dict() for optimizer in run.optimizers])


# what a run's weights come from beside its flags: keys of its checkpoint, each with what is
# said if now there is another one
BOUND = (("tokenizer", "was made with other tokens than {dataset} has now"),
         ("data", "was made from other text than {dataset} holds now"),
         ("origin", "was distilled from another teacher"),
         ("init", "began with other weights than --init holds now"))
# flags that are paths, by the key of what is compared instead: a folder may have moved
PATH_FLAGS = {"data": "dataset", "init": "init"}


def flags_of(saved, Config):
    """The flags that a checkpoint was made with, {name: value}, as Config has them today: a
    flag that is newer than the checkpoint has its default, and one that no longer exists is
    dropped."""
    if "seed" not in saved:      # not made by training, for example by tools.convert
        return saved
    names = {field.name for field in dataclasses.fields(Config)}
    # a flag that is gone is dropped, one that is new has its default
    known = {name: value for name, value in saved.items() if name in names}
    return dataclasses.asdict(Config(**known))


def resume(run, config, free):
    """Put run where its checkpoint stands, if there is one; returns the checkpoint, or
    None. Raises UserError where it was made with other flags than config, but for those
    named in `free`, or from other things than run's, whatever their names: see BOUND."""
    if not run.path.exists():
        return None
    saved = load_checkpoint(run.path, kinds=(run.content["kind"],))

    # the same flags, but for paths whose content the checkpoint knows: see below
    paths = {name for key, name in PATH_FLAGS.items() if saved.get(key)}
    made_with = flags_of(saved["config"], type(config))
    for name, value in dataclasses.asdict(config).items():           # the flags of now
        if name in free or name in paths or made_with.get(name) == value:
            continue
        raise UserError(f"{run.path} was made with --{name} {made_with.get(name)}, not "
                        f"{value}; give the same flag, move the file away, or choose "
                        "another --out")
    # the same tokens, text and weights to begin from
    for key, what in BOUND:
        known = saved.get(key)           # older checkpoints do not have all
        if known is not None and known != run.content.get(key):
            raise UserError(f"{run.path} {what.format(dataset=config.dataset)}; move it "
                            "away (of rounds, all of them), or choose another --out")

    # weights, optimizers and counters
    try:
        run.model.load_state_dict(saved["model"])
        run.ema.load_state_dict(saved["ema"])        # the averaged weights, too
        for optimizer, state in zip(run.optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)         # its moments and counters
    except (ValueError, RuntimeError, KeyError) as e:
        raise UserError(f"{run.path} does not fit the model that it is said to hold "
                        f"({in_short(e)}); move it away, or choose another --out")
    # the loop goes on from this step
    run.step, run.seconds, run.micro = saved["step"], saved["seconds"], saved.get("micro")
    return saved
