"""What several scripts share: errors, flags, devices and processes, data, tokenizers, checkpoints.

Randomness: every random draw here and in diffusion.py comes from torch's global generator, and
`seed_all(seed, step, i)` sets it before each micro-batch i of each step. So a run that was stopped
goes on exactly as it would have, and two processes draw what one process would have drawn.
"""
import argparse
import dataclasses
import datetime
import hashlib
import importlib
import json
import os
import pickle
import sys
import typing
from pathlib import Path

import numpy as np
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


# ---- flags: a dataclass whose fields are made by flag() is a script's command line

def flag(default, help, choices=None, low=None, high=None):
    """A dataclass field that is also a flag; low and high are the least and largest value."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices,
                                                            low=low, high=high))


def parse_flags(Config, description, argv=None, **positional):
    """argv (sys.argv unless given) -> a Config. positional: name=help of arguments without --.

    Exits with usage and status 2 on an unknown, ill-typed or out-of-range flag.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, text in positional.items():
        parser.add_argument(name, help=text)
    hints = typing.get_type_hints(Config)
    fields = [f for f in dataclasses.fields(Config) if f.metadata]
    for f in fields:
        kind = (typing.get_args(hints[f.name]) or (hints[f.name],))[0]       # int | None -> int
        default = "" if f.default is None else f" [{f.default}]"
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
               dict(type=kind, choices=f.metadata["choices"]))
        parser.add_argument(f"--{f.name}", default=f.default, **how,
                            help=(f.metadata["help"] + default).replace("%", "%%"))
    args = parser.parse_args(argv)
    for f in fields:
        value, low, high = getattr(args, f.name), f.metadata["low"], f.metadata["high"]
        if value is not None and (low is not None and not value >= low
                                  or high is not None and not value <= high):
            parser.error(f"argument --{f.name}: {value} is not "
                         + (f"between {low} and {high}" if high is not None else f"{low} or more"))
    return Config(**vars(args))


# ---- device, processes, seeds

class Processes(typing.NamedTuple):
    device: torch.device
    rank: int = 0                    # of this process; 0 alone writes and prints
    world: int = 1                   # how many there are


def start(device):
    """Device and processes: 'auto' | 'cpu' | 'cuda' -> Processes.

    Under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK) the processes are joined, by NCCL on
    GPUs and gloo on the CPU. Raises UserError if CUDA is asked for and absent.
    """
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


# ---- tokenizers: plain JSON in, functions out

@dataclasses.dataclass
class Tokenizer:
    spec: dict                       # plain JSON, kept in meta.json and in every checkpoint
    vocab: int                       # V
    encode: typing.Callable          # str -> list of ids; UserError on what it cannot express
    decode: typing.Callable          # list of ids -> str


def make_tokenizer(spec):
    """{"kind": "words" | "chars" | "bpe" | "gpt2", ...} -> Tokenizer."""
    if spec["kind"] in ("words", "chars"):
        items, space = spec["items"], " " if spec["kind"] == "words" else ""
        ids = {item: i for i, item in enumerate(items)}

        def encode(text):
            parts = text.split() if space else list(text)
            for part in parts:
                if part not in ids:
                    raise UserError(f"{part!r} is not in the vocabulary of {len(items)} "
                                    f"{spec['kind']}, such as {' '.join(items[:12])!r}")
            return [ids[part] for part in parts]
        return Tokenizer(spec, len(items), encode, lambda x: space.join(items[i] for i in x))
    import tiktoken
    if spec["kind"] == "gpt2":
        try:
            bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:       # tiktoken downloads the file, with any of requests' errors
            raise UserError("GPT-2's tokenizer could not be loaded; it needs the network once, or "
                            f"a folder that has it in TIKTOKEN_CACHE_DIR ({type(e).__name__})")
    else:                            # ranks[i]: the bytes of token i, as one character each
        ranks = {token.encode("latin-1"): i for i, token in enumerate(spec["items"])}
        bpe = tiktoken.Encoding("ours", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                special_tokens={"<end>": len(ranks)})
    return Tokenizer(spec, bpe.n_vocab, bpe.encode_ordinary, bpe.decode)


# ---- data: a folder with train.bin, val.bin and meta.json, or as nanoGPT leaves it

@dataclasses.dataclass
class Data:
    folder: Path
    train: np.ndarray                # all tokens in a row, on disk (memmap)
    val: np.ndarray
    tokenizer: Tokenizer
    stride: int | None               # a text begins at each multiple of it; None: anywhere
    oracle: str | None               # "stories": its texts can be checked without error

    def context(self, context):
        """The context to train with: the one wanted, or the length of a row. Raises UserError if
        a split is smaller than that."""
        context = self.stride or context
        for split in ("train", "val"):
            if len(getattr(self, split)) < context:
                raise UserError(f"{self.folder}/{split}.bin has {len(getattr(self, split))} tokens,"
                                f" fewer than one context of {context}; use more text or a smaller"
                                " --context")
        return context

    def batch(self, split, B, context, device):
        """B random pieces of the split ("train" or "val"), ids (B, context), int64."""
        tokens, step = getattr(self, split), self.stride or 1
        first = torch.randint((len(tokens) - context) // step + 1, (B,)).numpy() * step
        x = tokens[first[:, None] + np.arange(context)].astype(np.int64)
        return torch.from_numpy(x).to(device)


class _NoClasses(pickle.Unpickler):
    def find_class(self, module, name):
        raise UserError(f"meta.pkl asks for {module}.{name}; only plain dicts and lists are read")


def load_data(name, p):
    """A dataset by name (data/NAME, made now if it is built in) or by folder -> Data.

    With several processes p, the first one makes it. Raises UserError if it is unknown or broken.
    """
    if p.rank > 0:
        dist.barrier()
    data = _load_data(name)
    if p.rank == 0 and p.world > 1:
        dist.barrier()
    return data


def _load_data(name):
    folder = ROOT / "data" / name if (ROOT / "data" / name).is_dir() else Path(name)
    if not folder.is_dir():
        known = sorted(p.parent.name for p in (ROOT / "data").glob("*/prepare.py"))
        raise UserError(f"--dataset {name}: no such folder, and none of {', '.join(known)}")
    if not (folder / "val.bin").exists():
        if name not in ("stories", "pydoc"):                         # the built-in ones
            raise UserError(f"{folder} has no val.bin; python data/{name}/prepare.py makes it")
        importlib.import_module(f"data.{name}.prepare").main([])
    meta = {}
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text())
    elif (folder / "meta.pkl").exists():                             # nanoGPT's characters
        with open(folder / "meta.pkl", "rb") as f:
            itos = _NoClasses(f).load()["itos"]
        meta["tokenizer"] = dict(kind="chars", items=[itos[i] for i in range(len(itos))])
    tokenizer = make_tokenizer(meta.get("tokenizer", {"kind": "gpt2"}))
    dtype = np.uint16 if tokenizer.vocab <= 65536 else np.uint32
    try:
        train, val = (np.memmap(folder / f"{s}.bin", dtype, "r") for s in ("train", "val"))
    except (ValueError, OSError) as e:
        raise UserError(f"{folder}: train.bin and val.bin cannot be read ({e}); prepare it again")
    return Data(folder, train, val, tokenizer, meta.get("stride"), meta.get("oracle"))


def write_data(folder, train, val, **meta):
    """Write ids train and val (lists) and meta (with a tokenizer's spec) as a dataset folder."""
    dtype = np.uint16 if make_tokenizer(meta["tokenizer"]).vocab <= 65536 else np.uint32
    write(folder / "meta.json", lambda f: f.write(json.dumps(meta).encode()))
    for name, ids in (("train", train), ("val", val)):               # val.bin last: it is done
        write(folder / f"{name}.bin", lambda f: f.write(np.array(ids, dtype).tobytes()))


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
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({e}); make room or choose another folder")


def save_checkpoint(path, **content):
    """Save {'format', 'kind', 'model_config', 'model', 'ema', 'tokenizer', 'step', ...}."""
    write(path, lambda f: torch.save({"format": 1, **content}, f))


def load_checkpoint(path, kinds=("mdlm", "sdtt", "ar")):
    """Read a checkpoint onto the CPU. Raises UserError on a missing, foreign or wrong one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kind = content["kind"] if content["format"] == 1 else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train.py and distill.py make them")
    except Exception as e:           # torch.load fails in many ways on what is not a checkpoint
        raise UserError(f"{path} is not a whole checkpoint of this project "
                        f"({type(e).__name__}); delete it to have it made again")
    if kind not in kinds:
        raise UserError(f"{path} holds a model of kind {kind!r}, but {' or '.join(kinds)} is "
                        "needed here")
    return content


def load_model(path, device="cpu", kinds=("mdlm", "sdtt", "ar")):
    """The averaged (EMA) model of a checkpoint in eval mode, and the checkpoint's other content."""
    content = load_checkpoint(path, kinds)
    model = Transformer(ModelConfig(**content["model_config"]))
    model.load_state_dict(content["ema"])
    return model.to(device).eval(), content
