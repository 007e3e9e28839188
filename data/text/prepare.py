"""Make a dataset from any text files: by characters, by a trained BPE, or by GPT-2's.

    python data/text/prepare.py FILE_OR_FOLDER --name mine --tokenizer bpe --vocab_size 4096

writes data/mine, so that the scripts take `--dataset mine`.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from common import UserError, command, flag, parse_flags             # noqa: E402
from data.corpus import write_corpus                                 # noqa: E402

LARGE = 2 ** 24                              # characters read at a time


@dataclass
class Config:
    source: str                              # the argument without --
    name: str = flag("text", "of the dataset: the folder under data/, or the path of one")
    tokenizer: str = flag("bpe", "chars: one token per character; bpe: trained here; gpt2",
                          choices=["chars", "bpe", "gpt2"])
    vocab_size: int = flag(4096, "tokens of bpe, the 256 bytes and <end> included", low=257)
    chunk: int | None = flag(None, "rows of so many tokens, <end> at both ends, as MDLM and SDTT "
                             "have them (1024) [a text may be cut anywhere]", low=3)


def read(source):
    """The texts of a file, or of all files below a folder, one after the other; a larger file than
    LARGE characters in pieces that end with a line. Raises UserError."""
    source = Path(source)
    paths = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    for path in paths:
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read(LARGE)
                while text:
                    more = f.read(LARGE)
                    end = text.rfind("\n") + 1 if more else len(text)
                    yield text[:end or len(text)]
                    text = text[end or len(text):] + more
        except FileNotFoundError:
            raise UserError(f"{source}: no such file or folder; name one that holds text")
        except (UnicodeDecodeError, OSError) as e:
            raise UserError(f"{path} cannot be read as UTF-8 text ({e}); convert or remove it")


def main(argv=None):
    """Write train.bin, val.bin and meta.json."""
    c = parse_flags(Config, __doc__, argv, source="a text file, or a folder of them")
    folder = FOLDER.parent / c.name if c.name.isidentifier() else Path(c.name)
    if (folder / "prepare.py").exists() and folder != FOLDER:
        raise UserError(f"--name {c.name} is a dataset with a script of its own; take another")
    write_corpus(folder, lambda: read(c.source), c.tokenizer, c.vocab_size, c.chunk)


if __name__ == "__main__":
    command(main)
