"""Samplers of compiled steps of few shapes draw the texts of diffusion.sample. The compiler's front
end alone traces them here, which needs no C++ compiler; the arithmetic is PyTorch's own."""
import math
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cache import generate
from diffusion import categorical, sample
from tools import compiled_ar, static
from toy import network as model_of


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def uncompiled():
    """To trace takes seconds and changes no number: two tests below do, the others need not."""
    with torch.compiler.set_stance("force_eager"):
        yield


def greedy(logits, u=None):
    return logits.argmax(-1)


@pytest.mark.parametrize("attention", ["full", "reveal"])
@pytest.mark.parametrize("positions", ["rope", "both"])
@pytest.mark.parametrize("B, L, steps", [(1, 12, 3), (3, 12, 5), (2, 7, 40), (2, 9, 1)])
def test_texts_are_those_of_sample(uncompiled, attention, positions, B, L, steps):
    """With the likeliest token drawn, from the same plans: as many masks in a step as there are, and
    steps that reveal one at most. Large random weights, so no ties within float32's rounding; no
    chance involved."""
    model = model_of(attention=attention, positions=positions)
    sampler = static.StaticSampler(model, B, L, steps, draw=greedy, backend="eager")
    z = torch.full((B, L), model.mask_id)
    for seed in range(3):
        torch.manual_seed(seed)
        texts = sampler()
        torch.manual_seed(seed)
        assert torch.equal(texts, sample(model, z, steps, model.mask_id, draw=greedy))


def test_tokens_are_drawn_as_by_categorical():
    """The same numbers for the same seed, compiled, too: in float64, where the compiler's own random
    numbers would be float32's, in which no token below 6e-8 is drawn at the upper end. So here the
    random numbers are that close to 1. No chance involved."""
    logits = torch.randn(2000, 7) * 5
    torch.manual_seed(1)
    u = torch.rand((2000, 1), dtype=torch.float64)
    torch.manual_seed(1)
    drawn = compiled_ar.draw(logits, u)
    assert torch.equal(drawn, categorical(logits)) and len(drawn.unique()) == 7
    # 1e-9 of token 1, drawn where u is above 1 - 1e-9
    rare = torch.tensor([[0.0, math.log(1e-9)]])
    for below_1, token in ((2e-9, 0), (5e-10, 1)):
        u = torch.tensor([[1 - below_1]], dtype=torch.float64)
        assert compiled_ar.draw(rare, u).item() == token
        if shutil.which("g++"):
            assert torch.compile(compiled_ar.draw)(rare, u).item() == token


def test_ar_texts_are_those_of_generate():
    """With decoding and draw in one step, and the same random numbers. No chance involved."""
    model = model_of(attention="causal")
    prompt = torch.zeros((3, 0), dtype=torch.long)
    run = compiled_ar.ARSampler(model, 3, 12, lambda device, B, step: torch.compile(
        step, fullgraph=True, backend="eager"))
    for seed in (1, 2):                  # the second run has other numbers
        torch.manual_seed(seed)
        texts = run()
        torch.manual_seed(seed)
        assert torch.equal(texts, generate(model, prompt, 12, categorical))


@pytest.mark.parametrize("attention", ["full", "reveal"])
def test_a_sampler_is_one_graph_that_is_compiled_once_for_each_size(attention):
    """With each of its sizes, by warm_up; then 20 runs, whose plans differ, compile nothing. No
    chance involved: the seed is fixed (with others a rare plan is too large)."""
    counter = CompileCounter()
    model = model_of(attention=attention, positions="both")
    sampler = static.StaticSampler(model, 2, 12, 4, backend=counter)
    sampler.warm_up()
    assert counter.frame_count == len(sampler.sizes) <= 2
    torch.manual_seed(2)
    texts = [sampler() for _ in range(20)]
    assert counter.frame_count == len(sampler.sizes)
    assert len({tuple(x.flatten().tolist()) for x in texts}) == 20
    # and traced code computes what the code itself computes
    torch.manual_seed(2)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(sampler(), texts[0])


@pytest.mark.parametrize("attention", ["full", "reveal"])
def test_gaps_count_among_the_positions_of_a_call(uncompiled, attention):
    """Full attention computes every position; the cached step M tokens and M masks of each text. No
    chance involved."""
    model = model_of(attention=attention)
    sampler = static.StaticSampler(model, 2, 12, 4, draw=greedy, backend="eager")
    for M in sampler.sizes:
        order, when = sampler.plan()
        while static.most_revealed(when) > M:
            order, when = sampler.plan()
        sampler.run(order, when, M)
        computed = 2 * 12 if attention == "full" else 2 * 2 * M
        assert sampler.calls == [computed] * len(sampler.calls) and 2 <= len(sampler.calls) <= 4
        assert M % static.MULTIPLE_OF == 0 and M >= 3


def test_more_reveals_than_planned_for_are_possible(uncompiled):
    """A plan in which a step reveals more than in all plans before. No chance involved."""
    model = model_of(attention="reveal")
    sampler = static.StaticSampler(model, 2, 12, 4, draw=greedy, backend="eager")
    sampler.sizes, sampler.compiled = [1], True
    torch.manual_seed(3)
    texts = sampler()
    torch.manual_seed(3)
    z = torch.full((2, 12), model.mask_id)
    assert torch.equal(texts, sample(model, z, 4, model.mask_id, draw=greedy))


def test_predictions_that_are_no_numbers_are_refused(uncompiled):
    """As in sample. No chance involved."""
    model = model_of(attention="full")
    model.lm_head.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        static.StaticSampler(model, 1, 8, 2, backend="eager")()
