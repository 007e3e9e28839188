"""The checks of test_cuda.py on a pretend GPU (pretend.py), in a process of its own: all that
runs on a GPU keeps tensors on one device, and waits no more often than it should."""
import pytest

from helpers import ROOT, begin


def run_checks(wrong, chosen):
    """pytest's own run of the checks, in this process, on a pretend device."""
    import pretend
    pretend.GPU.wrong = wrong
    raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests/test_cuda.py"),
                                  "-k", f"on_pretend and ({chosen})"]))


def outcome(tmp_path, *args):
    """(Exit status, output) of run_checks in a new process."""
    process = begin(tmp_path / "output.txt", run_checks, *args)
    process.join(120)
    return process.exitcode, (tmp_path / "output.txt").read_text()


def test_checks_pass_on_a_device_that_keeps_the_rules(tmp_path):
    """All that a pretend device can compute, with the CPU's numbers. No false alarm."""
    status, output = outcome(tmp_path, None, "test")
    assert status == 0 and "passed" in output, output


def test_checks_fail_on_a_device_that_computes_wrongly(tmp_path):
    """Matrix products that are off by a hundredth: each comparison with the CPU says so. No false
    alarm."""
    status, output = outcome(tmp_path, "addmm", "computes")
    assert status == 1 and output.count("AssertionError: forward") == 3, output
