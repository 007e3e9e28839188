"""The benchmark: that its sides do the same thing, that its yardsticks are right, what it refuses.
That something is fast is not tested: see results/.
"""
import copy
import dataclasses
import functools
import json
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import bench
import distill
from data import checkpoints, measures
from data.cost import counted_calls
from diffusion import sample
from helpers import call, refused, start_server
from model import PRESETS, ModelConfig, Transformer
from toy import ancestral_law, chi_square, count, exact_model, joint
from tools import (bench_setup, bench_train, crossover, fast_models, figures, machine, others,
                   static)
from tools.joint import sample_joint

LIMIT = 1e-6                     # a chi-square test fails below this chance
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def model_of(**options):
    defaults = dict(vocab=29, context=16, layers=3, heads=2, width=32)
    return Transformer(ModelConfig(**(defaults | options))).eval().requires_grad_(False)


# ---- the same law

@pytest.mark.parametrize("steps", [1, 2, 5])
def test_fast_and_naive_sampler_have_the_same_exact_law(steps):
    """All 64 sequences of 3 positions and 4 tokens, against their probabilities by enumeration.
    Chi-square: two in a million per case with another seed. One and two steps are far from the
    joint itself."""
    p = joint(4, 3, seed=3)
    model, law = exact_model(p), ancestral_law(p, steps)
    z = torch.full((12_000, 3), 4)
    naive = sample_joint(model, z, steps, 4)
    fast = sample(model, z, steps, 4)
    for x in (naive, fast):
        assert chi_square(count(x, 4), law) > LIMIT
        assert steps > 2 or chi_square(count(x, 4), p) < LIMIT


def test_fast_and_naive_sampler_agree_on_a_network():
    """A random transformer with sharp predictions, 16 positions, 4 steps, 2,000 texts of each:
    the token at one position, and whether it repeats the one before. Chi-square of two samples: two
    in a million with another seed."""
    model = model_of()
    model.lm_head.weight.mul_(20)
    z = torch.full((2000, 16), 29)
    fast, naive = sample(model, z, 4, 29), sample_joint(model, z, 4, 29)
    for a, b, cells in ((fast[:, 5], naive[:, 5], 29),
                        (fast[:, 5] == fast[:, 4], naive[:, 5] == naive[:, 4], 2)):
        a, b = (torch.bincount(x.long(), minlength=cells).double() for x in (a, b))
        few = a + b < 20                             # cells with few counts are put together
        a, b = (torch.cat((x[~few], x[few].sum()[None])) for x in (a, b))
        a, b = a[a + b > 0], b[a + b > 0]
        x2 = ((a - b) ** 2 / (a + b)).sum()
        chance = torch.special.gammaincc(torch.tensor((len(a) - 1) / 2).double(), x2 / 2)
        assert len(a) >= 2 and chance > LIMIT


def test_naive_sampler_keeps_the_prompt_and_leaves_no_mask():
    """No chance involved."""
    z = torch.full((3, 16), 29)
    z[:, 2:5] = torch.randint(29, (3, 3))
    x = sample_joint(model_of(), z, 7, 29)
    assert torch.equal(x[:, 2:5], z[:, 2:5]) and x.max() < 29


@pytest.mark.parametrize("objective", ["ar", "mdlm", "sdtt"])
def test_chunked_and_plain_training_steps_have_the_same_loss_and_gradients(monkeypatch, objective):
    """With the same noise; SDTT with dt = 0, for which nothing is drawn on the way. No false alarm:
    1e-5 of the largest gradient is for float32 sums in another order."""
    monkeypatch.setattr("model.CHUNK", 7 * 29)
    monkeypatch.setattr(bench_train, "DT", 0.0)
    model = model_of(attention="causal" if objective == "ar" else "full").requires_grad_(True)
    teacher, x, results = model_of(), torch.randint(29, (4, 16)), []
    losses = bench_train.steps_of(model, teacher)
    for form in ("chunked", "plain"):
        torch.manual_seed(1)
        loss = losses[objective, form](x)
        results.append((loss.item(), torch.autograd.grad(loss, list(model.parameters()))))
    (a, grads), (b, expected) = results
    largest = max(g.abs().max() for g in expected)
    assert a == pytest.approx(b, rel=1e-5) and a > 0
    assert all(torch.allclose(g, h, rtol=0, atol=1e-5 * largest) for g, h in zip(grads, expected))


def test_plain_targets_are_drawn_as_the_chunked_ones():
    """The mean loss over 100 draws with large dt, within 5 standard errors of each other: two in a
    million with another seed. Without the second teacher step it would be another loss."""
    model, teacher, x = model_of(), model_of(), torch.randint(29, (24, 16))
    for m in (model, teacher):
        m.lm_head.weight.mul_(20)
    means = []
    for loss, k in ((distill.sdtt_loss, 2), (bench_train.plain_sdtt, 2), (distill.sdtt_loss, 1)):
        values = torch.stack([loss(model, x, teacher, (0.4, k), "kld", 29) for _ in range(100)])
        means.append((values.mean(), values.std() / 10))
    (a, ea), (b, eb), (one, _) = means
    assert abs(a - b) < 5 * torch.hypot(ea, eb) and abs(a - one) > 10 * ea


# ---- the yardsticks

@pytest.mark.parametrize("B, steps", [(1, 3), (4, 5)])
def test_operations_of_diffusion_are_those_that_pytorch_counts(B, steps):
    """By torch.utils.flop_counter, which knows matrix products and attention. Within 2 %: the first
    step's one position has less to attend to. In a batch within 10 %: where others open more, the
    last block is computed at a few positions in vain. No false alarm."""
    model, calls = model_of(vocab=300, width=64), []
    model.embed.register_forward_hook(lambda _, ids, out: calls.append(ids[0].numel()))
    for name, run in (("diffusion", sample), ("diffusion-naive", sample_joint)):
        calls.clear()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                run(model, torch.full((B, 16), 300), steps, 300)
        row = dict(engine=name, batch=B, length=16, nfe=len(calls), seconds=2.0,
                   reads=sum(calls) / (B * 16))
        share = machine.roofline(row, model.config, {"flop_per_s": 1e9})
        assert share * 2e9 == pytest.approx(counter.get_total_flops(),
                                              rel=0.02 if B == 1 else 0.1)


@pytest.mark.parametrize("objective", ["ar", "mdlm", "sdtt"])
def test_operations_of_training_are_those_that_pytorch_counts(objective):
    """The same for a training step's loss and gradient. Within 8 %: how many positions are masked,
    and in how many rows a step opens something, is left to chance. No false alarm with this seed.
    """
    model = model_of(vocab=300, width=64, context=64,
                     attention="causal" if objective == "ar" else "full")
    teacher, x = model_of(vocab=300, width=64, context=64), torch.randint(300, (8, 64))
    loss = bench_train.steps_of(model.requires_grad_(True), teacher)[objective, "chunked"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss(x).backward()
    flop = machine.training_flop(objective, model.config, 8, 64)
    assert flop == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_bytes_of_decoding_are_weights_and_half_of_the_cache():
    """GPT-2's shape by hand: 85 million weights in the blocks, 38.6 in the head, 4 bytes each, read
    128 times; 37,000 numbers of the cache for each of 8 x 64 tokens. No false alarm."""
    config = ModelConfig(50257, **PRESETS["small"])
    row = dict(engine="ar", batch=8, length=128, nfe=128, seconds=1.0, dtype="float32")
    weights = 12 * 12 * 768 ** 2 + 768 * 50257
    expected = 128 * 4 * (weights + 8 * 64 * 2 * 12 * 768)
    assert machine.roofline(row, config, {"bytes_per_s": 1.0}) == pytest.approx(expected)
    with torch.device("meta"):           # shapes without numbers
        model = Transformer(config)
    assert weights == sum(p.numel() for n, p in model.named_parameters()
                          if p.ndim == 2 and "embed" not in n)


def test_peak_memory_is_what_a_run_adds():
    """A run that holds 200 MB and gives them back, beside 100 MB that were there before. Within
    10 %. Skipped where the system does not tell. No false alarm known."""
    before = torch.ones(25_000_000)
    result, peak = machine.with_peak_bytes(lambda: float(torch.ones(50_000_000)[0]), CPU)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs")
    assert result == 1 and peak == pytest.approx(200e6, rel=0.1) and len(before)


def test_limits_and_the_line_about_them(monkeypatch):
    """Positive numbers, and a warning where more than half of the threads are taken. No chance
    involved."""
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.ones(
        [min(n, 64) for n in shape]))
    m = machine.limits(CPU, torch.float32)
    assert m["bytes_per_s"] > 0 and m["flop_per_s"] > 0 and m["dtype"] == "float32"
    assert "warning" not in machine.describe(m | {"load": 0.4, "threads": 1})
    assert "warning: the machine is busy (load 0.6)" in machine.describe(m | {"load": 0.6,
                                                                             "threads": 1})


def test_bfloat16_is_in_the_matrices_and_logits_are_float32():
    """Norms and embeddings stay float32; logits move by bfloat16's rounding. No false alarm."""
    model, z = model_of(), torch.randint(30, (2, 16))
    exact = model(z)
    half = fast_models.prepare(model, "bfloat16", False, CPU)
    types = {name: p.dtype for name, p in half.named_parameters()}
    assert types["blocks.0.qkv.weight"] == types["lm_head.weight"] == torch.bfloat16
    assert types["embed.weight"] == types["norm.weight"] == torch.float32
    logits = half(z)
    assert logits.dtype == torch.float32 and 0 < (logits - exact).abs().max() < 0.05
    at = torch.arange(2)[:, None], torch.tensor([[3, 1], [2, 7]])
    assert (half.head(half.hidden(z, at)) - logits[at]).abs().max() < 0.05


# ---- what is shown

@pytest.mark.parametrize("points, expected", [
    ([(1, 4.0), (4, 0.25)], "overtakes at a batch of about 2.0"),
    ([(1, 8.0), (2, 4.0), (32, 0.5)], "overtakes at a batch of about 12.7"),
    ([(1, 0.9), (8, 0.5)], "is faster from batch 1 on"),
    ([(1, 3.0), (8, 1.0)], "is slower up to batch 8")])
def test_where_ar_overtakes(points, expected):
    """By hand; a straight line in logarithms. No chance involved."""
    assert crossover.overtakes(points) == expected


def test_ratio_to_ar_is_of_the_same_preset_length_and_batch():
    """By hand; a row that did not fit has none, and neither has one without AR beside it."""
    def row(engine, batch, seconds, **rest):
        return dict(engine=engine, model="m", preset=None, steps=8, batch=batch, length=16,
                    seconds=seconds) | rest
    rows = [row("ar", 1, 2.0), row("ar", 4, 3.0), row("diffusion", 1, 1.0),
            row("diffusion", 4, 6.0), row("diffusion", 8, 6.0),
            row("diffusion", 16, None, error="does not fit in memory")]
    crossover.fill_vs_ar(rows)
    assert crossover.crossings(rows) == ["trained, 16 tokens: AR overtakes at a batch of about 2.0 "
                                      "against m at 8 steps"]
    assert [r.get("vs_ar") for r in rows] == [1.0, 1.0, 2.0, 0.5, None, None]


def test_line_leaves_blanks_and_ends_in_the_error():
    """By hand. No chance involved."""
    columns = (("a", "<4"), ("b", ">7.2f"), ("c", ">6,"))
    assert machine.header(columns) == "a         b     c"
    assert machine.line(dict(a="x", b=1.5, c=1234), columns) == "x      1.50 1,234"
    assert machine.line(dict(a="x", b=None, c=1), columns) == "x               1"
    assert machine.line(dict(a="x", error="does not fit"), columns) == "x     does not fit"
    row = dict(seconds=2.0, seconds_min=1.0, seconds_max=4.0, peak_bytes=3_000_000, tokens_per_s=7)
    columns = (("spread", ">7.0%"), ("peak MB", ">8,.0f"), ("tokens/s", ">9,.0f"))
    assert machine.line(row, columns) == "   150%       3        7"


# ---- the command

@pytest.fixture
def folder(tmp_path, monkeypatch, small_nano):
    """A folder of tiny checkpoints, a tiny preset, and a machine that is not measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "limits", lambda device, dtype: dict(
        device="CPU", threads=2, torch="x", dtype="float32", load=0.0, bytes_per_s=1e9,
        flop_per_s=1e9))
    # a CPU without instructions for bfloat16, whatever this one has
    monkeypatch.setattr(bench_setup, "bfloat16_gain", lambda: 0.5)
    save(tmp_path / "out" / "tiny", 29)
    return tmp_path / "out" / "tiny"


def save(path, vocab, names=("ar", "teacher", "round1", "round2"), attention="full"):
    for name in names:
        model = model_of(vocab=vocab, layers=1, attention="causal" if name == "ar" else attention)
        checkpoints.save_checkpoint(
            path / f"{name}.pt", kind={"ar": "ar", "teacher": "mdlm"}.get(name, "sdtt"),
            model_config=dataclasses.asdict(model.config), model=model.state_dict(),
            ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0, config={},
            tokenizer={})


def test_checkpoints_are_compared_with_quality_beside_speed(folder, capsys):
    """Every row has the promised keys; the naive sampler runs at the smallest batch only; the last
    student is taken. No chance involved."""
    pytest.importorskip("matplotlib")
    call(bench, "--batch", 2, 1, "--steps", 2, 20, "--samples", 4, "--repeats", 2, "--no-compile",
         "--json", "rows.json", "--plot", "p.png")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    kinds = [(r["engine"], r["model"], r["steps"], r["batch"]) for r in rows]
    assert len(kinds) == len(set(kinds)) == 2 * (1 + 2 * 2) + 2
    assert ("diffusion", "round2", 20, 2) in kinds and ("diffusion-naive", "round2", 2, 1) in kinds
    for row in rows:
        assert row.keys() >= {"engine", "preset", "params", "steps", "batch", "length", "dtype",
                              "device", "threads", "seconds", "seconds_min", "seconds_max",
                              "tokens_per_s", "peak_bytes", "nfe", "roofline"}
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["nfe"] <= 16 or row["engine"] == "diffusion-naive"
        assert row["engine"] == "diffusion-naive" or row["gen_ppl"] > 1 and row["entropy"] > 0
    out = capsys.readouterr().out
    assert out.count("tokens: AR ") == 4 and "a step that reveals nothing calls no network" in out
    assert (folder.parent.parent / "p.png").stat().st_size > 1000


def test_random_weights_are_named_by_preset(folder, monkeypatch, capsys):
    """--preset does not touch the checkpoints. No chance involved."""
    monkeypatch.setattr(bench_setup, "VOCAB", 50)
    call(bench, "--preset", "nano", "--length", 8, 16, "--batch", 1, "--steps", 2, "--repeats", 1,
         "--no-compile", "--json", "rows.json", "--dtype", "bfloat16")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    assert [(r["engine"], r["length"], r["preset"]) for r in rows] == [
        (engine, L, "nano") for L in (8, 16)
        for engine in ("ar", "diffusion", "diffusion-kv", "diffusion-naive")]
    assert all("gen_ppl" not in r and r["dtype"] == "bfloat16" for r in rows)


def test_both_dtypes_are_timed_where_the_cpu_gains_by_bfloat16(folder, monkeypatch, capsys):
    """Each engine has a row in each, but the naive one, which is slow; AR's best is what all are
    compared with, and both are judged. No chance involved."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_setup, "bfloat16_gain", lambda: 3.0)
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    call(bench, "--batch", 1, "--steps", 2, "--samples", 4, "--repeats", 1, "--no-compile",
         "--json", "rows.json", "--plot", "p.png")
    # in the picture each engine is once, where it is fastest: teacher, student, AR's cross
    assert [len(line.get_xdata()) for line in drawn[0].axes[0].lines] == [2, 2, 1, 1]
    saved = json.loads((folder.parent.parent / "rows.json").read_text())
    assert set(saved["machines"]) == {"float32", "bfloat16"}
    rows = saved["rows"]
    both = [(engine, dtype) for engine, models in (("ar", 1), ("diffusion", 2))
            for dtype in ("float32", "bfloat16") for _ in range(models)]
    assert [(r["engine"], r["dtype"]) for r in rows] == both + [("diffusion-naive", "float32")]
    best = min(r["seconds"] for r in rows if r["engine"] == "ar")
    assert all(r["vs_ar"] == pytest.approx(best / r["seconds"]) for r in rows)
    assert all(r["gen_ppl"] > 1 for r in rows[:-1])
    out = capsys.readouterr().out
    assert "dtype" in out and out.count("tokens: AR ") == 2          # teacher and student


def test_one_dtype_may_be_chosen_where_both_would_be_timed(folder, monkeypatch):
    """No chance involved."""
    monkeypatch.setattr(bench_setup, "bfloat16_gain", lambda: 3.0)
    call(bench, "--engine", "ar", "--batch", 1, "--samples", 4, "--repeats", 1, "--no-compile",
         "--json", "rows.json", "--dtype", "float32", "float32")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    assert [r["dtype"] for r in rows] == ["float32"]


def test_little_work_is_compiled_as_whole_steps(folder, monkeypatch):
    """By the compiler's front end alone, which is quick. Calls are counted with the gaps; quality is
    judged in float32, in whatever the engines compute. No chance involved."""
    monkeypatch.setattr(torch, "compile", lambda f=None, *, usual=torch.compile, **options: usual(
        f, **(options | dict(backend="eager", mode=None))))
    save(folder, 29, ("round3",), attention="reveal")
    judged = []
    monkeypatch.setattr(bench_setup, "make_judge", lambda judge: judged.append(
        {p.dtype for p in judge.parameters()}) or measures.make_judge(judge))
    call(bench, "--batch", 2, "--steps", 4, "--samples", 4, "--repeats", 2, "--json", "rows.json",
         "--checkpoint", *[folder / f"{name}.pt" for name in ("ar", "teacher", "round3")],
         "--engine", "ar", "diffusion", "diffusion-kv", "--dtype", "bfloat16", "--compile")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    of = {row["engine"]: row for row in rows}
    assert of["diffusion"]["reads"] == of["diffusion"]["nfe"] <= 4
    assert of["diffusion-kv"]["reads"] > 2               # twice, and gaps
    assert set.union(*judged) == {torch.float32}


@pytest.mark.parametrize("attention", ["full", "reveal"])
def test_a_small_network_is_compiled_whole_a_large_one_block_by_block(monkeypatch, attention):
    """By the compiler's front end alone, whose arithmetic is PyTorch's own: the same texts, calls and
    positions as uncompiled, in few graphs for all numbers of positions. No chance involved."""
    counter, any_sizes = CompileCounter(), torch.fx.experimental._config.patch     # as in measure
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compiled_blocks = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, dynamic: compiled_blocks.append(block))
    torch.compiler.reset()
    plain = model_of(attention=attention, layers=1)
    small = fast_models.prepare(copy.deepcopy(plain), "float32", True, CPU)
    written = []
    for model in plain, small:
        torch.manual_seed(0)
        z = torch.full((2, 12), model.mask_id)
        with counted_calls(model) as calls, any_sizes(use_duck_shape=False):
            texts = [sample(model, z, steps, model.mask_id) for steps in (3, 4)]
        written.append((torch.stack(texts).tolist(), calls))
    assert written[0] == written[1]
    # one of many texts and positions, and at most one each for one position and one token
    assert 1 <= counter.frame_count <= 3 and not compiled_blocks
    monkeypatch.setattr(fast_models, "SMALL_MODEL", 0)
    large = fast_models.prepare(copy.deepcopy(plain), "float32", True, CPU)
    assert compiled_blocks == list(large.blocks) and "run" not in vars(large)


@pytest.mark.parametrize("asked", [None, True])
def test_nothing_is_compiled_where_a_compiled_step_could_not_draw(folder, monkeypatch, asked):
    """On a device without float64, AR and diffusion alike, also if it is asked for. No chance
    involved."""
    monkeypatch.setattr(bench_setup, "can_compile", lambda: True)
    for able in (True, False):
        monkeypatch.setattr(bench_setup, "can_draw", lambda device: able)
        config = bench_setup.BenchConfig(preset=["nano"], compile=asked)
        bench_setup.set_defaults(config, CPU, bench.ENGINES)
        assert config.compile == able


def test_large_matrices_are_multiplied_by_onednn_where_that_is_faster(monkeypatch):
    """The same logits within float32's rounding, also through the compiler's front end, and in bfloat16
    and on a CPU that does not gain nothing changes. No chance involved."""
    plain = model_of(attention="causal", layers=1, width=512)
    ids = torch.randint(29, (2, 16))
    for gain, dtype, changed in ((2.0, "float32", 4), (1.0, "float32", 0), (2.0, "bfloat16", 0)):
        monkeypatch.setattr(fast_models, "onednn_gain", lambda rows: gain)
        model = fast_models.prepare(copy.deepcopy(plain), dtype, True, CPU)
        own = [m for m in model.modules() if "forward" in vars(m)]
        assert len(own) == changed       # not the head's, which is small
        if changed:
            assert torch.allclose(model(ids), plain(ids), atol=1e-5)
            torch.compiler.reset()
            traced = torch.compile(model, fullgraph=True, backend="eager")
            assert torch.allclose(traced(ids), plain(ids), atol=1e-5)


def test_onednn_gain_is_a_ratio_of_times(monkeypatch):
    """3 s by PyTorch's choice, 2 s by oneDNN; 0 without it. No chance involved."""
    times = iter([3.0] * 3 + [2.0] * 3)
    monkeypatch.setattr(fast_models, "seconds", lambda run, device: next(times))
    fast_models.onednn_gain.cache_clear()
    if torch.backends.mkldnn.is_available():
        assert fast_models.onednn_gain(8) == 1.5
    fast_models.onednn_gain.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast_models.onednn_gain(8) == 0
    fast_models.onednn_gain.cache_clear()


def test_more_work_is_left_to_the_plain_sampler():
    """nano's 8 texts of 50 tokens are compiled as whole steps, 16 and small's one text not. No
    chance involved."""
    sizes = dict(vocab=104, width=128, layers=3, heads=4)
    nano = model_of(**sizes)
    assert static.pays_for(nano, 8, 50) and not static.pays_for(nano, 16, 50)
    assert not static.pays_for(model_of(**(sizes | dict(width=768, heads=12, layers=12))), 1, 50)


def test_exact_engines_count_their_calls(folder, monkeypatch):
    """Both, beside AR, with calls and reads of the run that was timed; a model is shared by the
    engines of its attention. No chance involved."""
    monkeypatch.setattr(bench_setup, "VOCAB", 50)
    call(bench, "--preset", "nano", "--length", 16, "--batch", 1, 2, "--repeats", 2, "--engine", "ar",
         "ar-exact", "diffusion-exact", "--no-compile", "--json", "rows.json")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        exact = row["engine"] != "ar"
        assert row["steps"] is None and row["vs_ar"] > 0 and row["roofline"] > 0
        assert 1 < row["nfe"] <= 16 and (row["nfe"] == 16 or exact)
        assert row["reads"] >= 1 if exact else row["reads"] == 1


def test_training_rows(folder, monkeypatch):
    """All objectives in all forms. Memory is measured in a new process for the last one, SDTT's,
    and for the others, to save their processes, in this one. No chance involved."""
    alone = bench_train.in_new_process

    def in_new_process(f, of, *sizes):
        if of != ("sdtt", "recompute"):
            return f(of, *sizes)
        measured.append(alone(f, of, *sizes))
        return measured[0]
    measured = []
    start_server()
    monkeypatch.setattr(bench_train, "in_new_process", in_new_process)
    monkeypatch.setattr(bench_train, "keep_blocks_below", lambda size: None)
    monkeypatch.setattr(bench_train, "VOCAB", 50)
    monkeypatch.setattr(bench_train, "limits", machine.limits)
    call(bench_train, "--preset", "nano", "--batch", 2, "--length", 16, "--repeats", 1,
         "--json", "rows.json")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    assert sorted((r["objective"], r["form"]) for r in rows) == [
        (o, form) for o in ("ar", "mdlm", "sdtt") for form in ("chunked", "plain", "recompute")]
    assert all(r["seconds"] > 0 and r["utilisation"] > 0 for r in rows)
    assert measured == [rows[-1]["peak_bytes"]]


def test_what_does_not_fit_says_so_and_the_run_goes_on(folder, monkeypatch, capsys):
    """With too little memory for the largest batch; with none for anything the command ends in one
    sentence. No chance involved."""
    need = machine.least_memory
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10 ** 7)
    monkeypatch.setattr(machine, "least_memory", lambda row, config: (
        10 ** 8 if row["batch"] == 2 else need(row, config)))
    flags = ["--engine", "ar", "diffusion", "--steps", "2", "--repeats", "1", "--no-compile"]
    call(bench, *flags, "--batch", 1, 2, "--samples", 2)
    assert capsys.readouterr().out.count("does not fit in memory") == 3
    assert "nothing fits in memory" in refused(capsys, bench, *flags, "--batch", 2)


def test_pytorchs_own_memory_errors_are_told_from_others():
    """An allocation of 2^60 bytes is refused by the allocator itself. No chance involved."""
    with pytest.raises(machine.OutOfMemory):
        with machine.room_for(0, CPU):
            torch.empty(2 ** 58)
    with pytest.raises(RuntimeError, match="shape"):
        with machine.room_for(0, CPU):
            torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("flags, words", [
    (["--preset", "nano", "--plot", "p.png"], ["--plot", "--out"]),
    (["--preset", "nano", "--out", "nowhere"], ["--preset", "--out"]),
    (["--out", "nowhere"], ["nowhere", "ar.pt"]),
    (["--length", "17"], ["--length 17", "16"]), (["--device", "cuda"], ["--device cuda"])])
def test_flags_that_cannot_be_are_refused_in_one_sentence(folder, capsys, flags, words):
    """It names the flag or the file. No chance involved."""
    sentence = refused(capsys, bench, *flags)
    assert all(word in sentence for word in words)


@pytest.mark.parametrize("flags", [["--preset", "tiny"], ["--engine", "magic"], ["--batch"],
                                   ["--steps", "0"], ["--batch", "1", "-2"], ["trian"]])
def test_unknown_names_and_empty_lists_end_in_usage(folder, capsys, flags):
    """Status 2, and the flag in the last line. No chance involved."""
    with pytest.raises(SystemExit) as stop:
        call(bench, *flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", bench.ENGINES)
def test_an_engine_writes_the_texts_that_it_is_asked_for(name):
    """Two of 8 tokens, real ones. No chance involved."""
    engine = bench.ENGINES[name]
    torch.manual_seed(0)
    model = Transformer(ModelConfig(10, 8, 1, 2, 16, attention=engine.attention)).eval()
    with torch.no_grad():
        x = engine.make(model, 2, 8, 4 if engine.in_steps else None, False)()
    assert x.shape == (2, 8) and 0 <= x.min() and x.max() < 10


@pytest.mark.parametrize("name, dtype", [("ours", "float32"), ("transformers", "float32"),
                                         ("ctranslate2", "float32"), ("ctranslate2", "int8")])
def test_ar_of_other_packages_writes_as_many_tokens(monkeypatch, name, dtype):
    """Three texts of 8 tokens by each engine of tools.others, whose packages are optional. Ours is not
    compiled, which takes long. No chance involved."""
    monkeypatch.setattr(others, "can_compile", lambda: False)
    if name != "ours":
        pytest.importorskip(name)
    shape = ModelConfig(20, 8, 1, 2, 16, attention="causal")
    with torch.no_grad():
        x = getattr(others, name)(shape, 8, dtype)(3)()
    assert x.shape == (3, 8) and 0 <= x.min() and x.max() < 20


def test_other_packages_stand_beside_ours(folder, monkeypatch, capsys):
    """With what our own takes as 1, in its better dtype; the file holds what is shown. Engines that take
    a given time. No chance involved."""
    times = {"float32": 0.3, "bfloat16": 0.2, "int8": 0.4}
    engines = [("ours", "float32"), ("ours", "bfloat16"), ("ctranslate2", "int8")]
    monkeypatch.setattr(others, "engines_of", lambda config: [
        (name, dtype, lambda B, dtype=dtype: lambda: dtype) for name, dtype in engines])
    monkeypatch.setattr(others, "seconds", lambda run, device: times[run()])
    monkeypatch.setattr(others, "limits", machine.limits)
    monkeypatch.setattr(others, "package", lambda name: None)
    call(others, "--batch", 1, 2, "--length", 10, "--json", "rows.json")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    assert [row["vs ours"] for row in rows] == pytest.approx(2 * [2 / 3, 1.0, 0.5])
    assert [row["ms a token"] for row in rows] == pytest.approx(2 * [30.0, 20.0, 40.0])
    assert capsys.readouterr().out.count("int8") == 2


@pytest.mark.parametrize("gain, said", [(0.25, "emulates bfloat16: its products take 4.0 times"),
                                        (3.0, "")])
def test_emulated_bfloat16_is_allowed_and_said(monkeypatch, capsys, gain, said):
    """In one line, and only where it is asked for on a CPU. No chance involved."""
    monkeypatch.setattr(fast_models, "bfloat16_gain", lambda: gain)
    for dtype, device in (("float32", CPU), ("bfloat16", torch.device("cuda"))):
        fast_models.warn_of_emulation([dtype], device)
        assert not capsys.readouterr().out
    fast_models.warn_of_emulation(["bfloat16"], CPU)
    shown = capsys.readouterr().out
    assert said in shown and shown.count("\n") == bool(said)


def test_missing_packages_are_named(folder, capsys, monkeypatch):
    """Before anything is measured. No chance involved."""
    for name in ("matplotlib", "transformers", "ctranslate2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install matplotlib" in refused(capsys, bench, "--plot", "p.png")
    for name in ("transformers", "ctranslate2"):
        assert f"pip install {name}" in refused(capsys, others, "--engine", name)


def test_rows_are_in_the_file_after_each_group(folder, monkeypatch):
    """An end in the middle, as of a terminal that is closed, leaves those of the first batch."""
    measured = []

    def measure(c, group, device, machine, usual=bench.measure):
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        usual(c, group, device, machine)
    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(SystemExit) as stop:
        call(bench, "--batch", 1, 2, "--steps", 2, "--samples", 4, "--repeats", 1, "--no-compile",
             "--engine", "ar", "--json", "rows.json")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    assert stop.value.code == 130 and [row["batch"] for row in rows] == [1]


def test_checkpoints_of_one_name_have_a_row_each(folder, tmp_path):
    """a/x/round2.pt and b/x/round2.pt. Exact."""
    paths = []
    for name in "ab":
        path = tmp_path / name / "x" / "round2.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes((folder / "round2.pt").read_bytes())
        paths.append(path)
    call(bench, "--checkpoint", folder / "ar.pt", *paths, "--batch", 1, "--steps", 2, "--samples",
         4, "--repeats", 1, "--no-compile", "--engine", "diffusion", "--json", "rows.json")
    rows = json.loads((folder.parent.parent / "rows.json").read_text())["rows"]
    assert [row["model"].split("/")[-3:] for row in rows] == [["a", "x", "round2"],
                                                              ["b", "x", "round2"]]


def test_models_that_do_not_belong_together_are_refused(folder, capsys):
    """Different vocabularies, and no diffusion model at all. No chance involved."""
    save(folder, 31, ["teacher"])
    assert "'teacher': 31" in refused(capsys, bench)
    for path in [folder / "teacher.pt", *folder.glob("round*")]:
        path.unlink()
    assert "distill.py" in refused(capsys, bench)
