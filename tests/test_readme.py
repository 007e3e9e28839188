"""The pages' commands: each takes its flags, and those that need no network run in small.

No test here has a false alarm: nothing random is looked at.
"""
import gc
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import common
import model
import train
from data import dataset, results, script
from helpers import make_dataset
from tools import bench_setup, machine, race

ROOT = Path(common.__file__).resolve().parent
README = (ROOT / "README.md").read_text()
# a command needs what those of the pages before it made
PAGES = ["README.md", "results/exact.md", "results/README.md", "tools/README.md", "data/README.md",
         "tests/README.md", "CONTRIBUTING.md"]


def commands_of(text):
    """Every command line of a page's sh blocks, and of its text, that starts Python or torchrun."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S).replace("\n", " ")
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", prose)
    return [line.split("#")[0].strip() for line in lines
            if line.startswith(("python ", "torchrun "))]


def all_commands():
    """Those of all pages, each once, in the order in which they come."""
    commands = []
    for page in PAGES:
        commands += commands_of((ROOT / page).read_text())
    return list(dict.fromkeys(commands))


def words_of(line):
    """A command line's words; {a,b} in them is taken apart as bash does."""
    found = []
    for word in shlex.split(line):
        some = [word]
        while any("{" in w for w in some):
            some = [w.replace(part[0], choice, 1) for w in some
                    for part in [re.search(r"\{([^{}]*)\}", w)]
                    for choice in (part[1].split(",") if part else [w])]
        found += dict.fromkeys(some)
    return found


def is_ours(words):
    """Not pip, venv or pytest."""
    return words[1] != "-m" or words[2].startswith("tools.")


COMMANDS = [(line, words) for line in all_commands() if is_ours(words := words_of(line))]


def start(words, root=ROOT):
    """Run the script in root, or the module after -m, of a command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        if words[1] == "-m":
            patch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            patch.setattr(sys, "argv", words[script:])
            runpy.run_path(str(root / words[script]), run_name="__main__")


@pytest.mark.parametrize("words", [words for _, words in COMMANDS],
                         ids=[line for line, _ in COMMANDS])
def test_command_takes_its_flags(words, monkeypatch):
    """The script is there and takes the flags, as far as the end of parse_flags."""
    class Parsed(Exception):
        pass

    def parse_flags(*args, parse=script.parse_flags, **kw):
        raise Parsed(parse(*args, **kw))
    monkeypatch.setattr(script, "parse_flags", parse_flags)
    with pytest.raises(Parsed):
        start(words)


def test_quick_start_has_the_path_and_the_tests():
    """Two sh blocks under the heading; the first ends in the whole path, the second runs tests."""
    part = README.split("## Quick start\n")[1].split("\n## ")[0]
    first, second = re.findall(r"```sh\n(.*?)```", part, re.S)[:2]
    assert "requirements.txt" in first and first.endswith("python distill.py --rounds 7\n")
    assert "pytest" in second


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_and_only_files_that_exist(page):
    """@NAME@ would be a number still to be filled in. Files in backticks are named from the top,
    links from where the page is."""
    text = (ROOT / page).read_text()
    assert not re.findall(r"@[A-Z0-9]+@", text)
    assert text.count("\n") <= (200 if page == "README.md" else 210)
    for name in re.findall(r"`(results/[\w.-]+|[\w/]+\.py)[:`]", text):
        here = (ROOT / page).parent / name
        assert "NAME" in name or (ROOT / name).exists() or here.exists(), name
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https:") or (ROOT / page).parent.joinpath(link).exists(), link


# ---- the commands in small

SMALL = {                                # flags that come after a page's own and make it quick
    "distill.py": "--steps_per_round 1 --batch 2",
    "data/endings/prepare.py": "--train 64 --val 16",
    "train.py": "--steps 2 --batch 2", "tools.evaluate": "--samples 4 --sequences 4",
    "tools.exact": "--samples 4 --what steps heat", "tools.score": "--orders 2",
    "bench.py": "--repeats 1 --samples 4 --batch 2 --no-compile",
    "tools.choices": "--samples 4", "tools.precision": "--tokens 300 --length 64 --steps 8"}
SEVEN = {"out/reveal-0", "out/reveal-0-tvd", "out/full-0"}
ELSEWHERE = {                            # what these need, and the tests that run them in small
    "kuleshov-group": "the hub: test_convert", "jdeschena": "the hub: test_convert",
    "gpt2-large": "the hub: test_convert, test_metrics, test_evaluate",
    "lambada/prepare": "the network: test_data", "openwebtext": "the network: test_data",
    "--site_packages": "minutes: test_data", "torchrun": "processes: test_processes",
    "--lengths": "longer texts than the small dataset has: test_reveal",
    "--context": "longer texts than the small dataset has: test_train",
    "bench_train": "seconds, in processes of their own: test_bench",
    "tools.gpu": "a GPU: test_gpu", "tools.others": "other packages: test_bench"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to run in, and a copy of the project in it, so that prepare scripts write there: a
    dataset pydoc of random words, text for the others, the texts that tools.score reads,
    out/stories-nano by the first command, and weights/. All presets are tiny."""
    top = tmp_path_factory.mktemp("home")
    gc.collect()
    gc.freeze()                                          # see conftest.modules_are_no_garbage
    with pytest.MonkeyPatch.context() as patch:
        for name in model.PRESETS:
            patch.setitem(model.PRESETS, name, dict(layers=1, heads=1, width=8, context=64))
        patch.setattr(train.TrainConfig, "__post_init__",
                      lambda self: setattr(self, "steps", self.steps or 2))
        patch.setattr(machine, "limits", lambda device, dtype: {
            "device": "CPU", "threads": 1, "torch": "2", "dtype": "float32", "load": 0.0,
            "bytes_per_s": 1e10, "flop_per_s": 1e11})    # of seconds' worth of measuring
        # a table of few columns
        open_exam = results.open_exam
        patch.setattr(results, "open_exam", lambda *args: open_exam(*args[:-1], [4, 8]))
        # a vocabulary of 50,257 would take most of the time
        patch.setattr(bench_setup, "VOCAB", 50)
        patch.chdir(top)
        for pattern in ("*.py", "data/*.py", "data/*/*.py"):
            for path in ROOT.glob(pattern):
                (copy := top / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        patch.setattr(dataset, "ROOT", top)
        patch.setattr(common, "ROOT", top)               # of what tools.precision writes
        shutil.copytree(ROOT / "weights", top / "weights")
        (top / "results").mkdir()
        shutil.copy(ROOT / "results" / race.TIMES, top / "results")
        make_dataset(top / "data/pydoc")
        (top / "some/folder").mkdir(parents=True)
        for path in ("input.txt", "some/folder/a.txt"):
            (top / path).write_text("many words of little sense , one after the other . " * 400)
        # the lines of text that a page shows
        shown = re.search(r'```text\n({"text".*?)```', (ROOT / "tools/README.md").read_text(), re.S)
        (top / "texts.jsonl").write_text(shown[1])
        run(words_of("python data/stories/prepare.py --train 64 --val 16"))
        run(words_of("python distill.py --rounds 7"))
        run(words_of("python distill.py --rounds 7 --attention reveal"))
        yield top


def run(words):
    """A command line in this process, with SMALL's flags after its own, and short texts. Only
    folders of SEVEN need seven rounds, for the commands that read round7.pt there."""
    name = words[2] if words[1] == "-m" else words[1]
    flags = SMALL.get(name, "").split()
    if "--length" in words:
        flags += ["--length", "16"]
    # (with 0, as some of the pages have it, there is no table)
    if name == "distill.py" and "--samples 0" not in " ".join(words):
        flags += ["--samples", "2"]
    others = "--out" in words or "pydoc" in words
    if name == "distill.py" and others and not SEVEN.intersection(words):
        flags += ["--rounds", "2"]
    gc.freeze()                          # see conftest.modules_are_no_garbage
    start(words + flags, Path())


@pytest.mark.parametrize("words", [words for line, words in COMMANDS
                                   if not any(part in line for part in ELSEWHERE)],
                         ids=lambda words: " ".join(words))
def test_command_runs_in_small(home, words, capsys):
    """With status 0; it prints something, and writes the file that it was asked for."""
    # (exact.json is made by a command with --plot)
    for word, package in (("--plot", "matplotlib"), ("exact.json", "matplotlib"),
                          ("--export", "safetensors"), ("tools.figures", "matplotlib")):
        if word in words:
            pytest.importorskip(package)
    run(words)
    assert capsys.readouterr().out
    for flag in ("--json", "--html", "--plot", "--export"):
        if flag in words:
            assert (home / words[words.index(flag) + 1]).exists()
