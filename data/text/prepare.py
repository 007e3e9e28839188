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


@dataclass
class Config:
    source: str                              # the argument without --
    name: str = flag("text", "of the dataset: the folder under data/, or the path of one")
    tokenizer: str = flag("bpe", "chars: one token per character; bpe: trained here; gpt2",
                          choices=["chars", "bpe", "gpt2"])
    vocab_size: int = flag(4096, "tokens of bpe, the 256 bytes and <end> included", low=257)


def read(source):
    """The texts of a file, or of all files below a folder. Raises UserError."""
    source = Path(source)
    paths = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"{source}: no such file or folder; name one that holds text")
        except (UnicodeDecodeError, OSError) as e:
            raise UserError(f"{path} cannot be read as UTF-8 text ({e}); convert or remove it")
    return texts


def main(argv=None):
    """Write train.bin, val.bin and meta.json."""
    c = parse_flags(Config, __doc__, argv, source="a text file, or a folder of them")
    folder = FOLDER.parent / c.name if c.name.isidentifier() else Path(c.name)
    if (folder / "prepare.py").exists() and folder != FOLDER:
        raise UserError(f"--name {c.name} is a dataset with a script of its own; take another")
    write_corpus(folder, read(c.source), c.tokenizer, c.vocab_size)


if __name__ == "__main__":
    command(main)
