"""The network against a slow reference. (Its KV cache: test_cache.py.)

Models here have large random weights (see `model_of`), so that every input matters: what a test
compares differs by far more than its tolerance when something is wrong. Logits are about 1, and
float32 sums in another order moved none by more than 6e-7 with 40 seeds: CLOSE is 15 times that.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from diffusion import states_at
from model import PRESETS, ModelConfig, Transformer, cross_entropy, gelu, nll, rotate

CLOSE = 1e-5
VISIBLE = 1e-3                   # a logit that depends on an input changes by more than this
POSITIONS = ["rope", "learned", "both"]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def model_of(**options):
    """A small model in eval mode whose weights, biases and norms are all random and large."""
    defaults = dict(vocab=11, context=16, layers=2, heads=2, width=16)
    model = Transformer(ModelConfig(**(defaults | options))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.requires_grad_(False)


def far(a, b):
    """The largest difference."""
    return float((a - b).abs().max())


def reference(model, idx):
    """Logits (L, V) of one sequence idx (L,), in float64 and one head and position at a time."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    c, L = model.config, len(idx)
    D = c.width // c.heads
    turn = torch.polar(torch.ones(L, D // 2).double(), torch.tensor(
        [[p * 10000 ** (-2 * i / D) for i in range(D // 2)] for p in range(L)]).double())

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def turned(x):               # (L, D): pair i is a complex number, turned by position and i
        if c.positions == "learned":
            return x
        z = torch.complex(x[:, :D // 2], x[:, D // 2:]) * turn
        return torch.cat((z.real, z.imag), dim=1)

    x = w["embed.weight"][idx]
    if c.positions != "rope":
        x = x + w["embed_pos.weight"][:L]
    for n in range(c.layers):
        qkv = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.qkv")
        y = torch.zeros_like(x)
        for h in range(c.heads):
            q, k, v = (qkv[:, j * c.width + h * D:j * c.width + (h + 1) * D] for j in range(3))
            q, k = turned(q), turned(k)
            for i in range(L):
                seen = i + 1 if c.causal else L
                p = (k[:seen] @ q[i] / math.sqrt(D)).softmax(0)
                y[i, h * D:(h + 1) * D] = p @ v[:seen]
        x = x + linear(y, f"blocks.{n}.attn_out")
        m = linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp_in")
        m = m / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m ** 3)))
        x = x + linear(m, f"blocks.{n}.mlp_out")
    return linear(norm(x, "norm"), "lm_head")


# ---- the network

@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_logits_equal_those_of_a_plain_float64_network(causal, positions):
    """To CLOSE, and for each sequence of a batch, so that sequences do not mix. No false alarm."""
    model = model_of(attention="causal" if causal else "full", positions=positions)
    idx = torch.randint(12, (3, 9))
    logits = model(idx)
    for row in range(3):
        assert far(logits[row], reference(model, idx[row])) < CLOSE


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_causal_logits_ignore_the_future_and_bidirectional_ones_see_everything(causal, positions):
    """One token after the other is changed: which positions' logits move? Of 40 seeds, none had an
    input that moved a logit it should by less than 2.7 times VISIBLE."""
    model = model_of(attention="causal" if causal else "full", positions=positions)
    idx = torch.randint(11, (1, 8))
    logits = model(idx)[0]
    for j in range(8):
        other = idx.clone()
        other[0, j] = (idx[0, j] + 1) % 11
        moved = (model(other)[0] - logits).abs().amax(-1)            # (8,)
        first = j if causal else 0
        assert (moved[:first] < CLOSE).all() and (moved[first:] > VISIBLE).all()


def test_rotate_is_multiplication_of_complex_numbers():
    """Coordinates i and i + D/2 are one number, turned by the angle of its position: float64 to
    1e-12, and the result has the type of x. No false alarm."""
    x, angle = torch.randn(2, 3, 5, 8).double(), torch.randn(2, 1, 5, 4).double()
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    assert far(rotate(x, angle.cos(), angle.sin()), torch.cat((z.real, z.imag), -1)) < 1e-12
    assert rotate(x.bfloat16(), angle.cos(), angle.sin()).dtype == torch.bfloat16


def test_rotary_angles_are_position_times_10000_to_the_minus_2i_over_D():
    """Up to position 1,023, where float32 knows an angle to 6e-5. No chance involved."""
    model = model_of(context=1024, width=64)                         # D = 32
    for p in (0, 1, 500, 1023):
        for i in (0, 1, 15):
            angle = p / 10000 ** (2 * i / 32)
            assert float(model.cos[p, i]) == pytest.approx(math.cos(angle), abs=2e-4)
            assert float(model.sin[p, i]) == pytest.approx(math.sin(angle), abs=2e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_rotary_positions_alone_are_relative(positions):
    """All positions plus 9: with rope the logits stay, with a learned table they do not. No false
    alarm."""
    model, idx = model_of(positions=positions), torch.randint(11, (2, 6))
    moved = far(model.head(model.hidden(idx, pos=torch.arange(6) + 9)), model(idx))
    assert moved < CLOSE if positions == "rope" else moved > VISIBLE


@pytest.mark.parametrize("positions", POSITIONS)
def test_bidirectional_logits_move_with_their_tokens(positions):
    """Tokens in another order, each with its old position: the same logits in the new order; and
    without `pos` others. No false alarm."""
    model, idx, order = model_of(positions=positions), torch.randint(11, (2, 8)), torch.randperm(8)
    moved = model.head(model.hidden(idx[:, order], pos=order))
    assert far(moved, model(idx)[:, order]) < CLOSE
    assert far(model(idx[:, order]), model(idx)[:, order]) > VISIBLE


@pytest.mark.parametrize("positions", POSITIONS)
def test_each_sequence_may_have_its_own_positions(positions):
    """pos (B, L) equals one forward per row with pos (L,). No false alarm."""
    model, idx = model_of(attention="causal", positions=positions), torch.randint(11, (3, 7))
    pos = torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    together = model.hidden(idx, pos=pos)
    for row in range(3):
        alone = model.hidden(idx[row:row + 1], pos=pos[row])
        assert far(together[row], alone[0]) < CLOSE * 10             # hidden states are up to 10


def test_logits_are_float32_of_width_V_also_in_bf16():
    """And the blocks do run in bfloat16, which keeps 8 bits: with 120 seeds the largest change of a
    logit was between 0.002 and 0.014. No false alarm."""
    model, idx = model_of(), torch.randint(12, (2, 9))
    exact = model(idx)
    model.bf16 = True
    rounded = model(idx)
    assert exact.shape == rounded.shape == (2, 9, 11)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < far(rounded, exact) < 0.1


def test_only_the_blocks_run_in_bf16():
    """Without blocks, embedding and head alone: the same logits bit for bit. No false alarm."""
    model, idx = model_of(layers=0, positions="learned"), torch.randint(12, (2, 9))
    exact = model(idx)
    model.bf16 = True
    assert torch.equal(model(idx), exact)


def test_mask_has_a_row_in_the_embedding_and_none_in_the_head():
    """So no model can predict it. No chance involved."""
    model = model_of()
    assert model.mask_id == 11 and len(model.embed.weight) == 12 and len(model.lm_head.weight) == 11


def test_logits_at_chosen_positions_equal_the_same_rows_of_all():
    """Some, all and no positions. No false alarm."""
    model, idx = model_of(), torch.randint(12, (4, 9))
    for at in (torch.rand(4, 9) < 0.4, torch.ones(4, 9).bool(), torch.zeros(4, 9).bool()):
        logits = model.head(states_at(model, idx, at.nonzero(as_tuple=True)))
        assert logits.shape == (int(at.sum()), 11)
        assert torch.allclose(logits, model(idx)[at], rtol=0, atol=CLOSE)


def test_a_causal_model_is_not_asked_at_some_positions():
    """Asked there alone, a position would see what comes after it. Exact."""
    model, at = model_of(attention="causal"), (torch.zeros(1, 1).long(), torch.tensor([[2]]))
    with pytest.raises(ValueError, match="causal"):
        model.hidden(torch.randint(12, (1, 9)), at)


@pytest.mark.parametrize("positions", ["rope", "learned", "both"])
def test_last_block_at_some_positions_equals_the_same_rows_of_all(positions):
    """In any order, the same one twice too; and many of a single row. No false alarm: float32's
    rounding."""
    model, idx = model_of(positions=positions), torch.randint(12, (3, 9))
    at = torch.arange(3)[:, None], torch.tensor([[8, 4, 0, 6], [6, 6, 8, 4], [0, 1, 2, 3]])
    assert far(model.head(model.hidden(idx, at)), model(idx)[at]) < CLOSE
    at = torch.zeros(1, 1, dtype=torch.long), torch.randint(9, (1, 20))
    assert far(model.head(model.hidden(idx[:1], at)), model(idx)[at]) < CLOSE


def test_where_all_is_masked_relative_positions_all_look_the_same():
    """So one of them stands for a whole text of masks; not with learned positions, and not for a
    causal model. No false alarm: float32's rounding."""
    z = torch.full((1, 9), 11)
    model = model_of(positions="rope")
    assert model.config.masks_alike and far(model(z), model(z[:, :1])) < CLOSE
    for options in (dict(positions="learned"), dict(positions="both"), dict(attention="causal")):
        assert not model_of(**options).config.masks_alike
    assert far(model_of(positions="both")(z), model_of(positions="both")(z[:, :1])) > VISIBLE


def test_compiled_gelu_is_the_same_function(monkeypatch):
    """To float32's rounding, from -9 to 9. No false alarm."""
    x = torch.linspace(-9, 9, 1001)
    plain = gelu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert far(gelu(x), plain) < 2e-6


def test_sequences_in_which_nothing_is_wanted_are_not_computed():
    """Rows come in the same order; with nothing wanted at all there are none. No false alarm."""
    model, idx, sizes = model_of(), torch.randint(12, (4, 9)), []

    def run(idx, *args, run=model.run, **kwargs):
        sizes.append(len(idx))
        return run(idx, *args, **kwargs)
    model.run = run
    at = torch.zeros(4, 9, dtype=torch.bool)
    assert states_at(model, idx, at.nonzero(as_tuple=True)).shape == (0, 16)
    at[1, [2, 3]] = at[3, 8] = True
    some = at.nonzero(as_tuple=True)
    assert far(model.head(states_at(model, idx, some)), model(idx)[at]) < CLOSE
    assert sizes == [0, 2, 4]


# ---- losses in chunks, activations made twice

@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_made_again_give_the_same_gradients(dropout):
    """Bit for bit, with the same dropout. No chance involved."""
    model, idx = model_of(dropout=dropout).train(), torch.randint(12, (3, 9))
    model.requires_grad_(True)
    results = []
    for model.recompute in (False, True):
        torch.manual_seed(1)
        loss = model(idx).square().mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_activations_are_not_kept_when_they_are_made_again():
    """What autograd saves of the blocks is one hidden state each. No chance involved."""
    model, idx, saved = model_of(layers=6).train(), torch.randint(12, (3, 9)), {}
    model.requires_grad_(True)
    for model.recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.append(t.numel() if t.shape[:2] == (3, 9) else 0) or t,
                lambda t: t):
            model.hidden(idx)
        saved[model.recompute] = sum(sizes)
    assert saved[True] <= 8 * 3 * 9 * 16 < saved[False] / 4


def gradients(model, loss):
    """Of a scalar, by parameter; model's own stay as they were."""
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("chunk", [1, 5, 7, 1000])
@pytest.mark.parametrize("everywhere", [False, True])
def test_loss_in_chunks_has_the_value_and_gradients_of_the_plain_one(monkeypatch, chunk,
                                                                     everywhere):
    """Also times a factor that comes from outside, for chunks that do and do not divide the rows.
    No false alarm: 1e-5 of the largest gradient is for float32 sums in another order."""
    model, idx, target = model_of(), torch.randint(12, (3, 9)), torch.randint(11, (3, 9))
    model.requires_grad_(True)
    monkeypatch.setattr("model.CHUNK", chunk * 11)
    at = torch.ones(3, 9).bool() if everywhere else torch.rand(3, 9) < 0.5
    x = target[at]
    weight, sizes = torch.rand(len(x)), []

    def f(logits, x, weight):
        sizes.append(len(logits))
        return weight * cross_entropy(logits, x)
    loss = 3 * model.chunked_sum(model.hidden(idx)[at], f, x, weight)
    plain = 3 * f(model(idx)[at], x, weight).sum()
    assert max(sizes[:-1]) <= chunk and sum(sizes[:-1]) == len(x)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    expected = gradients(model, plain)
    largest = max(float(g.abs().max()) for g in expected)
    for a, b in zip(gradients(model, loss), expected):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * largest)
    model.requires_grad_(False)
    value = model.chunked_sum(model.hidden(idx)[at], f, x, weight)
    assert 3 * value.item() == pytest.approx(loss.item(), rel=1e-6)


def test_loss_in_chunks_takes_no_gradient_where_none_is_wanted(monkeypatch):
    """Under no_grad, as in validation, also of weights that are being trained. No false alarm."""
    model, idx, x = model_of(), torch.randint(12, (3, 9)), torch.randint(11, (27,))
    model.requires_grad_(True)
    h = model.hidden(idx).flatten(0, 1)
    expected = model.chunked_sum(h, cross_entropy, x)
    asked = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: asked.append(True))
    with torch.no_grad():
        value = model.chunked_sum(h.detach(), cross_entropy, x)
    assert value.item() == expected.item() and not asked and not value.requires_grad


def test_dropout_is_on_in_training_and_off_otherwise():
    """In eval mode the same logits as a model without dropout. No false alarm."""
    plain, idx = model_of(), torch.randint(12, (2, 9))
    model = model_of(dropout=0.5)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(idx), plain(idx)) and torch.equal(plain.train()(idx), plain(idx))
    model.train()
    assert far(model(idx), model(idx)) > VISIBLE


def test_dropout_reaches_both_outputs_of_a_block():
    """At a rate of 1 a block adds nothing: the hidden states are the embeddings. No false alarm."""
    model, idx = model_of(dropout=1.0).train(), torch.randint(12, (2, 9))
    assert torch.equal(model.hidden(idx), model.embed(idx))


# ---- sizes and the start

@pytest.mark.parametrize("options, message", [(dict(width=12, heads=4), "width 12"),
                                              (dict(width=18, heads=6), "width 18"),
                                              (dict(positions="alibi"), "alibi")])
def test_impossible_sizes_are_refused(options, message):
    """Heads need an even number of coordinates. ValueError; no chance involved."""
    with pytest.raises(ValueError, match=message):
        Transformer(ModelConfig(**(dict(vocab=11, context=16) | options)))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_preset_can_be_built(preset, positions):
    """Without memory, on torch's meta device. No chance involved."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab=50257, positions=positions, **PRESETS[preset]))
    assert len(model.blocks) == PRESETS[preset]["layers"]


@pytest.mark.parametrize("preset, millions", [("small", 169.627218), ("medium", 424),
                                              ("large", 863)])
def test_presets_have_the_size_of_the_published_models(preset, millions):
    """mdlm-owt has 169,627,218 parameters (arXiv 2406.07524), the SDTT paper names 424M and 863M.
    Ours lack the conditioning on time (a network 256 -> 128 -> 128, then 6 C per block and 2 C at
    the end from 128) and the head's output for the mask; they have the biases into which it folds,
    6 C per block and C at the end. No chance involved."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab=50257, **PRESETS[preset]))
    C, layers = model.config.width, model.config.layers
    time = 257 * 128 + 129 * 128 + layers * 129 * 6 * C + 129 * 2 * C
    ours = sum(p.numel() for p in model.parameters())
    published = ours + time + (C + 1) - layers * 6 * C - C
    digits = 6 if preset == "small" else 0
    assert round(published / 1e6, digits) == millions


def test_first_loss_is_close_to_log_V():
    """Logits start with a standard deviation of 0.02 sqrt(C) = 0.23, which costs 0.03 nats; random
    targets move the mean of 2,048 by 0.005. No false alarm within 0.08."""
    model = Transformer(ModelConfig(vocab=200, **PRESETS["nano"]))
    idx, target = torch.randint(201, (32, 64)), torch.randint(200, (32, 64))
    loss = F.cross_entropy(model(idx).flatten(0, 1), target.flatten()).item()
    assert loss == pytest.approx(math.log(200), abs=0.08)


def test_blocks_add_as_little_at_the_start_at_any_depth():
    """What all blocks together add to the embeddings, 2 and 32 layers deep, to a factor of 2:
    without the division of their output weights by sqrt(2 layers) it is 4 times as much. No false
    alarm."""
    sizes = []
    for layers in (2, 32):
        model = Transformer(ModelConfig(vocab=50, context=16, layers=layers, heads=2, width=32))
        idx = torch.randint(50, (8, 16))
        sizes.append((model.hidden(idx) - model.embed(idx)).std().item())
    assert 1 / 2 < sizes[0] / sizes[1] < 2


# ---- autoregressive models

def test_nll_is_minus_the_log_probability_of_each_token_after_its_prefix():
    """By one forward of each prefix alone, the start symbol before it; nats, to CLOSE. No false
    alarm."""
    model, x = model_of(attention="causal"), torch.randint(11, (3, 7))
    result = nll(model, x)
    assert result.shape == (3, 7)
    for row in range(3):
        for i in range(7):
            prefix = torch.tensor([[11] + x[row, :i].tolist()])
            p = model(prefix)[0, -1].double().softmax(0)
            assert float(result[row, i]) == pytest.approx(-math.log(p[x[row, i]]), abs=CLOSE)
