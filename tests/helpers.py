"""What several tests of the scripts share: a small dataset, and calls as from a command line."""
import sys

import pytest
import torch

import distill
from data import dataset, script


def make_dataset(folder):
    """A dataset of random words, 10 of them, in rows of 12."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, (240 * 12,), generator=generator).tolist()
    words = [f"w{i}" for i in range(10)]
    dataset.write_data(folder, ids[:200 * 12], ids[200 * 12:], stride=12,
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
