"""From a dataset's folder to batches of token ids, and from ids to text.

A folder holds train.bin and val.bin, all tokens in a row as uint16 (uint32 where V > 65536), read
from the disk as they are needed, and meta.json with the tokenizer. A folder as nanoGPT prepares it
works too: without meta it is GPT-2's tokens, with meta.pkl characters.
"""
import contextlib
import dataclasses
import importlib
import json
import pickle
import typing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import ROOT, UserError, write


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


# ---- data

@dataclasses.dataclass
class Data:
    folder: Path
    train: np.ndarray                # all tokens in a row, on disk (memmap)
    val: np.ndarray
    tokenizer: Tokenizer
    stride: int | None               # a row begins at each multiple of it; None: anywhere
    texts: bool                      # each row is a text
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

    def pieces(self, n, length):
        """At most n pieces of val, evenly spread, ids (n, length), int64; rows if it has any."""
        step = self.stride or length
        first = np.arange((len(self.val) - length) // step + 1) * step
        first = first[np.linspace(0, len(first) - 1, min(n, len(first))).astype(int)]
        return torch.from_numpy(self.val[first[:, None] + np.arange(length)].astype(np.int64))


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
            how = ("it is for --lambada of evaluate.py" if folder.name == "lambada" else
                   f"python data/{folder.name}/prepare.py makes it"
                   if (folder / "prepare.py").exists() else "prepare it again")
            raise UserError(f"{folder} has no val.bin; {how}")
        importlib.import_module(f"data.{name}.prepare").main([])
    meta, path = {}, folder / "meta.json"
    try:
        if path.exists():
            meta = json.loads(path.read_text())
        elif (path := folder / "meta.pkl").exists():                 # nanoGPT's characters
            with open(path, "rb") as f:
                itos = _NoClasses(f).load()["itos"]
            meta["tokenizer"] = dict(kind="chars", items=[itos[i] for i in range(len(itos))])
        tokenizer = make_tokenizer(meta.get("tokenizer", {"kind": "gpt2"}))
    except UserError:
        raise
    except Exception as e:           # json, pickle and tiktoken fail in many ways
        raise UserError(f"{path} describes no tokenizer ({type(e).__name__}); prepare it again")
    try:
        train, val = (np.memmap(folder / f"{s}.bin", id_type(tokenizer.vocab), "r")
                      for s in ("train", "val"))
    except (ValueError, OSError) as e:
        raise UserError(f"{folder}: train.bin and val.bin cannot be read ({e}); prepare it again")
    stride = meta.get("stride")
    return Data(folder, train, val, tokenizer, stride, meta.get("texts", stride is not None),
                meta.get("oracle"))


def id_type(vocab):
    """The numpy type of ids below vocab on the disk."""
    return np.uint16 if vocab <= 65536 else np.uint32


def write_data(folder, train, val, **meta):
    """Write ids train and val (lists) and meta (with a tokenizer's spec) as a dataset folder."""
    write_blocks(folder, [train], [val], **meta)


def write_blocks(folder, train, val, **meta):
    """The same of blocks of ids (iterables of lists or arrays), which may be more than memory."""
    dtype = id_type(make_tokenizer(meta["tokenizer"]).vocab)
    with contextlib.suppress(OSError):                               # else write() below says why
        (folder / "val.bin").unlink()        # first and last: where it is, the rest fits to it
    write(folder / "meta.json", lambda f: f.write(json.dumps(meta).encode()))
    for name, blocks in (("train", train), ("val", val)):
        write(folder / f"{name}.bin",
              lambda f: [f.write(np.asarray(ids, dtype).tobytes()) for ids in blocks])
