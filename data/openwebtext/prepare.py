"""Make the dataset `openwebtext` (8 million web pages, 9 billion tokens of GPT-2's): 18 GB.

    python data/openwebtext/prepare.py [--chunk 1024]

Streams it from the Hugging Face hub (pip install datasets), encodes it on all cores, and
writes train.bin and val.bin as nanoGPT does. Rows without a text (null) are left out, and
counted. Stopped at any moment, the same command goes on where it was.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# the project's root, so that this runs as a script
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.corpus import (PARTS, append_tokens, begun, finish,        # noqa: E402
                         refuse_outputs)
from data.dataset import id_type, make_tokenizer                     # noqa: E402
from data.files import UserError, hold, write                        # noqa: E402
from data.script import command, flag, package, parse_flags             # noqa: E402

GPT2 = {"kind": "gpt2"}                                              # the tokenizer


@dataclass
class Config:
    source: str = flag(
        "Skylion007/openwebtext", "id on the hub, or a folder of its parquet or JSON lines "
        "files; the column `text` is read")
    val_documents: int = flag(
        100_000, "the last so many are validation, as for MDLM's models", low=1)
    documents: int | None = flag(None, "only the first so many, for a trial", low=2)
    chunk: int | None = flag(
        None, "rows of so many tokens, <end> at both ends, as MDLM and SDTT have them "
        "(1024) [a text may be cut anywhere]", low=3)


def stream(source, first, documents):
    """The texts of a source from document number `first` on, with a progress bar, as parts
    (text, True); the text is None where a row has none. Ends before document number
    `documents`, if that is given. Raises UserError."""
    empty = 0
    datasets = package("datasets")
    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)

        # how many there are, for the bar: a folder of files may not say
        total = documents
        splits = rows.info.splits or {}
        if not total and "train" in splits:
            total = splits["train"].num_examples

        # a bad row is named by its number
        rows = rows.skip(first)
        with tqdm(total=total, initial=first, desc="documents", mininterval=1,
                  ncols=90) as bar:
            for number, row in enumerate(rows, first):
                if documents and number >= documents:
                    break
                text = row["text"]
                if not isinstance(text, str | None):
                    raise UserError(f"--source {source}, row {number}: its text is of type "
                                    f"{type(text).__name__}; it must be a string")
                if text is None:
                    empty += 1
                yield text, True
                bar.update()
        if empty:
            print(f"{source}: rows without a text, left out: {empty:,}")
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"--source {source} has no column {e}; it needs one named `text`")
    # of the hub, of several network packages, of file formats
    except Exception as e:
        why = " ".join(str(e).split())[:200]
        raise UserError(f"--source {source} cannot be read ({type(e).__name__}: {why}); "
                        "connect, or name a folder of its files; the same command goes on "
                        "where it was")


def main(argv=None):
    """Write train.bin, val.bin and meta.json beside this file."""
    config = parse_flags(Config, __doc__, argv)
    # what is missing is said before anything is written
    package("datasets")
    encoder = make_tokenizer(GPT2)
    refuse_outputs(config.source, FOLDER)
    hold(FOLDER / "val.bin")                             # one process at a time writes it

    # go on after the documents that are encoded already, if they are of the same source
    source = FOLDER / "source.part"
    done = begun(FOLDER, id_type(encoder.vocab))
    if done and (not source.exists() or source.read_text() != config.source):
        raise UserError(f"{FOLDER} holds {done:,} documents of another --source; give the "
                        f"same, or remove {PARTS[0]} and {PARTS[1]}")
    write(source, lambda f: f.write(config.source.encode()))
    append_tokens(FOLDER, stream(config.source, done, config.documents), GPT2)

    def cut(ends):
        """The token where validation begins; ends: the places where documents end."""
        held_out = config.val_documents
        if len(ends) <= held_out or not ends[-1 - held_out]:
            raise UserError(f"--val_documents {held_out} of {len(ends)} documents leave "
                            "none for training; give fewer")
        return int(ends[-1 - held_out])
    # finish removes the encoded parts, so their source need not be known any longer
    finish(FOLDER, GPT2, cut, config.chunk, "more --documents and --val_documents")
    source.unlink()


if __name__ == "__main__":
    command(main, stopped="stopped; the same command goes on where it was")
