"""--device: which devices there are, and that one without float64 and bfloat16 will do.

No such device is here. A pretend one stands for it (pretend.py), in a process of its own, which
does the same on it and on the CPU. Both have the same random numbers, so that texts are the same
unless one of some 1,000 draws falls within rounding, 1e-6, of a border: another seed fails one time
in 1,000.
"""
import contextlib
import json
import os

import pytest
import torch

import distill
import model
import pretend
import sample
import train
from data import checkpoints, processes
from data.devices import find_device, float64_device, in_float64
from data.files import UserError
from data.processes import Processes
from exact import order_loss
from helpers import NANO, begin, call, make_dataset, refused
from sample import draw_samples
from tools import evaluate
from tools.joint import PublicSampling

# (checkpoint, how texts are drawn): every sampler, and what adjusts or couples its draws
DRAWS = [("teacher", dict(steps=3)), ("teacher", dict(steps=3, temperature=0.7, top_p=0.8)),
         ("teacher", dict(steps=4, order="confidence")), ("teacher", dict(steps=3, precision=32)),
         ("teacher", dict(steps=3, joint=True)), ("ar", {}), ("ar", dict(top_p=0.8)),
         ("ar", dict(steps="exact")), ("reveal/teacher", dict(steps=3)),
         ("reveal/teacher", dict(steps="exact")),
         ("reveal/teacher", dict(steps="exact", top_p=0.8))]


# ---- the pretend device

def work(device):
    """Train, distil, draw and measure in the folder `device`."""
    flags = ["--dataset", "data", "--device", device, "--batch", 4, "--warmup", 1, "--out", device]
    call(train, *flags, "--objective", "ar", "--steps", 2)
    call(train, *flags, "--steps", 2)
    call(train, *flags[:-1], f"{device}/reveal", "--steps", 2, "--attention", "reveal")
    call(distill, *flags, "--rounds", 1, "--teacher_steps", 4, "--steps_per_round", 2, "--samples",
         4)
    texts = []
    for name, how in DRAWS:
        # trained on the CPU, so that both draw from the same weights
        one, _ = checkpoints.load_model(f"cpu/{name}.pt", torch.device(device))
        assert not one.bf16
        x = draw_samples(one, 6, PublicSampling(**how), Processes(torch.device(device)))
        texts.append(x.tolist())
    with open(f"{device}/texts.json", "w") as f:
        json.dump(texts, f)
    call(sample, "cpu/teacher.pt", "--device", device, "--infill", "w1 _3_ w2", "--steps", 2)
    call(evaluate, "cpu/teacher.pt", "cpu/reveal/teacher.pt", "cpu/ar.pt", "--device", device,
         "--samples", 4, "--steps", 2, "--sequences", 8, "--last_word", "words.txt",
         "--continuations", 3, "--prompts", 3, "--json", f"{device}/e.json")


def refusals():
    """What the device refuses, and what it allows."""
    x = torch.ones(2, 3, device="pretend")
    for f in (x.double, x.bfloat16, lambda: torch.rand(2, dtype=torch.float64, device="pretend"),
              lambda: torch.tensor([0.5], dtype=torch.float64, device="pretend")):
        with pytest.raises(TypeError, match="pretend has no"):
            f()
    for f in (lambda: x + torch.ones(2, 3), lambda: x.index_put((torch.arange(2),), torch.ones(3))):
        with pytest.raises(RuntimeError, match="two devices"):
            f()
    assert (x.device.type, x.cpu().device.type) == ("pretend", "cpu")
    assert (x + 1)[[1, 0], torch.tensor([0, 2])].tolist() == [2, 2]
    assert float64_device(x.device) == torch.device("cpu")
    y = in_float64(x)
    assert (y.dtype, y.device.type, y.tolist()) == (torch.float64, "cpu", x.tolist())
    reveal, _ = checkpoints.load_model("cpu/reveal/teacher.pt", x.device)
    ids = torch.tensor([[0, 1, 2, 3]], device="pretend")
    # the sum over tokens is in float64, so on the CPU
    assert order_loss(reveal, ids, reveal.mask_id, ids < 2).isfinite()
    # sees_in_order, with whole numbers for ranks
    idx = torch.tensor([[0, 1]], device="pretend")
    assert model.sees_in_order(idx, 1 - idx, 5).tolist() == [[[True, True], [False, True]]]
    assert find_device("pretend") == torch.device("pretend")


def both(folder):
    """What the process does."""
    library = pretend.set_up()
    model.PRESETS["nano"] = NANO
    os.chdir(folder)
    work("cpu")
    with pretend.Device():
        refusals()
        work("pretend")
    assert library


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """The folder that both devices have worked in."""
    top = tmp_path_factory.mktemp("devices")
    make_dataset(top / "data")
    words = [" ".join(f"w{(i * j) % 10}" for i in range(20)) for j in (1, 3)]
    (top / "words.txt").write_text("\n\n".join(words))
    process = begin(top / "output.txt", both, top)
    process.join(120)
    assert process.exitcode == 0, (top / "output.txt").read_text()
    return top


def close(one, two):
    """Whether two values of JSON are the same, numbers within 1e-4 of each other."""
    if isinstance(one, float) and isinstance(two, float):
        return abs(one - two) <= 1e-4 * max(1, abs(one))
    return one == two


def test_every_sampler_draws_the_same_texts_without_float64(worked):
    """Text by text. They are 6 of each kind, and all kinds differ."""
    texts = [json.loads((worked / name / "texts.json").read_text()) for name in ("cpu", "pretend")]
    for (name, how), one, two in zip(DRAWS, *texts, strict=True):
        assert one == two, (name, how)
    assert len({str(x) for x in texts[0]}) == len(DRAWS)


def test_what_is_measured_is_the_same(worked):
    """Likelihood in all its forms, samples, last words, continuations; within 1e-4 (float32)."""
    results = [json.loads((worked / name / "e.json").read_text()) for name in ("cpu", "pretend")]
    for part in ("likelihood", "samples", "last_word", "continuations"):
        assert results[0][part]
        for one, two in zip(*(r[part] for r in results), strict=True):
            assert {k for k in one if k != "seconds" and not close(one[k], two[k])} == set()


def test_what_is_trained_and_distilled_is_the_same(worked):
    """AR, diffusion, attention reveal, a round: all weights within 1e-4 (float32; Muon in the same
    form on both), after steps that moved them much further."""
    for name in ("ar", "teacher", "reveal/teacher", "round1"):
        one, two = (torch.load(worked / device / f"{name}.pt", weights_only=True)["model"]
                    for device in ("cpu", "pretend"))
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-4, name
    before, after = (torch.load(worked / f"cpu/{name}.pt", weights_only=True)["model"]
                     for name in ("teacher", "round1"))
    assert max((before[key] - after[key]).abs().max() for key in before) > 1e-3
    assert (worked / "pretend/results.json").exists()


# ---- the flag

@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99", "mps", "xpu", ""])
def test_device_that_is_not_there_is_refused(name):
    """Unknown, without data, absent. (mps and xpu may be there.)"""
    with contextlib.suppress(RuntimeError):
        if name in ("mps", "xpu") and torch.get_device_module(name).is_available():
            pytest.skip(f"this machine has {name}")
    with pytest.raises(UserError, match=f"--device {name}, but .*; use --device cpu"):
        find_device(name)


@pytest.mark.parametrize("module, argv", [(train, []), (distill, []), (sample, ["x.pt"]),
                                          (evaluate, ["x.pt"])])
def test_scripts_refuse_it_in_one_sentence(module, argv, capsys):
    """Before anything is read or written."""
    assert "--device nonsense" in refused(capsys, module, *argv, "--device", "nonsense")


@pytest.mark.parametrize("cuda", [False, True])
def test_auto_is_cuda_or_else_the_cpu(cuda, monkeypatch):
    """Never another device, as mps has not been tried. (A CUDA GPU that says it is there, and is
    not, is refused by its name.)"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    assert find_device("auto") == torch.device("cuda:0" if cuda else "cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_device("auto") == torch.device("cuda:3" if cuda else "cpu")


def test_several_processes_need_the_cpu_or_cuda(monkeypatch):
    """They are refused before they meet. Exact."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device mps is for one process"):
        processes.start("mps")


def test_float64_is_kept_where_it_is():
    """On the CPU nothing is copied. Exact."""
    x = torch.rand(3, dtype=torch.float64)
    assert float64_device(x.device) == x.device and in_float64(x) is x
