"""Fetch the dataset `lambada`: 5,153 passages whose last word a reader of the whole can
guess.

    python data/lambada/prepare.py [--file lambada_test.jsonl]
    python -m tools.evaluate CHECKPOINT --lambada data/lambada/test.jsonl

LAMBADA (Paperno et al., arXiv 1606.06031) as OpenAI's GPT-2 was tested on it: lines of JSON
with a "text". Nothing is trained on it. Downloads the file unless a local copy is given.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import regex                             # comes with tiktoken

# the project's root, so that this runs as a script
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.corpus import fetch                                        # noqa: E402
from data.files import UserError, write                              # noqa: E402
from data.script import command, flag, parse_flags                      # noqa: E402

URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"

# a word may hold combining marks, as in e\u0301, and signs within, as in don't
WORD = regex.compile(r"[\w\p{M}]+(?:['’-][\w\p{M}]+)*")


@dataclass
class Config:
    file: str | None = flag(None, "a local copy [downloaded]")


def parse_lambada(content, name):
    """The "text" of each line of JSON that is not blank. Raises UserError with the number
    of a bad line of `name`, and where there is no text."""
    texts = []
    # only a line feed ends a line of JSON: other signs, such as U+2028, may stand in a text
    for i, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str) or not WORD.search(text):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{name}, line {i}: not a JSON object with a \"text\" of "
                            "words; data/lambada/prepare.py fetches such a file")
        texts.append(text)
    if not texts:
        raise UserError(f"{name} has no passages; data/lambada/prepare.py fetches some")
    return texts


def main(argv=None):
    """Write test.jsonl beside this file."""
    config = parse_flags(Config, __doc__, argv)
    content = fetch(config.file, URL)
    # what is no such file is refused before anything is written
    texts = parse_lambada(content, config.file or URL)
    write(FOLDER / "test.jsonl", lambda f: f.write(content.encode()))
    print(f"{FOLDER / 'test.jsonl'}: {len(texts):,} passages")


if __name__ == "__main__":
    command(main)
