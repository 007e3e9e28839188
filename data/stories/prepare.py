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


def write_stories(folder, config, sentences=0):
    """Write a dataset folder of the stories that a Config says. sentences: so many of each,
    the first ones, are its prompt; 0: there are no prompts."""
    hold(folder / "val.bin")                             # one process at a time writes it
    rng = random.Random(config.seed)
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    rows = {}                            # {split: the ids of its stories in a row}
    prompts = {}                         # {split: the length of each one's prompt}
    # in this order, as they share one generator
    for split, n in (("train", config.train), ("val", config.val)):
        rows[split] = []
        prompts[split] = []
        for _ in range(n):
            story = generate(rng)
            rows[split] += [ids[word] for word in story]
            prompts[split].append(words_of(story, sentences))
    # all stories are as long as this one
    length = len(generate(rng))
    if not sentences:
        prompts = None
    write_data(folder, rows["train"], rows["val"], prompts, stride=length,
               oracle="stories", tokenizer=dict(kind="words", items=VOCABULARY))
    print(f"{folder}: {config.train:,} + {config.val:,} stories of 50 words, {len(ids)} "
          "different ones")


def words_of(story, sentences):
    """How many words the first sentences of a story (a list of words) have together."""
    ends = [i + 1 for i, word in enumerate(story) if word == "."]
    return ends[sentences - 1] if sentences else 0


def main(argv=None):
    """Write train.bin, val.bin and meta.json beside this file."""
    write_stories(FOLDER, parse_flags(Config, __doc__, argv))


if __name__ == "__main__":
    command(main)
