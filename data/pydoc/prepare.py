"""Make the dataset `pydoc`: English that every Python carries, with no download.

    python data/pydoc/prepare.py [--site_packages] [--vocab_size 1024]

The docstrings of the standard library and the language reference of `help()`, about 3 MB,
cut into tokens by a byte-pair encoding trained on them.
"""
import ast
import pydoc_data.topics
import random
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

# the project's root, so that this runs as a script
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.corpus import write_corpus                                 # noqa: E402
from data.script import command, flag, parse_flags                      # noqa: E402

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
# what may have a docstring
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


@dataclass
class Config:
    vocab_size: int = flag(
        1024, "tokens, the 256 bytes and <end> included", low=257, high=65536)
    site_packages: bool = flag(False, "add the docstrings of every installed package")


def docstrings(folder):
    """Every docstring of the Python files below a folder, in the order of their paths, that
    is ASCII and longer than 40 characters."""
    for path in sorted(folder.rglob("*.py")):
        if SKIPPED & set(path.relative_to(folder).parts):
            continue
        # a file that is no valid Python is passed over; bad escapes are only warned of
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED):
                text = ast.get_docstring(node)
                if text and text.isascii() and len(text) > 40:
                    yield text


def main(argv=None):
    """Write train.bin, val.bin and meta.json beside this file."""
    config = parse_flags(Config, __doc__, argv)
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"])]
    if config.site_packages:
        folders.append(Path(paths["purelib"]))
    # the reference, then the docstrings
    documents = list(pydoc_data.topics.topics.values())
    for folder in folders:
        documents.extend(docstrings(folder))
    # each text once, and in no order: the last ones will be validation
    documents = list(dict.fromkeys(documents))
    random.Random(0).shuffle(documents)
    write_corpus(FOLDER, documents, "bpe", config.vocab_size)


if __name__ == "__main__":
    command(main)
