"""The checks of test_cuda.py on a pretend GPU (pretend.py), in a process of its own: all that
runs on a GPU keeps tensors on one device, and waits no more often than it should."""
import pytest
import torch

import pretend
from helpers import ROOT, begin


def run_checks():
    """What the process does: pytest's own run of the checks, then a comparison on a device whose
    matrix products are off by a hundredth."""
    library = pretend.set_up()
    status = pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests/test_cuda.py"),
                          "-k", "on_pretend"])
    print(f"the checks ended with status {int(status)}")
    import test_cuda                     # as pytest has it, with its assertions explained
    with pretend.GPU() as gpu, pytest.raises(AssertionError, match="forward"):
        gpu.wrong = "addmm"
        test_cuda.compare(torch.device(pretend.NAME, 0), False, attention="reveal")
    print("what is wrong was noticed")
    assert library


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the process has written."""
    path = tmp_path_factory.mktemp("pretend") / "output.txt"
    process = begin(path, run_checks)
    process.join(120)
    return path.read_text()


def test_checks_pass_on_a_device_that_keeps_the_rules(output):
    """All that a pretend device can compute, with the CPU's numbers. No false alarm."""
    assert " passed" in output and "the checks ended with status 0" in output, output


def test_comparison_fails_on_a_device_that_computes_wrongly(output):
    """Matrix products are off by a hundredth, and the comparison with the CPU says so. No false
    alarm."""
    assert "what is wrong was noticed" in output, output
