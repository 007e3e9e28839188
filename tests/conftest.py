import gc
import os
import sys
from pathlib import Path

# the tests' models are so small that a second thread costs more than it gives; set before
# torch is imported, and for the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest                                                        # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def modules_are_no_garbage():
    """bench.py collects garbage before each measurement, which is quick without the modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def killed_runs_begin_at_once(request, tmp_path_factory):
    """The longest work of the suite is done beside the other tests, where it is wanted. (Not beside
    another process of pytest-xdist, which would do it, too.)"""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if any("runs" in item.fixturenames and item.path.name == "test_stopping.py"
           for item in request.session.items):
        import test_stopping
        test_stopping.begin_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def toys_are_asked_about_positions(monkeypatch):
    """See toy.states_at: a toy can tell then which positions its predictions were wanted at."""
    import diffusion
    import distill
    import toy
    from tools import likelihood
    for module in (diffusion, distill, likelihood):
        monkeypatch.setattr(module, "states_at", toy.states_at)


@pytest.fixture(scope="module")
def small_nano():
    """Preset nano is tiny in this process, for files whose properties do not depend on its
    size: a step then costs a fifth."""
    import helpers
    import model
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "nano", helpers.NANO)
        yield
