"""Make the dataset `stories`: made-up stories, 30,000 to train on and 2,000 to validate.

    python data/stories/prepare.py

Every story is a row of 50 words; language.py holds the generator and the oracle. About 1 in
100 fresh stories happens to be one of the training stories.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path

# the project's root, so that this runs as a script
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.dataset import write_data                                  # noqa: E402
from data.files import hold                                          # noqa: E402
from data.script import command, flag, parse_flags                      # noqa: E402
from data.stories.language import VOCABULARY, generate               # noqa: E402


@dataclass
class Config:
    train: int = flag(30_000, "stories to train on", low=1)
    val: int = flag(2_000, "stories to validate with", low=1)
    seed: int = flag(0, "seed of the generator")


def main(argv=None):
    """Write train.bin, val.bin and meta.json beside this file."""
    config = parse_flags(Config, __doc__, argv)
    hold(FOLDER / "val.bin")                             # one process at a time writes it
    rng = random.Random(config.seed)
    ids = {word: i for i, word in enumerate(VOCABULARY)}

    def rows(n):
        """The ids of n fresh stories, one after another."""
        found = []
        for _ in range(n):
            found += [ids[word] for word in generate(rng)]
        return found
    # in this order, as they share one generator
    train = rows(config.train)
    val = rows(config.val)
    # all stories are as long as this one
    length = len(generate(rng))
    write_data(FOLDER, train, val, stride=length, oracle="stories",
               tokenizer=dict(kind="words", items=VOCABULARY))
    print(f"{FOLDER}: {config.train:,} + {config.val:,} stories of 50 words, {len(ids)} "
          "different ones")


if __name__ == "__main__":
    command(main)
