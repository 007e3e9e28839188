"""From a dataset's folder to batches of token ids, and from ids to text.

A folder holds train.bin and val.bin, all tokens in a row as uint16 (uint32 where V > 65536), read
from the disk as they are needed, and meta.json with the tokenizer. A folder as nanoGPT prepares it
works too: without meta it is GPT-2's tokens, with meta.pkl characters. What a folder of others
holds is looked at before it is believed.
"""
import contextlib
import dataclasses
import hashlib
import importlib
import json
import pickle
import re
import typing
from pathlib import Path

import numpy as np
import torch

from common import ROOT, first
from data.files import UserError, hold, reason, release, write


# ---- tokenizers: plain JSON in, functions out

@dataclasses.dataclass
class Tokenizer:
    spec: dict                       # plain JSON, kept in meta.json and in every checkpoint
    vocab: int                       # V
    encode: typing.Callable          # str -> list of ids; UserError on what it cannot express
    decode: typing.Callable          # list of ids -> str
    end: int | None = None           # the special token that ends a document, which no text has


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
    return Tokenizer(spec, bpe.n_vocab, lambda text: encode_long(bpe, text), bpe.decode,
                     end=bpe.n_vocab - 1)


def retokenise(ids, source, target):
    """A list of ids of one tokenizer -> the ids of another, for the same text. The special token
    that ends a document becomes the other's, or is left out where the other has none; what stands
    between is decoded and encoded. Raises UserError where the other cannot express it."""
    if source.spec == target.spec:
        return list(ids)
    found, text = [], []                     # text: ids since the last special one
    for one in [*ids, None]:
        if one is not None and one != source.end:
            text.append(one)
            continue
        if text:
            found += target.encode(source.decode(text))
            text = []
        if one is not None and target.end is not None:
            found.append(target.end)
    return found


# white space of GPT-2's rule, which does not count the four separators of ASCII as such
BLANK = r"[^\S\x1c-\x1f]"
LONG = 100_000
LONG_BLANK = re.compile(BLANK + f"{{{LONG},}}")


def encode_long(bpe, text):
    """Text -> the ids of a tiktoken encoding. Long runs of white space, at which tiktoken panics,
    are cut where GPT-2's rule cuts in any case, before the run and before its last sign, which
    belongs to the word that follows, and in between at each LONG signs."""
    ids, begin = [], 0
    for run in LONG_BLANK.finditer(text):
        last = run.end() if run.end() == len(text) else run.end() - 1
        ids += bpe.encode_ordinary(text[begin:run.start()])
        for i in range(run.start(), last, LONG):
            ids += bpe.encode_ordinary(text[i:min(i + LONG, last)])
        begin = last
    return ids + bpe.encode_ordinary(text[begin:])


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

    @property
    def fingerprint(self):
        """A short hash of what a run or a result is bound to: the tokenizer, the rows, and the
        tokens (of large files, the sizes and a sample)."""
        said = [self.tokenizer.spec, self.stride, self.texts, len(self.train), len(self.val)]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for tokens in (self.train, self.val):
            for block in looked_at(tokens):
                digest.update(np.asarray(block, np.uint32).tobytes())
        return digest.hexdigest()[:12]

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


BLOCK, BLOCKS = 2 ** 16, 64           # tokens of a block, and blocks of a file that are looked at


def looked_at(tokens):
    """All tokens of a small file, or BLOCKS blocks of a large one, evenly spread, the first and the
    last among them: a list of arrays."""
    if len(tokens) <= BLOCK * BLOCKS:
        return [tokens]
    begins = np.linspace(0, len(tokens) - BLOCK, BLOCKS).astype(np.int64)
    return [tokens[begin:begin + BLOCK] for begin in begins]


class _NoClasses(pickle.Unpickler):
    def find_class(self, module, name):
        raise UserError(f"meta.pkl asks for {module}.{name}; only plain dicts and lists are read")


def load_data(name, p):
    """A dataset by name (data/NAME, made now if it is built in) or by folder -> Data.
    With several processes p, the first one makes it. Raises UserError if it is unknown or broken.
    """
    first(p, lambda: make_if_built_in(name))
    return open_folder(folder_of(name))


def folder_of(name):
    """The folder of a dataset by name or path. Raises UserError."""
    folder = ROOT / "data" / name if (ROOT / "data" / name).is_dir() else Path(name)
    if not folder.is_dir():
        known = sorted(p.parent.name for p in (ROOT / "data").glob("*/prepare.py"))
        raise UserError(f"--dataset {name}: no such folder, and none of {', '.join(known)}")
    return folder


def make_if_built_in(name):
    """Make the dataset `name` if it is built in and not there yet. Another process that makes it
    at this moment is waited for. Raises UserError where it is not there and cannot be made."""
    folder = folder_of(name)
    if (folder / "val.bin").exists():
        return
    if name not in ("stories", "pydoc"):
        how = "name a folder that has one"
        if folder.name == "lambada":
            how = "it is for --lambada of tools.evaluate"
        elif (folder / "prepare.py").exists():
            how = f"python data/{folder.name}/prepare.py makes it"
        elif (folder / "meta.json").exists():            # of ours, and not finished
            how = "give the command that prepares it again"
        raise UserError(f"{folder} has no val.bin; {how}")
    hold(folder / "val.bin", wait=True)
    if not (folder / "val.bin").exists():
        importlib.import_module(f"data.{name}.prepare").main([])
    release(folder / "val.bin")


def open_folder(folder):
    """A folder with train.bin and val.bin -> Data. Raises UserError if something in it is broken
    or does not belong together."""
    meta = read_meta(folder)
    tokenizer = make_tokenizer(meta["tokenizer"])
    train, val = (open_tokens(folder / f"{split}.bin", tokenizer) for split in ("train", "val"))
    stride = meta.get("stride")
    return Data(folder, train, val, tokenizer, stride, meta.get("texts", stride is not None),
                meta.get("oracle"))


def read_meta(folder):
    """What meta.json, or nanoGPT's meta.pkl, says of a folder: a dict with a tokenizer's spec; of
    GPT-2's where there is neither. Raises UserError, with the cause."""
    path = folder / "meta.json"
    if not path.exists():
        path = folder / "meta.pkl"
    if not path.exists():
        return {"tokenizer": {"kind": "gpt2"}}
    try:
        if path.suffix == ".json":
            meta = json.loads(path.read_bytes())
        else:
            with open(path, "rb") as f:
                meta = _NoClasses(f).load()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); make it readable")
    except UserError:
        raise
    except Exception as e:               # json and pickle fail in many ways
        what = "JSON" if path.suffix == ".json" else "a pickle"
        raise UserError(f"{path} is not whole {what} ({type(e).__name__}); put the right one there")
    needed = "tokenizer" if path.suffix == ".json" else "itos"
    if not isinstance(meta, dict) or needed not in meta:
        holds = f"a {type(meta).__name__}"
        if isinstance(meta, dict):
            holds = f"the keys {', '.join(map(str, meta))}"
        raise UserError(f"{path} describes no tokenizer: it holds {holds}, and not {needed}")
    try:
        if needed == "itos":                                         # nanoGPT's characters
            itos = meta["itos"]
            meta = {"tokenizer": dict(kind="chars", items=[itos[i] for i in range(len(itos))])}
        make_tokenizer(meta["tokenizer"])
    except UserError:
        raise
    except Exception as e:               # whatever stands in place of a spec
        raise UserError(f"{path} describes no tokenizer that is known here ({type(e).__name__}: "
                        f"{e}); put the right one there")
    return meta


def open_tokens(path, tokenizer):
    """The ids in a file, as a memmap, after a look at them: see looked_at. Raises UserError where
    they cannot be the tokenizer's, with what they seem to be."""
    dtype = np.dtype(id_type(tokenizer.vocab))
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path} holds no token ids: it is a folder")
        if not size:
            raise UserError(f"{path} holds no token ids: it is empty")
        if size % dtype.itemsize:
            raise UserError(f"{path} holds no token ids: its {size} bytes are no whole number of "
                            f"ids of {dtype.itemsize} bytes each")
        tokens = np.memmap(path, dtype, "r")
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)})")
    blocks = looked_at(tokens)
    most = max(int(block.max()) for block in blocks)
    kind = foreign_kind(path, blocks)
    ours = (path.parent / "meta.json").exists()
    if most >= tokenizer.vocab:
        kind = kind or ("its meta file, or the lack of one, belongs to other tokens: put the right "
                        "one beside it")
        raise UserError(f"{path} holds the id {most:,}, but its tokenizer has {tokenizer.vocab:,} "
                        f"tokens; {kind}")
    if kind and not ours:                # what we wrote ourselves is what meta.json says
        raise UserError(f"{path} does not hold ids of {dtype.itemsize} bytes each; {kind}")
    return tokens


def foreign_kind(path, blocks):
    """What a file seems to be, in words with a remedy, if it is not ids of the width expected."""
    with open(path, "rb") as f:
        begin = f.read(1024)
    if int.from_bytes(begin[:4], "little") in (20240520, 20240801) and len(begin) == 1024:
        return ("it begins with a header of 1,024 bytes, as llm.c's and modded-nanogpt's files do; "
                "write it without")
    halves = [block.view(np.uint16) for block in blocks]
    if sum(map(len, halves)) < 64 or not any(half[::2].any() for half in halves):
        return None
    if not any(half[1::2].any() for half in halves):     # little-endian: the upper halves
        width = 4 if any(half[2::4].any() for half in halves) else 8
        return f"it seems to hold numbers of {width} bytes; write them as uint16"
    if blocks[0].dtype == np.uint32 and blocks[0].max() >= 2 ** 24:
        return "it seems to hold numbers of 2 bytes; write them as uint32"
    return None


# ---- what a dataset knows of texts

def copies(x, data):
    """Which of x (n, L) are training texts word for word, (n,) bool; None where a text may begin
    anywhere."""
    if not data.texts or data.stride != x.shape[1]:
        return None
    samples = [row.astype(data.train.dtype).tobytes() for row in x.numpy()]
    rows = data.train[:len(data.train) // data.stride * data.stride].reshape(-1, data.stride)
    known = set(samples) & {row.tobytes() for row in rows}
    return torch.tensor([sample in known for sample in samples])


def oracle(x, data):
    """What the dataset's oracle says of x (n, L): (faults in each (n,), log-probability of each
    text (n,) in nats, -inf with a fault); None without an oracle."""
    if data.oracle != "stories":
        return None
    from data.stories import language
    read = [language.read(data.tokenizer.decode(row).split()) for row in x.tolist()]
    return (torch.tensor([float(len(wrong)) for _, wrong in read]),
            torch.tensor([log_p for log_p, _ in read], dtype=torch.float64))


# ---- writing

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
