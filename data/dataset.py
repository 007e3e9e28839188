"""From a dataset's folder to batches of token ids, and from ids to text.

A folder holds train.bin and val.bin, all tokens in a row as uint16 (uint32 where V >
65536), read from the disk as they are needed, and meta.json with the tokenizer. A folder as
nanoGPT prepares it works too: without meta it is GPT-2's tokens, with meta.pkl characters.
What a folder of others holds is looked at before it is believed. Where each row begins with
a prompt, train_prompts.bin and val_prompts.bin say how long these are, a uint16 for a row.
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

from common import ROOT
from data.devices import upload
from data.files import UserError, hold, reason, release, write
from data.processes import run_in_first


# ---- tokenizers: plain JSON in, functions out

@dataclasses.dataclass
class Tokenizer:
    spec: dict                   # plain JSON, kept in meta.json and in every checkpoint
    vocab: int                   # V
    encode: typing.Callable      # str -> list of ids; UserError on what it cannot express
    decode: typing.Callable      # list of ids -> str
    end: int | None = None       # the special token that ends a document; no text has it


def make_tokenizer(spec):
    """{"kind": "words" | "chars" | "bpe" | "gpt2", ...} -> Tokenizer."""
    if spec["kind"] in ("words", "chars"):
        return list_tokenizer(spec)
    return bpe_tokenizer(spec)


def list_tokenizer(spec):
    """The Tokenizer of a list of words, or of characters: an id is a place in the list."""
    items = spec["items"]
    space = " " if spec["kind"] == "words" else ""       # what stands between two tokens
    ids = {item: i for i, item in enumerate(items)}

    def encode(text):
        parts = text.split() if space else list(text)
        # no text is encoded in part: what is unknown is named
        for part in parts:
            if part not in ids:
                raise UserError(f"{part!r} is not in the vocabulary of {len(items)} "
                                f"{spec['kind']}, such as {' '.join(items[:12])!r}")
        return [ids[part] for part in parts]

    def decode(x):
        return space.join(items[i] for i in x)
    return Tokenizer(spec, len(items), encode, decode)


def bpe_tokenizer(spec):
    """The Tokenizer of byte pairs: GPT-2's own, or one that data/corpus.py trained. Raises
    UserError where GPT-2's cannot be loaded."""
    import tiktoken
    if spec["kind"] == "gpt2":
        try:
            bpe = tiktoken.get_encoding("gpt2")
        # tiktoken downloads the file, with any of requests' errors
        except Exception as e:
            raise UserError("GPT-2's tokenizer could not be loaded; it needs the network "
                            "once, or a folder that has it in TIKTOKEN_CACHE_DIR "
                            f"({type(e).__name__})")
    else:
        # items[i]: the bytes of token i, as one character each
        ranks = {token.encode("latin-1"): i for i, token in enumerate(spec["items"])}
        bpe = tiktoken.Encoding("ours", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                special_tokens={"<end>": len(ranks)})

    def encode(text):
        return encode_long(bpe, text)
    # the only special token is the last
    return Tokenizer(spec, bpe.n_vocab, encode, bpe.decode, end=bpe.n_vocab - 1)


def retokenise(ids, source, target):
    """A list of ids of one tokenizer -> the ids of another, for the same text. The special
    token that ends a document becomes the other's, or is left out where the other has none;
    what stands between is decoded and encoded. Raises UserError where the other cannot
    express it."""
    if source.spec == target.spec:
        return list(ids)
    found = []
    between = []                         # ids since the last special one
    for one in ids:
        if one != source.end:
            between.append(one)
            continue
        # a document ends: its text, then the other's special token
        found += same_text(between, source, target)
        between = []
        if target.end is not None:
            found.append(target.end)
    # after the last special token there may be more text
    return found + same_text(between, source, target)


def same_text(ids, source, target):
    """retokenise for ids without a special token."""
    if not ids:
        return []
    return target.encode(source.decode(ids))


# white space of GPT-2's rule, which does not count the four separators of ASCII as such
BLANK = r"[^\S\x1c-\x1f]"
LONG = 100_000
LONG_BLANK = re.compile(BLANK + f"{{{LONG},}}")


def encode_long(bpe, text):
    """Text -> the ids of a tiktoken encoding. Long runs of white space, at which tiktoken
    panics, are cut where GPT-2's rule cuts in any case: before the run, and before its last
    character, which belongs to the word that follows. In between they are cut after every
    LONG characters."""
    ids = []
    begin = 0                            # where the text that is not encoded yet begins
    for run in LONG_BLANK.finditer(text):
        # the run's last character is left to the word, if one follows
        last = run.end()
        if last < len(text):
            last -= 1
        # what stands before the run, then the run in pieces
        ids += bpe.encode_ordinary(text[begin:run.start()])
        for i in range(run.start(), last, LONG):
            ids += bpe.encode_ordinary(text[i:min(i + LONG, last)])
        begin = last
    return ids + bpe.encode_ordinary(text[begin:])


# ---- data

@dataclasses.dataclass
class Data:
    folder: Path
    train: np.ndarray            # all tokens in a row, on disk (memmap)
    val: np.ndarray
    tokenizer: Tokenizer
    stride: int | None           # a row begins at each multiple of it; None: anywhere
    texts: bool                  # each row is a text
    oracle: str | None           # "stories": its texts can be checked without error
    prompts: dict | None = None  # {split: tokens of each row's prompt (rows,)}; None: none

    @property
    def fingerprint(self):
        """A short hash of what a run or a result is bound to: the tokenizer, the rows, and
        the tokens (of large files, the sizes and a sample), and where prompts end."""
        said = [self.tokenizer.spec, self.stride, self.texts, len(self.train),
                len(self.val)]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for tokens in (self.train, self.val):
            for block in looked_at(tokens):
                # as uint32, whatever the width on the disk
                digest.update(np.asarray(block, np.uint32).tobytes())
        if self.prompts:
            for lengths in self.prompts.values():
                digest.update(lengths.tobytes())
        return digest.hexdigest()[:12]

    def context(self, context):
        """The context to train with: the one wanted, or the length of a row. Raises
        UserError if a split is smaller than that."""
        context = self.stride or context
        for split in ("train", "val"):
            size = len(getattr(self, split))
            if size < context:
                raise UserError(f"{self.folder}/{split}.bin has {size} tokens, fewer than "
                                f"one context of {context}; use more text or a smaller "
                                "--context")
        return context

    def batch(self, split, B, context, device):
        """B random pieces of the split ("train" or "val"), ids (B, context), int64; and
        which of their tokens are a prompt, bool (B, context), or None without prompts."""
        tokens = getattr(self, split)
        step = self.stride or 1          # a piece may begin at its multiples
        choices = (len(tokens) - context) // step + 1
        begins = torch.randint(choices, (B,)).numpy() * step             # (B,)
        # (B, 1) + (context,): the place of each token of each piece
        places = begins[:, None] + np.arange(context)                    # (B, context)
        x = torch.from_numpy(tokens[places].astype(np.int64))
        keep = None
        if self.prompts:
            # pieces are whole rows here: prompts need a stride, which is then the context
            lengths = self.prompts[split][begins // step].astype(np.int64)       # (B,)
            keep = torch.arange(context) < torch.from_numpy(lengths)[:, None]
            keep = to_device(keep, device)                           # (B, context)
        return to_device(x, device), keep

    def pieces(self, n, length):
        """At most n pieces of val, evenly spread, ids (n, length), int64; rows if it has
        any."""
        # all places where one may begin, without overlaps, and n of them
        step = self.stride or length
        begins = np.arange((len(self.val) - length) // step + 1) * step
        n = min(n, len(begins))
        begins = begins[np.linspace(0, len(begins) - 1, n).astype(int)]  # (n,)
        places = begins[:, None] + np.arange(length)                     # (n, length)
        return torch.from_numpy(self.val[places].astype(np.int64))


def to_device(x, device):
    """A batch from the CPU, on the device."""
    device = torch.device(device)
    if device.type == "cuda":
        x = x.pin_memory()               # not paged out: a GPU fetches it by itself
    return upload(x, device)


BLOCK = 2 ** 16                  # tokens of a block
BLOCKS = 64                      # blocks of a file that are looked at


def looked_at(tokens):
    """All tokens of a small file, or BLOCKS blocks of a large one, evenly spread, the first
    and the last among them: a list of arrays."""
    if len(tokens) <= BLOCK * BLOCKS:
        return [tokens]
    begins = np.linspace(0, len(tokens) - BLOCK, BLOCKS).astype(np.int64)
    return [tokens[begin:begin + BLOCK] for begin in begins]


# ---- from a name to its Data

def load_data(name, procs):
    """A dataset by name (data/NAME, made now if it is built in) or by folder -> Data. Of
    several processes, the first one makes it. Raises UserError if it is unknown or broken.
    """
    run_in_first(procs, lambda: make_if_built_in(name))
    return open_folder(folder_of(name))


def folder_of(name):
    """The folder of a dataset by name or path. Raises UserError."""
    # a dataset's name comes before a path
    folder = ROOT / "data" / name
    if not folder.is_dir():
        folder = Path(name)
    if not folder.is_dir():
        scripts = (ROOT / "data").glob("*/prepare.py")
        known = sorted(script.parent.name for script in scripts)
        raise UserError(f"--dataset {name}: no such folder, and none of "
                        f"{', '.join(known)}")
    return folder


def make_if_built_in(name):
    """Make the dataset `name` if it is built in and not there yet. Another process that
    makes it at this moment is waited for. Raises UserError where it is not there and cannot
    be made."""
    # val.bin is written last: where it is, all is there
    folder = folder_of(name)
    if (folder / "val.bin").exists():
        return
    if name not in ("stories", "endings", "pydoc"):
        raise UserError(f"{folder} has no val.bin; {how_to_make(folder)}")
    hold(folder / "val.bin", wait=True)
    # the process that was waited for may have made it
    if not (folder / "val.bin").exists():
        importlib.import_module(f"data.{name}.prepare").main([])
    release(folder / "val.bin")


def how_to_make(folder):
    """The remedy where a folder has no val.bin, in words."""
    if folder.name == "lambada":
        return "it is for --lambada of tools.evaluate"
    if (folder / "prepare.py").exists():
        return f"python data/{folder.name}/prepare.py makes it"
    # one of this project's own, and not finished
    if (folder / "meta.json").exists():
        return "give the command that prepares it again"
    return "name a folder that has one"


def open_folder(folder):
    """A folder with train.bin and val.bin -> Data. Raises UserError if something in it is
    broken or does not belong together."""
    meta = read_meta(folder)
    tokenizer = make_tokenizer(meta["tokenizer"])
    train = open_tokens(folder / "train.bin", tokenizer)
    val = open_tokens(folder / "val.bin", tokenizer)
    # where rows have a length, each is a text, unless meta says otherwise
    stride = meta.get("stride")
    texts = meta.get("texts", stride is not None)
    data = Data(folder, train, val, tokenizer, stride, texts, meta.get("oracle"))
    data.prompts = open_prompts(data)
    return data


# ---- what a folder says of its tokens

class _NoClasses(pickle.Unpickler):
    """A pickle may run any code through a class that it names: here it names none."""

    def find_class(self, module, name):
        raise UserError(f"meta.pkl asks for {module}.{name}; only plain dicts and lists "
                        "are read")


def read_meta(folder):
    """What meta.json, or nanoGPT's meta.pkl, says of a folder: a dict with a tokenizer's
    spec; of GPT-2's where there is neither. Raises UserError, with the cause."""
    path = folder / "meta.json"
    if not path.exists():
        path = folder / "meta.pkl"
    if not path.exists():
        return {"tokenizer": {"kind": "gpt2"}}
    meta = parse_meta(path)

    # the key that says which tokens there are
    needed = "tokenizer" if path.suffix == ".json" else "itos"
    if not isinstance(meta, dict) or needed not in meta:
        holds = f"a {type(meta).__name__}"
        if isinstance(meta, dict):
            holds = f"the keys {', '.join(map(str, meta))}"
        raise UserError(f"{path} describes no tokenizer: it holds {holds}, and not "
                        f"{needed}")

    # its value: anything may stand in place of a spec, so anything may fail
    try:
        if needed == "itos":             # nanoGPT's characters
            itos = meta["itos"]
            items = [itos[i] for i in range(len(itos))]
            meta = {"tokenizer": {"kind": "chars", "items": items}}
        make_tokenizer(meta["tokenizer"])
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path} describes no tokenizer that is known here "
                        f"({type(e).__name__}: {e}); put the right one there")
    return meta


def parse_meta(path):
    """The value in a JSON file or a pickle, whatever it is. Raises UserError where there is
    none."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_bytes())
        with open(path, "rb") as f:
            return _NoClasses(f).load()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); make it readable")
    except UserError:                    # of _NoClasses
        raise
    # json and pickle fail in many ways
    except Exception as e:
        what = "JSON" if path.suffix == ".json" else "a pickle"
        raise UserError(f"{path} is not whole {what} ({type(e).__name__}); put the right "
                        "one there")


def open_tokens(path, tokenizer):
    """The ids in a file, as a memmap, after a look at them: see looked_at. Raises UserError
    where they cannot be the tokenizer's, with what they seem to be."""
    dtype = np.dtype(id_type(tokenizer.vocab))
    tokens = map_tokens(path, dtype)
    blocks = looked_at(tokens)
    most = max(int(block.max()) for block in blocks)
    kind = foreign_kind(path, blocks)

    # ids that the tokenizer does not have
    if most >= tokenizer.vocab:
        kind = kind or ("its meta file, or the lack of one, belongs to other tokens: put "
                        "the right one beside it")
        raise UserError(f"{path} holds the id {most:,}, but its tokenizer has "
                        f"{tokenizer.vocab:,} tokens; {kind}")
    # ids that it has, in a file that looks like another kind; with a meta.json it was
    # written here, and is what meta.json says
    ours = (path.parent / "meta.json").exists()
    if kind and not ours:
        raise UserError(f"{path} does not hold ids of {dtype.itemsize} bytes each; {kind}")
    return tokens


def map_tokens(path, dtype):
    """The file's numbers of that type, as a memmap. Raises UserError if it has none."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path} holds no token ids: it is a folder")
        if not size:
            raise UserError(f"{path} holds no token ids: it is empty")
        if size % dtype.itemsize:
            raise UserError(f"{path} holds no token ids: its {size} bytes are no whole "
                            f"number of ids of {dtype.itemsize} bytes each")
        return np.memmap(path, dtype, "r")
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)})")


def open_prompts(data):
    """{split: tokens of each row's prompt, uint16 (rows,)}, from the files beside the
    tokens; None where there are none. Raises UserError where they do not fit the rows."""
    paths = {split: data.folder / f"{split}_prompts.bin" for split in ("train", "val")}
    there = [path for path in paths.values() if path.exists()]
    if not there:
        return None
    if data.stride is None:
        raise UserError(f"{there[0]}: prompts are for rows, and {data.folder} is running "
                        'text; put "stride", the tokens of a row, into its meta.json, or '
                        "remove the file")
    found = {}
    for split, path in paths.items():
        rows = len(getattr(data, split)) // data.stride
        try:
            found[split] = np.fromfile(path, np.uint16)
            size = path.stat().st_size
        except OSError as e:
            raise UserError(f"{path} cannot be read ({reason(e)}); {there[0].name} is "
                            "there, and both splits need one")
        if size != 2 * rows:
            raise UserError(f"{path} has {size:,} bytes, but {split}.bin {rows:,} rows, of "
                            "which each needs 2; write it anew")
        longest = int(found[split].max(initial=0))
        if longest >= data.stride:
            raise UserError(f"{path} has a prompt of {longest:,} tokens, which leaves "
                            f"nothing of a row of {data.stride:,}; shorten it")
    return found


def foreign_kind(path, blocks):
    """What a file seems to be, in words with a remedy; None if it seems to be ids of the
    width expected. blocks: see looked_at."""
    # the first number of llm.c's and of modded-nanogpt's files
    with open(path, "rb") as f:
        begin = f.read(1024)
    number = int.from_bytes(begin[:4], "little")
    if number in (20240520, 20240801) and len(begin) == 1024:
        return ("it begins with a header of 1,024 bytes, as llm.c's and modded-nanogpt's "
                "files do; write it without")

    # the file as numbers of 2 bytes; too few, or zeros in all even places, say nothing
    halves = [block.view(np.uint16) for block in blocks]
    if sum(map(len, halves)) < 64 or not any(half[::2].any() for half in halves):
        return None
    # zeros in all odd places: the upper halves of wider numbers (little-endian)
    if not any(half[1::2].any() for half in halves):
        width = 4 if any(half[2::4].any() for half in halves) else 8
        return f"it seems to hold numbers of {width} bytes; write them as uint16"
    # ids so large do not occur: two numbers of 2 bytes were read as one
    if blocks[0].dtype == np.uint32 and blocks[0].max() >= 2 ** 24:
        return "it seems to hold numbers of 2 bytes; write them as uint32"
    return None


# ---- what a dataset knows of texts

def copies(x, data):
    """Which of x (n, L) are training texts word for word, (n,) bool; None where a text may
    begin anywhere."""
    if not data.texts or data.stride != x.shape[1]:
        return None
    # rows as bytes, which a set can hold
    samples = [row.astype(data.train.dtype).tobytes() for row in x.numpy()]
    N = len(data.train) // data.stride
    rows = data.train[:N * data.stride].reshape(N, data.stride)          # (N, L)
    known = set(samples) & {row.tobytes() for row in rows}
    return torch.tensor([sample in known for sample in samples])


def copies_expected(log_p, data):
    """The chance of each text that one of as many stories as the training data has, drawn
    anew from their law, is the same word for word: (n,), from the oracle's log_p (n,), the
    log-probability of each text under that law. With N stories it is 1 - (1 - p)^N."""
    N = len(data.train) // data.stride
    # by logarithms: p is far below what 1 - p could hold in full
    return -torch.expm1(N * torch.log1p(-log_p.exp()))


def oracle(x, data):
    """What the dataset's oracle says of x (n, L): (faults in each (n,), log-probability of
    each text (n,) in nats, -inf with a fault); None without an oracle."""
    if data.oracle != "stories":
        return None
    from data.stories import language
    faults = []
    log_ps = []
    for row in x.tolist():
        log_p, wrong = language.read(data.tokenizer.decode(row).split())
        faults.append(float(len(wrong)))
        log_ps.append(log_p)
    return torch.tensor(faults), torch.tensor(log_ps, dtype=torch.float64)


def choices(x, data):
    """What the dataset's oracle says each text of x (n, L) chose: a list of {choice:
    value}, see data.stories.language.choices; None without an oracle."""
    if data.oracle != "stories":
        return None
    from data.stories import language
    return [language.choices(data.tokenizer.decode(row).split()) for row in x.tolist()]


# ---- writing

def id_type(vocab):
    """The numpy type of ids below vocab on the disk."""
    return np.uint16 if vocab <= 65536 else np.uint32


def write_data(folder, train, val, prompts=None, **meta):
    """Write ids train and val (lists) and meta (with a tokenizer's spec) as a dataset
    folder. prompts: {"train": tokens of each row's prompt, "val": the same}, of rows of
    meta's stride."""
    write_blocks(folder, [train], [val], prompts, **meta)


def write_blocks(folder, train, val, prompts=None, **meta):
    """The same of blocks of ids (iterables of lists or arrays), which may be more than
    memory holds."""
    dtype = id_type(make_tokenizer(meta["tokenizer"]).vocab)
    # val.bin goes first and comes last: where it is, the rest belongs to it
    for name in ("val.bin", "train_prompts.bin", "val_prompts.bin"):
        with contextlib.suppress(OSError):       # if it cannot go, write() below says why
            (folder / name).unlink()
    write(folder / "meta.json", lambda f: f.write(json.dumps(meta).encode()))
    for split, lengths in (prompts or {}).items():
        write_ids(folder / f"{split}_prompts.bin", [lengths], np.uint16)
    write_ids(folder / "train.bin", train, dtype)
    write_ids(folder / "val.bin", val, dtype)


def write_ids(path, blocks, dtype):
    """Blocks of ids, one after another, as a file of numbers of that type."""
    def to_file(f):
        for ids in blocks:
            f.write(np.asarray(ids, dtype).tobytes())
    write(path, to_file)
