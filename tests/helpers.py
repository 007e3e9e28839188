"""What several tests of the scripts share: a small dataset, calls as from a command line, and
processes that start quickly."""
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import distill
from data import dataset, script

ROOT = Path(distill.__file__).resolve().parent

# preset nano for tests in which its size does not matter: see conftest.small_nano
NANO = dict(layers=1, heads=2, width=16, context=64)


def make_dataset(folder, prompts=None):
    """A dataset of random words, 10 of them, in rows of 12. prompts: so many words of each row are
    its prompt; a list: these numbers in turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, (240 * 12,), generator=generator).tolist()
    words = [f"w{i}" for i in range(10)]
    if prompts is not None:
        turns = torch.tensor(prompts).view(-1)
        lengths = turns[torch.arange(240) % len(turns)].tolist()
        prompts = {"train": lengths[:200], "val": lengths[200:]}
    dataset.write_data(folder, ids[:200 * 12], ids[200 * 12:], prompts, stride=12,
                       tokenizer=dict(kind="words", items=words))
    return folder


def call(module, *argv):
    """Run a script's main in this process as its command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__] + [str(a) for a in argv])
        patch.setattr(distill, "COLUMNS", [4, 8])
        script.command(module.main)


def refused(capsys, module, *argv):
    """The one sentence on stderr with which a command is refused (status 2)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(module, *argv)
    error = capsys.readouterr().err
    sentence = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(sentence) == 1 and error.endswith(sentence[0] + "\n")
    return sentence[0]


# ---- processes

def start_server():
    """Start the process that others are forked from, if it does not run yet. It imports PyTorch
    and the scripts once and computes nothing, so that a process forked from it is as good as a
    new one, and there in no time. tools.machine.in_new_process uses it, too."""
    # torch._dynamo, which the first optimizer imports, takes 2 seconds
    multiprocessing.set_forkserver_preload([
        "torch._dynamo", "pytest", "helpers", "train", "tools.evaluate", "tools.bench_train",
        "data.text.prepare", "data.stories.prepare"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()


def begin(out, f, *args, **environment):
    """A new process (of multiprocessing) that has begun f(*args), with one thread, in the
    project's folder. Its output goes into the file out."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=in_process, args=(out, environment, f, args))
    process.start()
    return process


def in_process(out, environment, f, args):
    """What begin's process does."""
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    f(*args)


def run_script(name, argv):
    """A script ("train.py") or module ("tools.evaluate") as `python` runs it, but in here."""
    sys.argv = [name, *argv]
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        sys.modules.pop(name, None)      # as if nobody had imported it
        runpy.run_module(name, run_name="__main__", alter_sys=True)
