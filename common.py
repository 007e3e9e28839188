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
import pickle
import sys
import typing
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import UserError, reason, release, write
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent


# ---- running a script

GOES_ON = "stopped; the same command goes on from the last checkpoint"


def command(main):
    """Run a script's main; end in one sentence on stderr and status 2 where the user can help.
    After Ctrl-C (status 130) that is main.stopped: GOES_ON where a script has checkpoints."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, needed=False)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{getattr(main, 'stopped', 'stopped')}", file=sys.stderr)
        sys.exit(130)
    except (UserError, FloatingPointError) as e:         # the latter: a sampler that met NaN
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Exception as e:
        if not (why := compiler_trouble(e)):
            raise
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.stdout, sys.stderr = streams
        release()
        if dist.is_initialized():
            dist.destroy_process_group()


def compiler_trouble(error):
    """A sentence for an exception that torch.compile raised; None for all others."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    modules = [type(e).__module__ for e in chain]
    if not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in modules):
        return None
    why = (str(chain[-1]).strip() or type(chain[-1]).__name__).splitlines()[0][:200]
    return (f"torch.compile failed ({type(chain[-1]).__name__}: {why}); mend the C++ compiler "
            "(CXX names it), or go without: leave --compile out, or give --no-compile")


class Output:
    """stdout or stderr, whose failures are not the user's mistakes. What the encoding has no sign
    for is written as an escape; where nobody reads on (`| head -1`), the work goes on unseen.
    needed: whether other failures, such as a full disk, end the work (UserError)."""

    def __init__(self, stream, needed=True):
        self.stream, self.needed = stream, needed
        with contextlib.suppress(AttributeError, ValueError):    # a notebook's has no encoding
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        return self.attempt(lambda: self.stream.write(text))

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, f):
        try:
            return f()
        except BrokenPipeError:                          # from now on into nothing, also at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError as e:
            if self.needed:
                raise UserError(f"what is to be shown cannot be written ({reason(e)}); make room, "
                                "or send it elsewhere")

    def __getattr__(self, name):
        return getattr(self.stream, name)


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


def first(p, f):
    """f(), in process 0 alone, for which all others wait; its UserError is raised in all."""
    error = [None]
    if p.rank == 0:
        try:
            f()
        except UserError as e:
            error = [str(e)]
    if p.world > 1:
        dist.broadcast_object_list(error, 0)
    if error[0]:
        raise UserError(error[0])


def agree(p, value, what):
    """Check that all processes hold an equal value (of plain ones, such as a fingerprint). Raises
    UserError in all of them where they do not. what: the value's name, for the sentence."""
    if p.world == 1:
        return
    values = [None] * p.world
    dist.all_gather_object(values, value)
    if any(one != values[0] for one in values):
        raise UserError(f"the processes hold different {what} ({values}); --out and the dataset "
                        "must be the same files for all of them")


@torch.no_grad()
def broadcast(model, p):
    """Give all processes the weights that process 0 has."""
    for tensor in model.state_dict().values() if p.world > 1 else []:
        dist.broadcast(tensor, 0)


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

KEYS = {"kind", "model_config", "model", "ema", "optimizer", "step", "steps", "seconds", "config",
        "tokenizer"}


def save_checkpoint(path, **content):
    """Save {'format', 'kind', 'model_config', 'model', 'ema', 'tokenizer', 'step', ...}."""
    write(path, lambda f: torch.save({"format": 1, **content}, f))


def load_checkpoint(path, kinds=("mdlm", "sdtt", "ar")):
    """Read a checkpoint onto the CPU. Raises UserError on a missing, foreign or wrong one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train.py and distill.py make them")
    except OSError as e:
        what = folder_kind(Path(path)) if Path(path).is_dir() else f"cannot be read ({reason(e)})"
        raise UserError(f"{path} {what}; name a checkpoint of train.py, distill.py or tools.convert")
    except Exception as e:           # torch.load fails in many ways on what is not a checkpoint
        raise UserError(f"{path} is not a checkpoint of this project: {file_kind(Path(path), e)}")
    if not isinstance(content, dict) or content.get("format") != 1 or not KEYS <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project: {content_kind(content)}")
    as_today(content)
    if content["kind"] not in kinds:
        raise UserError(f"{path} holds a model of kind {content['kind']!r}, but "
                        f"{' or '.join(kinds)} is needed here")
    return content


def as_today(content):
    """Change what an older version's checkpoint says of its model into today's words."""
    sizes = content["model_config"]
    if "causal" in sizes:                                # before `attention`
        sizes["attention"] = "causal" if sizes.pop("causal") else "full"
    # before `attention_bias` some models had biases that were frozen at zero
    biases = [name for name in content["ema"] if name.endswith(("qkv.bias", "attn_out.bias"))]
    frozen = sizes.get("positions", "rope") == "rope" and sizes.get("attention") != "causal"
    if "attention_bias" not in sizes and frozen and not any(
            content["ema"][name].any() for name in biases):
        sizes["attention_bias"] = False
        for weights in (content["model"], content["ema"]):
            for name in biases:
                weights.pop(name, None)


def folder_kind(path):
    """What a folder that was given as a checkpoint seems to be, in words."""
    if (path / "config.json").exists():
        return "is a folder of published weights, of which tools.convert makes a checkpoint"
    inside = sorted(file.name for file in path.glob("*.pt"))
    return "is a folder" + (f", which holds {', '.join(inside)}" if inside else "")


def file_kind(path, error):
    """What a file that torch.load refuses with `error` seems to be, in words, with a remedy."""
    with open(path, "rb") as f:
        begin = f.read(64)
    if not begin:
        return "it is empty; name another"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, which fetches the file itself"
    if path.suffix == ".safetensors" or begin[8:10] == b'{"':
        return ("it is a safetensors file; tools.convert makes a checkpoint of the folder that holds "
                "it and its config.json")
    if isinstance(error, pickle.UnpicklingError) and begin[:2] in (b"PK", b"\x80\x02"):
        return ("it holds Python objects besides plain values and tensors, which are not read "
                "here because that would run code")
    if begin.startswith(b"PK"):
        return "it is not whole, as after a copy that was cut short; copy it again"
    if begin.startswith(b"\x80"):
        return "it is a Python pickle, which is not read here because that would run code"
    return "it is no file of PyTorch's; name another"


def content_kind(content):
    """What the content of a PyTorch file seems to be, in words, with a remedy."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}; name another file"
    if content.get("format", 1) != 1:
        return (f"its format is number {content['format']}, this version reads number 1; use the "
                "version that made it")
    keys = [str(key) for key in content]
    some = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
    if {"model", "model_args", "iter_num"} <= content.keys():
        return (f"it is nanoGPT's ({some}), whose layout is not read here; tools.convert reads GPT-2 "
                "in the transformers package's")
    if "state_dict" in content:
        return (f"it is another trainer's ({some}); tools.convert reads MDLM, SDTT and GPT-2 from "
                "a folder with config.json and model.safetensors")
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return (f"it holds bare tensors ({some}); tools.convert reads published weights from a "
                "folder with config.json and model.safetensors")
    return f"it holds {some or 'nothing'}; name a file of train.py, distill.py or tools.convert"


def load_model(path, device="cpu", kinds=("mdlm", "sdtt", "ar")):
    """The averaged (EMA) model of a checkpoint in eval mode, and the checkpoint's other content.
    Raises UserError, also for weights that are not finite numbers."""
    content = load_checkpoint(path, kinds)
    try:
        model = Transformer(ModelConfig(**content["model_config"]))
        model.load_state_dict(content["ema"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}: its weights do not fit its model_config "
                        f"({' '.join(str(e).split())[:150]}); make it again, or name another")
    if not finite(model):
        raise UserError(f"{path} holds weights that are not finite numbers: its training "
                        "diverged; train anew with a lower --lr")
    return model.to(device).eval(), content


def finite(model):
    """Whether all weights are finite numbers."""
    return all(bool(w.isfinite().all()) for w in model.parameters())


def fingerprint(model):
    """A short hash of a model's weights: which model a file or a result belongs to."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


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
    micro: int | None = None     # sequences of a micro-batch so far, on which the noise depends


def save(run):
    """Write run's checkpoint. The frozen teacher of a round is kept as long as it is needed."""
    content = run.content | ({"teacher": None} if run.step == run.steps else {})
    save_checkpoint(run.path, **content, step=run.step, steps=run.steps, seconds=run.seconds,
                    micro=run.micro, model_config=dataclasses.asdict(run.model.config),
                    model=run.model.state_dict(), ema=run.ema.state_dict(),
                    optimizer=[o.state_dict() for o in run.optimizers])


# what defines a run beside its flags: the key in its checkpoint, and what is said if it is another
BOUND = (("tokenizer", "was made with other tokens than {dataset} has now"),
         ("data", "was made from other text than {dataset} holds now"),
         ("origin", "was distilled from another teacher"),
         ("init", "began with other weights than --init holds now"))
NAMES = {"data": "dataset", "init": "init"}      # flags that only name what is bound


def flags_of(saved, Config):
    """The flags that a checkpoint was made with, {name: value}, as Config has them today: a flag
    that is newer than the checkpoint has its default, and one that no longer exists is dropped."""
    if "seed" not in saved:                  # not made by training, for example by tools.convert
        return saved
    names = {field.name for field in dataclasses.fields(Config)}
    known = {name: value for name, value in saved.items() if name in names}
    return dataclasses.asdict(Config(**known))


def resume(run, c, free):
    """Put run where its checkpoint stands, if there is one; returns the checkpoint, or None.
    Raises UserError where it was made with other flags than c, but for those named in `free`, or
    from other things than run's, whatever their names: see BOUND. A flag that did not exist when
    the checkpoint was made had its default's value."""
    if not run.path.exists():
        return None
    saved = load_checkpoint(run.path, kinds=(run.content["kind"],))
    named = {flag for key, flag in NAMES.items() if saved.get(key)}
    made_with = flags_of(saved["config"], type(c))
    for key, value in dataclasses.asdict(c).items():
        if key not in free and key not in named and made_with.get(key) != value:
            raise UserError(f"{run.path} was made with --{key} {made_with.get(key)}, not "
                            f"{value}; give the same flag, move the file away, or choose another "
                            "--out")
    for key, what in BOUND:
        known = saved.get(key)           # older checkpoints do not have all
        if known is not None and known != run.content.get(key):
            raise UserError(f"{run.path} {what.format(dataset=c.dataset)}; move it away (of "
                            "rounds, all of them), or choose another --out")
    try:
        run.model.load_state_dict(saved["model"])
        run.ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(run.optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)
    except (ValueError, RuntimeError, KeyError) as e:
        raise UserError(f"{run.path} does not fit the model that it is said to hold "
                        f"({' '.join(str(e).split())[:150]}); move it away, or choose another "
                        "--out")
    run.step, run.seconds, run.micro = saved["step"], saved["seconds"], saved.get("micro")
    return saved
