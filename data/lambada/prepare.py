"""Fetch the dataset `lambada`: 5,153 passages whose last word a reader of the whole can guess.

    python data/lambada/prepare.py [--file lambada_test.jsonl]
    python evaluate.py CHECKPOINT --lambada data/lambada/test.jsonl

LAMBADA (Paperno et al., arXiv 1606.06031) as OpenAI's GPT-2 was tested on it: lines of JSON with a
"text". Nothing is trained on it. Downloads the file unless a local copy is given.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from common import command, flag, parse_flags, write                 # noqa: E402
from data.corpus import fetch                                        # noqa: E402
from likelihood import parse_lambada                                 # noqa: E402

URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"


@dataclass
class Config:
    file: str | None = flag(None, "a local copy [downloaded]")


def main(argv=None):
    """Write test.jsonl beside this file."""
    c = parse_flags(Config, __doc__, argv)
    content = fetch(c.file, URL)
    texts = parse_lambada(content, c.file or URL)
    write(FOLDER / "test.jsonl", lambda f: f.write(content.encode()))
    print(f"{FOLDER / 'test.jsonl'}: {len(texts):,} passages")


if __name__ == "__main__":
    command(main)
