"""The training loop's parts: schedule, optimizers, averaged weights, compiled blocks.

Stopping and going on is in test_stopping.py, several processes in test_processes.py. Nothing here
is left to chance: no test has a false alarm.
"""
import copy
import shlex

import pytest
import torch

import common
import distill
import train
from data import muon, processes, script
from diffusion import nelbo
from model import ModelConfig, Transformer

CPU = processes.Processes(torch.device("cpu"))


def small(**kw):
    torch.manual_seed(0)
    return Transformer(ModelConfig(7, 8, 2, 2, 16, **kw))


def test_learning_rate_rises_linearly_then_falls_as_a_cosine_or_stays():
    """By hand: 4 steps of warm-up; half-way down at step 12 of 4..20; final = 1 is constant."""
    factors = [common.lr_factor(step, 20, 4, 0.2) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert factors[12] == pytest.approx(0.6) and factors == sorted(factors[:4]) + sorted(
        factors[4:], reverse=True)
    assert common.lr_factor(20, 20, 4, 0.2) == pytest.approx(0.2)
    assert {common.lr_factor(step, 20, 0, 1) for step in range(20)} == {1}


def test_average_follows_the_model_with_a_decay_that_warms_up():
    """d = 1/10 at step 0, 2/11 at step 1, at last the decay given. float32: 1e-6."""
    model, ema = small(), small()
    w, average = model.lm_head.weight, ema.lm_head.weight
    expected = average.detach().clone()
    for step, d in ((0, 0.1), (1, 2 / 11), (10_000, 0.9)):
        w.data += 1
        expected = d * expected + (1 - d) * w.detach()
        common.ema_update(ema, model, 0.9, step)
        torch.testing.assert_close(average.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_is_in_one_optimizer_and_muon_has_the_blocks_matrices(optimizer):
    """Counted by identity."""
    model = small(positions="both")
    made = common.make_optimizers(model, train.TrainConfig(optimizer=optimizer))
    ids = [id(w) for o in made for group in o.param_groups for w in group["params"]]
    assert sorted(ids) == sorted(id(w) for w in model.parameters())
    if optimizer == "muon":
        theirs = {id(w) for group in made[1].param_groups for w in group["params"]}
        assert theirs == {id(w) for b in model.blocks for w in b.parameters() if w.ndim == 2}
    else:
        assert len(made) == 1


@pytest.mark.parametrize("name", ["stories", "data/stories", "/elsewhere/stories"])
def test_stories_have_their_numbers_of_steps_by_name_and_by_path(name):
    """And any other dataset those of real text. Exact."""
    for objective in ("mdlm", "ar"):
        of_stories, of_text = train.DEFAULT_STEPS[objective]
        assert train.TrainConfig(objective=objective, dataset=name).steps == of_stories
        assert train.TrainConfig(objective=objective, dataset="data/mine").steps == of_text
    usual = distill.DistillConfig()
    assert distill.DistillConfig(dataset=name).steps_per_round == usual.steps_per_round
    assert distill.DistillConfig(dataset="data/mine").steps_per_round != usual.steps_per_round


def test_muon_in_float32_takes_the_steps_of_pytorchs_muon():
    """Three steps of both, on matrices that are wide, tall and square: they differ by bfloat16's
    rounding, 0.7 % of the way was seen; a wrong average, size or side is off by more than 10 %."""
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (16, 48), (16, 16))]
    theirs = copy.deepcopy(mine)
    begin = copy.deepcopy(mine)
    how = dict(lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizers = muon.Muon(mine, **how), torch.optim.Muon(theirs, **how)
    for _ in range(3):
        for w, v in zip(mine, theirs):
            w.grad = torch.randn_like(w)
            v.grad = w.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for w, v, first in zip(mine, theirs, begin):
        assert (w - v).norm() < 0.03 * (v - first).norm()
    # and what one has saved the other can go on from
    optimizers[0].load_state_dict(optimizers[1].state_dict())


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonal_brings_all_singular_values_near_one(shape):
    """The polynomial, applied five times, leaves them between 0.6 and 1.25, and the singular
    vectors as they are: in exact arithmetic U and V diagonalise the result. float64: 1e-8. The
    matrix has singular values from 0.05 to 1 of its norm's size. No false alarm."""
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    S = torch.linspace(0.05, 1, len(S), dtype=torch.float64)
    made = muon.orthogonal(U * S @ Vh, (3.4445, -4.7750, 2.0315), 5)
    core = U.T @ made @ Vh.T
    assert core.diagonal().min() > 0.6 and core.diagonal().max() < 1.25
    assert (core - core.diagonal().diag()).abs().max() < 1e-8


def test_ar_loss_is_the_mean_next_token_loss():
    """Against the logits of a full pass, the start symbol first. float32: 1e-5."""
    model, x = small(attention="causal"), torch.arange(14).view(2, 7) % 7
    log_p = model(torch.cat((torch.full((2, 1), 7), x[:, :-1]), 1)).log_softmax(-1)
    expected = -log_p.gather(2, x[:, :, None]).mean()
    assert train.ar_loss(model, x, 7).item() == pytest.approx(expected.item(), rel=1e-5)


def test_ar_loss_of_the_rest_is_the_mean_loss_of_the_tokens_that_are_not_given():
    """Which see the prompt, of another length in each text. float32: 1e-5."""
    model, x = small(attention="causal"), torch.arange(14).view(2, 7) % 7
    keep = torch.arange(7) < torch.tensor([[0], [4]])
    log_p = model(torch.cat((torch.full((2, 1), 7), x[:, :-1]), 1)).log_softmax(-1)
    nats = -log_p.gather(2, x[:, :, None])[..., 0]
    expected = (nats[0].sum() + nats[1, 4:].sum()) / 10
    assert train.ar_loss(model, x, 7, keep).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(monkeypatch):
    """The teacher is such a copy: were it to share the student's compiled code with its weights,
    every divergence would be near 0. Compiled with the eager backend, which needs no C compiler."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda block: compile_block(block, backend="eager"))
    c = train.TrainConfig(compile=True)
    z = torch.full((1, 8), 7)
    plain = small()(z)
    model = train.prepare_model(small(), c, CPU)
    torch.testing.assert_close(model(z), plain)
    teacher = train.prepare_model(copy.deepcopy(model), c, CPU)
    for w in model.parameters():
        w.data.zero_()
    torch.testing.assert_close(teacher(z), plain)
    assert model(z).abs().max() == 0


def test_validation_is_the_same_each_time_and_leaves_the_generator_alone():
    """Same text, same noise, so that two values can be compared. Exact."""
    class Data:
        def batch(self, split, B, context, device):
            assert split == "val"
            return torch.randint(7, (B, context)), None
    c, model = train.TrainConfig(), small()
    before = torch.get_rng_state()
    one, two = (train.validate(model, lambda m, x, keep: nelbo(m, x, 7), Data(), c)
                for _ in range(2))
    assert one == two and torch.equal(torch.get_rng_state(), before)


def test_printed_command_gives_the_same_config():
    """What distill.py prints before it trains something is what train.py understands."""
    for c in (train.TrainConfig(), train.TrainConfig(objective="ar"),
              train.TrainConfig(objective="ar", dataset="pydoc", preset="small", context=128),
              train.TrainConfig(compile=True, bf16=False, out="a folder")):
        words = shlex.split(script.as_command("train.py", c))
        assert words[:2] == ["python", "train.py"]
        assert script.parse_flags(train.TrainConfig, "", words[2:]) == c
