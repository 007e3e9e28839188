"""What several scripts share: errors, flags, devices and processes, optimizers, checkpoints.

Randomness: every random draw here and in diffusion.py comes from torch's global generator, and
`seed_all(seed, step, i)` sets it before each micro-batch i of each step. So a run that was stopped
goes on exactly as it would have, and two processes draw what one process would have drawn.
"""
import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import math
import os
import sys
import typing
from pathlib import Path

import torch
import torch.distributed as dist

from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend: one sentence that names it and the remedy."""


def command(main):
    """Run a script's main; end in one sentence on stderr and status 2 where the user can help."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def package(name):
    """An optional package, imported. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        called = {"mauve": "mauve-text", "PIL": "pillow"}.get(name, name.split(".")[0])
        raise UserError(f"this needs {called} (pip install {called})")


# ---- flags: a dataclass whose fields are made by flag() is a script's command line

def flag(default, help, choices=None, low=None, high=None):
    """A dataclass field that is also a flag; low and high are the least and largest value."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices,
                                                            low=low, high=high))


def parse_flags(Config, description, argv=None, **positional):
    """argv (sys.argv unless given) -> a Config. positional: name=help of arguments without --.
    Exits with usage and status 2 on an unknown, ill-typed or out-of-range flag."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(Config)
    for name, text in positional.items():
        many = dict(nargs="+") if typing.get_origin(hints[name]) is list else {}
        parser.add_argument(name, help=text, **many)
    fields = [f for f in dataclasses.fields(Config) if f.metadata]
    for f in fields:
        kind = (typing.get_args(hints[f.name]) or (hints[f.name],))[0]       # int | None -> int
        many = dict(nargs="+") if typing.get_origin(kind) is list else {}    # list[int] -> int
        kind = (typing.get_args(kind) or (kind,))[0]
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
               dict(type=kind, choices=f.metadata["choices"], **many))
        parser.add_argument(f"--{f.name}", default=f.default, **how,
                            help=(f.metadata["help"] + f" [{f.default}]" * (f.default is not None)
                                  ).replace("%", "%%"))
    args = parser.parse_args(argv)
    for f in fields:
        values, low, high = getattr(args, f.name), f.metadata["low"], f.metadata["high"]
        for value in values if isinstance(values, list) else [values]:
            if value is not None and (low is not None and not value >= low
                                      or high is not None and not value <= high):
                parser.error(f"argument --{f.name}: {value} is not " + (
                    f"between {low} and {high}" if high is not None else f"{low} or more"))
    return Config(**vars(args))


# ---- device, processes, seeds

class Processes(typing.NamedTuple):
    device: torch.device
    rank: int = 0                    # of this process; 0 alone writes and prints
    world: int = 1                   # how many there are


def start(device):
    """Device and processes: 'auto' | 'cpu' | 'cuda' -> Processes.
    Under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK) the processes are joined, by NCCL on
    GPUs and gloo on the CPU. Raises UserError if CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this PyTorch finds no CUDA GPU; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl",
                                timeout=datetime.timedelta(hours=12))
    return Processes(torch.device(device), rank, world)


def seed_all(*key):
    """Seed torch's global generators with a hash of the key, for example (seed, step, i)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


# ---- learning rate, optimizers, averaged weights

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


# ---- checkpoints: one file, plain values and tensors only

def write(path, to_file):
    """Write a file so that a stop at any moment leaves the old or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            to_file(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                 # torch.save may wrap the OSError
        with contextlib.suppress(OSError):               # there may be none, nor its folder
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({e}); make room or choose another folder")


KEYS = {"kind", "model_config", "model", "ema", "optimizer", "step", "steps", "seconds", "config",
        "tokenizer"}


def save_checkpoint(path, **content):
    """Save {'format', 'kind', 'model_config', 'model', 'ema', 'tokenizer', 'step', ...}."""
    write(path, lambda f: torch.save({"format": 1, **content}, f))


def load_checkpoint(path, kinds=("mdlm", "sdtt", "ar")):
    """Read a checkpoint onto the CPU. Raises UserError on a missing, foreign or wrong one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != 1 or not KEYS <= content.keys():
            raise ValueError("another format")
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train.py and distill.py make them")
    except Exception as e:           # torch.load fails in many ways on what is not a checkpoint
        raise UserError(f"{path} is not a whole checkpoint of this project "
                        f"({type(e).__name__}); delete it to have it made again")
    if "causal" in (sizes := content["model_config"]):       # of checkpoints before `attention`
        sizes["attention"] = "causal" if sizes.pop("causal") else "full"
    if content["kind"] not in kinds:
        raise UserError(f"{path} holds a model of kind {content['kind']!r}, but "
                        f"{' or '.join(kinds)} is needed here")
    return content


def load_model(path, device="cpu", kinds=("mdlm", "sdtt", "ar")):
    """The averaged (EMA) model of a checkpoint in eval mode, and the checkpoint's other content."""
    content = load_checkpoint(path, kinds)
    model = Transformer(ModelConfig(**content["model_config"]))
    model.load_state_dict(content["ema"])
    return model.to(device).eval(), content


@dataclasses.dataclass
class Run:
    """A model in training, and what its checkpoint says of it."""
    path: Path                   # of the checkpoint; the log is kept beside it
    steps: int                   # optimizer steps from beginning to end
    model: Transformer
    ema: Transformer             # the averaged weights, which are what is evaluated
    optimizers: list
    content: dict                # what else the checkpoint holds: kind, config, tokenizer, ...
    averaged: int = 0            # steps that went into ema before this run
    step: int = 0                # steps done
    seconds: float = 0.0         # time they took


def save(run):
    """Write run's checkpoint. The frozen teacher of a round is kept as long as it is needed."""
    content = run.content | ({"teacher": None} if run.step == run.steps else {})
    save_checkpoint(run.path, **content, step=run.step, steps=run.steps, seconds=run.seconds,
                    model_config=dataclasses.asdict(run.model.config),
                    model=run.model.state_dict(), ema=run.ema.state_dict(),
                    optimizer=[o.state_dict() for o in run.optimizers])


def resume(run, c, free):
    """Put run where its checkpoint stands, if there is one; returns the checkpoint, or None.
    Raises UserError where it was made with other flags than c, but for those named in `free`."""
    if not run.path.exists():
        return None
    saved = load_checkpoint(run.path, kinds=(run.content["kind"],))
    for key, value in dataclasses.asdict(c).items():
        if key not in free and saved["config"].get(key) != value:
            raise UserError(f"{run.path} was made with --{key} {saved['config'].get(key)}, not "
                            f"{value}; give the same flag, remove the file, or choose another "
                            "--out")
    if saved.get("origin") != run.content.get("origin"):
        raise UserError(f"{run.path} was distilled from another teacher; remove the round files "
                        "or choose another --out")
    run.model.load_state_dict(saved["model"])
    run.ema.load_state_dict(saved["ema"])
    for optimizer, state in zip(run.optimizers, saved["optimizer"], strict=True):
        optimizer.load_state_dict(state)
    run.step, run.seconds = saved["step"], saved["seconds"]
    return saved
