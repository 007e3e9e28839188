"""Make the dataset `stories`: 30,000 made-up stories to train on and 2,000 to validate.

    python data/stories/prepare.py

Every story is a row of 50 words; language.py holds the generator and the oracle. About 1 in 100
fresh stories happens to be one of the training stories.
"""
import argparse
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from common import command                                           # noqa: E402
from data.dataset import write_data                                  # noqa: E402
from data.stories.language import VOCABULARY, generate               # noqa: E402


def main(argv=None):
    """Write train.bin, val.bin and meta.json beside this file."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    rng = random.Random(0)
    words = VOCABULARY
    ids = {word: i for i, word in enumerate(words)}

    def rows(n):
        for _ in range(n):
            yield from (ids[word] for word in generate(rng))
    write_data(FOLDER, list(rows(30_000)), list(rows(2_000)), stride=len(generate(rng)),
               oracle="stories", tokenizer=dict(kind="words", items=words))
    print(f"{FOLDER}: 30,000 + 2,000 stories of 50 words, {len(words)} different ones")


if __name__ == "__main__":
    command(main)
