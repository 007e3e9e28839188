"""The KV cache against forward passes without one, and AR sampling with it.

Models are those of test_model.py, whose large random weights make every input matter; CLOSE is
explained there.
"""
import shutil

import pytest
import torch

from cache import KVCache, Reading, decode, generate
from diffusion import categorical
from model import ModelConfig, Transformer, nll
from test_model import CLOSE, POSITIONS, VISIBLE, far, model_of
from tools.fast_models import compiled_decode
from toy import all_sequences, chi_square, count

LIMIT = 1e-6                     # a chi-square test fails below this chance


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def in_chunks(model, idx, sizes, pos=None, cache=None):
    """Logits (B, L, V), the tokens read by the model in chunks with a cache. A causal model's token
    sees those before it, another's the cache and its own chunk."""
    (B, L), logits, begin = idx.shape, [], 0
    cache = cache or model.cache(B, L)
    pos = torch.arange(L).expand(B, L) if pos is None else pos.expand(B, L)
    for n in sizes:
        part = slice(begin, begin + n)
        slot = torch.arange(begin, begin + n).expand(B, n)
        limit = slot if model.config.causal else torch.full_like(slot, begin + n)
        h = model.read(cache, Reading(idx[:, part], pos[:, part], slot, limit,
                                      torch.ones(B, n, dtype=torch.bool)))
        logits.append(model.head(h).view(B, n, -1))
        begin += n
    assert begin == L
    return torch.cat(logits, dim=1)


# ---- the cache

@pytest.mark.parametrize("positions", POSITIONS)
def test_any_split_into_chunks_gives_the_logits_of_one_forward(positions):
    """All 32 ways to split 6 tokens: token by token, one prefill, a prefill of any length and then
    one by one, and others. At every position, to CLOSE. No false alarm."""
    model, idx = model_of(attention="causal", positions=positions), torch.randint(12, (2, 6))
    full = model(idx)
    for split in range(32):
        cuts = [0] + [i for i in range(1, 6) if split >> (i - 1) & 1] + [6]
        sizes = [b - a for a, b in zip(cuts, cuts[1:])]
        assert far(in_chunks(model, idx, sizes), full) < CLOSE, sizes


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("per_row", [False, True])
def test_cache_may_be_filled_in_any_order_of_positions(positions, per_row):
    """Tokens of scattered positions, one by one and in chunks, equal one forward of the same order
    with the same `pos`, which is also other than without it. No false alarm."""
    model, idx = model_of(attention="causal", positions=positions), torch.randint(12, (3, 7))
    pos = torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    pos = pos if per_row else pos[0]
    full = model.head(model.hidden(idx, pos=pos))
    assert far(full, model(idx)) > VISIBLE
    for sizes in ([1] * 7, [3, 1, 2, 1]):
        assert far(in_chunks(model, idx, sizes, pos), full) < CLOSE, sizes


def test_new_tokens_of_a_bidirectional_model_see_the_cache_and_each_other():
    """In a single layer, where keys and values know nothing of their neighbours, the new tokens'
    logits are those of one forward of all tokens. No false alarm."""
    model, idx = model_of(layers=1), torch.randint(12, (2, 7))
    assert far(in_chunks(model, idx, [4, 3])[:, 4:], model(idx)[:, 4:]) < CLOSE


def test_cache_works_in_bf16():
    """Chunks against one forward in bfloat16, within what its rounding does (see above). No false
    alarm."""
    model, idx = model_of(attention="causal"), torch.randint(12, (2, 8))
    model.bf16 = True
    cache = model.cache(2, 8)
    logits = in_chunks(model, idx, [4, 1, 3], cache=cache)
    assert {x.dtype for x in cache.k + cache.v} == {torch.bfloat16}
    assert far(logits, model(idx)) < 0.1


def test_more_tokens_than_the_cache_holds_are_refused():
    """ValueError, at once or with those before. No chance involved."""
    model, idx = model_of(attention="causal"), torch.randint(12, (2, 5))
    for sizes in ([5], [3, 2]):
        with pytest.raises(ValueError, match="4 places for each text, but place 4"):
            in_chunks(model, idx, sizes, cache=model.cache(2, 4))


@pytest.mark.parametrize("positions", POSITIONS)
def test_more_tokens_than_the_context_are_refused(positions):
    """ValueError, with and without a cache; 16 are taken. No chance involved."""
    model, idx = model_of(attention="causal", positions=positions), torch.randint(12, (2, 17))
    with pytest.raises(ValueError, match="17 tokens, but the context is 16"):
        model(idx)
    with pytest.raises(ValueError, match="17 tokens, but the context is 16"):
        model.cache(2, 17)
    assert model(idx[:, :16]).shape == (2, 16, 11)


# ---- AR sampling

def test_generated_texts_have_the_probabilities_that_nll_gives():
    """All 27 texts of 3 tokens: exp(-nll) sums to 1, and 20,000 generated ones follow it.
    Chi-square: one in a million with another seed (whose weights must leave each text a chance)."""
    model = model_of(attention="causal", vocab=3)
    model.lm_head.weight /= 3                                        # no text is too rare to count
    p = (-nll(model, all_sequences(3, 3)).sum(1)).double().exp()
    assert float(p.sum()) == pytest.approx(1, abs=CLOSE)
    x = generate(model, torch.empty(20_000, 0, dtype=torch.long), 3, categorical)
    assert chi_square(count(x, 3), p) > LIMIT


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("P", [0, 1, 5, 15, 16])
def test_greedy_generation_equals_decoding_without_a_cache(positions, P):
    """One full forward for each token; the prompt is kept; up to the whole context. A false alarm
    would need two best logits closer than 1e-6."""
    model, prompt = model_of(attention="causal", positions=positions), torch.randint(11, (3, P))
    expected = torch.cat((torch.full((3, 1), 11), prompt), dim=1)    # the start symbol first
    while expected.shape[1] < 17:
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), dim=1)
    result = generate(model, prompt, 16, lambda logits: logits.argmax(-1))
    assert torch.equal(result, expected[:, 1:]) and torch.equal(result[:, :P], prompt)


@pytest.mark.parametrize("P, length", [(5, 4), (17, 17), (0, 17)])
def test_texts_that_do_not_fit_are_refused(P, length):
    """A prompt longer than the text, a text longer than the context. ValueError; no chance
    involved."""
    model = model_of(attention="causal")
    with pytest.raises(ValueError, match=f"prompt of {P} tokens in a text of {length}"):
        generate(model, torch.zeros(2, P, dtype=torch.long), length, lambda logits: logits[:, 0])


def test_generation_forwards_each_token_once_and_the_last_never():
    """The start symbol and the prompt together, then one at a time. No chance involved."""
    model, sizes = model_of(attention="causal"), []

    def run(idx, *args, run=model.run, **kwargs):
        sizes.append(idx.numel() / 2)                    # two texts
        return run(idx, *args, **kwargs)
    model.run = run
    generate(model, torch.zeros(2, 4, dtype=torch.long), 8, lambda logits: logits.argmax(-1))
    assert sizes == [5, 1, 1, 1]


@pytest.mark.parametrize("grain", [2, 3, 5, 100])
def test_looking_at_more_slots_than_are_filled_changes_nothing(grain):
    """The empty ones are masked: the same logits in every step. No chance involved."""
    model, seen = model_of(attention="causal"), [[], []]
    for logits, g in zip(seen, (1, grain)):
        generate(model, torch.zeros(2, 2, dtype=torch.long), 8,
                 lambda new: logits.append(new) or new.argmax(-1), grain=g)
    assert far(torch.stack(seen[0]), torch.stack(seen[1])) < CLOSE


def test_a_cache_may_be_used_again():
    """What an earlier text left in it is not seen. No chance involved."""
    model, texts = model_of(attention="causal"), []
    cache = KVCache(model.config, 2, 8)
    for prompt in (3, 5):
        prompt = torch.full((2, 3), prompt)
        texts += [generate(model, prompt, 8, lambda logits: logits.argmax(-1), grain=4, cache=given)
                  for given in (cache, None)]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[2], texts[3])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_decoding_is_one_graph_and_gives_the_same_tokens():
    """Greedy, for 14 tokens: one text, with two shapes of attention, and three, whose weights are
    packed, with one: to compile takes seconds. The weights are random: no ties within float32's
    rounding. No chance involved."""
    model = model_of(attention="causal", context=16, layers=1)
    for B, grain in ((1, 8), (3, 16)):
        torch.compiler.reset()
        texts = [generate(model, torch.full((B, 2), 3), 16, lambda logits: logits.argmax(-1), step,
                          grain)
                 for step in (decode, compiled_decode("cpu", B))]
        assert torch.equal(*texts) and len(set(texts[0][0].tolist())) > 1


def test_compiled_decoding_of_float32_weights_keeps_the_type_of_the_blocks():
    """bfloat16 inside the blocks, weights in float32: keys, values and tokens are those of the step
    as it is. Traced by the compiler's front end alone, which needs no C++ compiler. Greedy, so
    that no chance is in it; the arithmetic is the same."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, 16, 2, 2, 32, attention="causal")).eval()
    model.bf16 = True
    torch.compiler.reset()
    step = torch.compile(decode, fullgraph=True, backend="eager")
    prompt = torch.zeros((2, 0), dtype=torch.long)
    compiled, plain = (generate(model, prompt, 16, lambda logits: logits.argmax(-1), f)
                       for f in (step, decode))
    assert torch.equal(compiled, plain)


@pytest.mark.parametrize("bf16, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_generation_stores_as_many_keys_as_it_needs_in_the_type_of_the_blocks(monkeypatch, bf16,
                                                                              dtype):
    """One slot per token of the text (the start symbol has that of the last). No false alarm."""
    made, model = [], model_of(attention="causal")
    monkeypatch.setattr("model.KVCache", lambda *args: made.append(KVCache(*args)) or made[0])
    model.bf16 = bf16
    generate(model, torch.zeros(2, 4, dtype=torch.long), 8, lambda logits: logits.argmax(-1))
    [cache] = made
    assert len(cache.k) == len(cache.v) == 2
    for stored in cache.k + cache.v:
        assert stored.shape == (2, 2, 8, 8) and stored.dtype == dtype
        assert (stored != 0).any(dim=(0, 1, 3)).all()
