"""Make a dataset from any text files: by characters, by a trained BPE, or by GPT-2's.

    python data/text/prepare.py FILE_OR_FOLDER --name mine --tokenizer bpe --vocab_size 4096
    python data/text/prepare.py TinyStories.txt --name tiny --separator "<|endoftext|>"

writes data/mine, so that the scripts take `--dataset mine`. Text is UTF-8; a byte order mark is
dropped, and every line end is LF. Each file is a document, or several with --separator. Of a
folder all files are read, in the order of their paths, and links to files; what begins with a dot
(.git, .DS_Store), links to folders or to nothing, and pipes are left out, and counted.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from common import command, flag, parse_flags                        # noqa: E402
from data.corpus import GAP, refuse_outputs, write_corpus            # noqa: E402
from data.files import UserError, reason                             # noqa: E402

LARGE = 2 ** 24                              # characters read at a time


@dataclass
class Config:
    source: str                              # the argument without --
    name: str = flag("text", "of the dataset, a folder under data/; with a slash, the path of one")
    tokenizer: str = flag("bpe", "chars: one token per character; bpe: trained here; gpt2",
                          choices=["chars", "bpe", "gpt2"])
    vocab_size: int = flag(4096, "tokens of bpe, the 256 bytes and <end> included", low=257)
    chunk: int | None = flag(None, "rows of so many tokens, <end> at both ends, as MDLM and SDTT "
                             "have them (1024) [a text may be cut anywhere]", low=3)
    separator: str | None = flag(None, "what stands between documents, such as <|endoftext|>; the "
                                 "line ends beside it are dropped [each file is a document]")


def files(source):
    """The text files of a source: itself, or all files below a folder in the order of their paths;
    and how many things there were left out. Raises UserError for what cannot be looked into."""
    source = Path(source)
    if not source.is_dir():
        return [source], 0

    def refuse(error):
        raise UserError(f"{error.filename} cannot be looked into ({reason(error)}); make it "
                        "readable, or move it away")
    paths, left_out = [], 0
    for folder, folders, names in os.walk(source, onerror=refuse):
        for name in list(folders):
            if name.startswith(".") or (Path(folder) / name).is_symlink():
                folders.remove(name)                     # os.walk then does not go there
                left_out += 1
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
        with open(path, encoding="utf-8-sig") as f:      # which makes every line end LF
            while text := f.read(LARGE):
                yield text
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason}); convert it, or move it away")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; name one that holds text")
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); make it readable, or name another")


def documents(path, separator=None):
    """The documents of a file in parts (text, ends), see data/corpus.py. With a separator: what
    stands between, without the line ends beside it, if anything is left."""
    rest, begun = "", False              # begun: a part of this document was given already
    for text in characters(path):
        rest += text
        if separator:
            *whole, rest = rest.split(separator)
            for document in whole:
                document = document.rstrip("\n") if begun else document.strip("\n")
                if document or begun:
                    yield document, True
                begun = False
            if not begun:
                rest = rest.lstrip("\n")
        # what is long is given in parts; its last characters may belong to a separator
        end = len(rest) - len(separator or "")
        gaps = list(GAP.finditer(rest, max(1, end - 10_000), max(1, end)))
        if len(rest) > LARGE and gaps:
            yield rest[:gaps[-1].start()], False
            rest, begun = rest[gaps[-1].start():], True
    if separator:
        rest = rest.rstrip("\n")
    if rest or begun:
        yield rest, True


def read(source, separator=None):
    """The documents of a file or folder, in parts."""
    for path in files(source)[0]:
        yield from documents(path, separator)


def folder_of(name):
    """The folder of a dataset of that name. Raises UserError for one that is taken, or none."""
    folder = Path(name) if "/" in name or os.sep in name else FOLDER.parent / name
    if not name.strip() or folder.name.startswith(".") or folder.resolve() == FOLDER.parent:
        raise UserError(f"--name {name!r} is no name for a dataset; take one such as mine")
    if (folder / "prepare.py").exists() and folder != FOLDER:
        raise UserError(f"--name {name} is a dataset with a script of its own; take another")
    return folder


def main(argv=None):
    """Write train.bin, val.bin and meta.json."""
    c = parse_flags(Config, __doc__, argv, source="a text file, or a folder of them")
    if c.separator == "":
        raise UserError("--separator is empty; give what stands between documents")
    folder = folder_of(c.name)
    refuse_outputs(c.source, folder)
    left_out = files(c.source)[1]
    if left_out:
        print(f"{c.source}: {left_out} left out: hidden, links to folders or nothing, or no files")
    source = Path(c.source)
    once = None
    if source.exists() and not source.is_file() and not source.is_dir():
        once = list(read(c.source, c.separator))         # a pipe, which cannot be read again

    def parts():
        return read(c.source, c.separator) if once is None else iter(once)
    write_corpus(folder, parts, c.tokenizer, c.vocab_size, c.chunk)


if __name__ == "__main__":
    command(main)
