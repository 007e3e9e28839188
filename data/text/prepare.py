"""Make a dataset from any text files: by characters, by a trained BPE, or by GPT-2's.

    python data/text/prepare.py FILE_OR_FOLDER --name mine --tokenizer bpe --vocab_size 4096
    python data/text/prepare.py TinyStories.txt --name tiny --separator "<|endoftext|>"

writes data/mine, so that the scripts take `--dataset mine`. Text is UTF-8; a byte order
mark is dropped, and every line end is LF. Each file is a document, or several with
--separator. Of a folder all files are read, in the order of their paths, and links to
files; what begins with a dot (.git, .DS_Store), links to folders or to nothing, and pipes
are left out, and counted.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# the project's root, so that this runs as a script
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.corpus import GAP, refuse_outputs, write_corpus            # noqa: E402
from data.files import UserError, reason                             # noqa: E402
from data.script import command, flag, parse_flags                      # noqa: E402

LARGE = 2 ** 24                              # characters read at a time


@dataclass
class Config:
    source: str                              # the argument without --
    name: str = flag(
        "text", "of the dataset, a folder under data/; with a slash, the path of one")
    tokenizer: str = flag(
        "bpe", "chars: one token per character; bpe: trained here; gpt2",
        choices=["chars", "bpe", "gpt2"])
    vocab_size: int = flag(
        4096, "tokens of bpe, the 256 bytes and <end> included", low=257)
    chunk: int | None = flag(
        None, "rows of so many tokens, <end> at both ends, as MDLM and SDTT have them "
        "(1024) [a text may be cut anywhere]", low=3)
    separator: str | None = flag(
        None, "what stands between documents, such as <|endoftext|>; the line ends beside "
        "it are dropped [each file is a document]")


# ---- reading

def files(source):
    """The text files of a source: itself, or all files below a folder in the order of their
    paths; and how many things there were left out. Raises UserError for what cannot be
    looked into."""
    source = Path(source)
    if not source.is_dir():
        return [source], 0

    def refuse(error):
        raise UserError(f"{error.filename} cannot be looked into ({reason(error)}); make "
                        "it readable, or move it away")
    paths = []
    left_out = 0
    for folder, folders, names in os.walk(source, onerror=refuse):
        # os.walk does not go where a name is removed from its list
        for name in list(folders):
            if name.startswith(".") or (Path(folder) / name).is_symlink():
                folders.remove(name)
                left_out += 1
        # is_file is true of a link to a file, not of a pipe or a link to nothing
        for name in names:
            path = Path(folder) / name
            try:
                wanted = path.is_file() and not name.startswith(".")
            except OSError as e:
                refuse(e)
            if wanted:
                paths.append(path)
            else:
                left_out += 1
    return sorted(paths), left_out


def characters(path):
    """A file's text, LARGE characters at a time. Raises UserError."""
    try:
        # in this mode every line end is read as LF
        with open(path, encoding="utf-8-sig") as f:
            while text := f.read(LARGE):
                yield text
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason}); convert it, or move it "
                        "away")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; name one that holds text")
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); make it readable, or name "
                        "another")


def documents(path, separator=None):
    """The documents of a file in parts (text, ends), see data/corpus.py. With a separator:
    what stands between, without the line ends beside it, if anything is left."""
    rest = ""                            # what was read and is not given yet
    begun = False                        # whether a part of this document was given already
    for text in characters(path):
        rest += text

        # the documents that end here; the line ends between two parts of one are its own
        if separator:
            *whole, rest = rest.split(separator)
            for document in whole:
                document = document.rstrip("\n")
                if not begun:
                    document = document.lstrip("\n")
                if document or begun:
                    yield document, True
                begun = False
            if not begun:
                rest = rest.lstrip("\n")

        # what is long is given in parts, cut at a place between words near its end; its
        # last characters may belong to a separator
        end = len(rest) - len(separator or "")
        gaps = list(GAP.finditer(rest, max(1, end - 10_000), max(1, end)))
        if len(rest) > LARGE and gaps:
            place = gaps[-1].start()
            yield rest[:place], False
            rest = rest[place:]
            begun = True

    # the last document ends with the file
    if separator:
        rest = rest.rstrip("\n")
    if rest or begun:
        yield rest, True


def read(source, separator=None):
    """The documents of a file or folder, in parts."""
    paths, _ = files(source)
    for path in paths:
        yield from documents(path, separator)


# ---- the command

def folder_of(name):
    """The folder of a dataset of that name. Raises UserError for one that is taken, or
    none."""
    folder = FOLDER.parent / name
    if "/" in name or os.sep in name:
        folder = Path(name)
    if not name.strip() or folder.name.startswith(".") or folder.resolve() == FOLDER.parent:
        raise UserError(f"--name {name!r} is no name for a dataset; take one such as mine")
    # data/text itself is this script's own
    if (folder / "prepare.py").exists() and folder != FOLDER:
        raise UserError(f"--name {name} is a dataset with a script of its own; take "
                        "another")
    return folder


def main(argv=None):
    """Write train.bin, val.bin and meta.json."""
    config = parse_flags(Config, __doc__, argv, source="a text file, or a folder of them")
    if config.separator == "":
        raise UserError("--separator is empty; give what stands between documents")
    folder = folder_of(config.name)
    refuse_outputs(config.source, folder)
    _, left_out = files(config.source)
    if left_out:
        print(f"{config.source}: {left_out} left out: hidden, links to folders or nothing, "
              "or no files")

    # a corpus is read several times; a pipe can be read once
    source = Path(config.source)
    once = None
    if source.exists() and not source.is_file() and not source.is_dir():
        once = list(read(config.source, config.separator))

    def parts():
        """The documents from the first on."""
        if once is None:
            return read(config.source, config.separator)
        return iter(once)
    write_corpus(folder, parts, config.tokenizer, config.vocab_size, config.chunk)


if __name__ == "__main__":
    command(main)
