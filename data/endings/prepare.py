"""Make the dataset `endings`: the stories of `stories`, of which each begins with a prompt.

    python data/endings/prepare.py --sentences 2

The first sentences are given, and the rest is asked: for train.py --init, to train a model
of whole stories on for this task. With the seed of `stories` the stories are the same.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

# the project's root, so that this runs as a script
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.script import command, flag, parse_flags                      # noqa: E402
from data.stories.language import BEATS                              # noqa: E402
from data.stories.prepare import Config, write_stories               # noqa: E402


@dataclass
class EndingsConfig(Config):
    sentences: int = flag(2, "sentences of each story that are given", low=1,
                          high=len(BEATS) - 1)


def main(argv=None):
    """Write train.bin, val.bin, their prompts and meta.json beside this file."""
    config = parse_flags(EndingsConfig, __doc__, argv)
    write_stories(FOLDER, config, config.sentences)


if __name__ == "__main__":
    command(main)
