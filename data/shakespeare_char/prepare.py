"""Make the dataset `shakespeare_char`: 1.1 MB of Shakespeare, one token per character.

    python data/shakespeare_char/prepare.py [--file input.txt]

Downloads the file unless a local copy is given. Text is UTF-8; a byte order mark is
dropped, and every line end is LF.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

# the project's root, so that this runs as a script
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.corpus import fetch, refuse_outputs, write_corpus          # noqa: E402
from data.script import command, flag, parse_flags                      # noqa: E402

URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
       "input.txt")


@dataclass
class Config:
    file: str | None = flag(None, "a local copy of the text [downloaded]")


def main(argv=None):
    """Write train.bin, val.bin and meta.json beside this file."""
    config = parse_flags(Config, __doc__, argv)
    # the text must not be one of the files that are written
    if config.file and Path(config.file).is_file():
        refuse_outputs(config.file, FOLDER)
    write_corpus(FOLDER, [fetch(config.file, URL)], "chars", 0)


if __name__ == "__main__":
    command(main)
