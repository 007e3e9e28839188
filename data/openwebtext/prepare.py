"""Make the dataset `openwebtext` (8 million web pages, 9 billion tokens of GPT-2's): 18 GB.

    python data/openwebtext/prepare.py [--chunk 1024]

Streams it from the Hugging Face hub (pip install datasets), encodes it on all cores, and writes
train.bin and val.bin as nanoGPT does. Rows without a text (null) are left out, and counted. Stopped
at any moment, the same command goes on where it was.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from common import command, flag, package, parse_flags               # noqa: E402
from data.corpus import (PARTS, append_tokens, begun, finish,        # noqa: E402
                         refuse_outputs)
from data.dataset import id_type, make_tokenizer                     # noqa: E402
from data.files import UserError, hold, write                        # noqa: E402

GPT2 = {"kind": "gpt2"}


@dataclass
class Config:
    source: str = flag("Skylion007/openwebtext", "id on the hub, or a folder of its parquet or "
                       "JSON lines files; the column `text` is read")
    val_documents: int = flag(100_000, "the last so many are validation, as for MDLM's models",
                              low=1)
    documents: int | None = flag(None, "only the first so many, for a trial", low=2)
    chunk: int | None = flag(None, "rows of so many tokens, <end> at both ends, as MDLM and SDTT "
                             "have them (1024) [a text may be cut anywhere]", low=3)


def stream(source, first, documents):
    """The texts of a source from document number `first` on, with a progress bar, as parts (text,
    True); the text is None where a row has none."""
    empty = 0
    datasets = package("datasets")
    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
        splits = rows.info.splits or {}
        total = documents or (splits["train"].num_examples if "train" in splits else None)
        rows = rows.skip(first)
        with tqdm(total=total, initial=first, desc="documents", mininterval=1, ncols=90) as bar:
            for number, row in enumerate(rows, first):
                if number >= (documents or number + 1):
                    break
                text = row["text"]
                if not isinstance(text, str | None):
                    raise UserError(f"--source {source}, row {number}: its text is of type "
                                    f"{type(text).__name__}; it must be a string")
                empty += text is None
                yield text, True
                bar.update()
        if empty:
            print(f"{source}: rows without a text, left out: {empty:,}")
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"--source {source} has no column {e}; it needs one named `text`")
    except Exception as e:           # of the hub, of several network packages, of file formats
        raise UserError(f"--source {source} cannot be read ({type(e).__name__}: "
                        f"{' '.join(str(e).split())[:200]}); connect, or name a folder of its "
                        "files; the same command goes on where it was")


def main(argv=None):
    """Write train.bin, val.bin and meta.json beside this file."""
    c = parse_flags(Config, __doc__, argv)
    package("datasets")
    make_tokenizer(GPT2)
    refuse_outputs(c.source, FOLDER)
    hold(FOLDER / "val.bin")
    source, done = FOLDER / "source.part", begun(FOLDER, id_type(make_tokenizer(GPT2).vocab))
    if done and (not source.exists() or source.read_text() != c.source):
        raise UserError(f"{FOLDER} holds {done:,} documents of another --source; give the same, or "
                        f"remove {PARTS[0]} and {PARTS[1]}")
    write(source, lambda f: f.write(c.source.encode()))
    append_tokens(FOLDER, stream(c.source, done, c.documents), GPT2)

    def cut(ends):
        if len(ends) <= c.val_documents or not ends[-1 - c.val_documents]:
            raise UserError(f"--val_documents {c.val_documents} of {len(ends)} documents leave "
                            "none for training; give fewer")
        return int(ends[-1 - c.val_documents])
    finish(FOLDER, GPT2, cut, c.chunk, "more --documents and --val_documents")
    source.unlink()


main.stopped = "stopped; the same command goes on where it was"

if __name__ == "__main__":
    command(main)
