"""Attention in the order of reveal, and the KV cache that it makes exact: against uncached forward
passes, by enumeration, and through the scripts.

The models are random, with weights large enough that every token matters. Differences of float32
rounding were under 3e-6 here with 20 seeds; CLOSE leaves room.
"""
import collections
import copy
import itertools
import json
import shutil
import math

import pytest
import torch

import bench
import distill
import sample as sample_script
import train
from data import checkpoints
from diffusion import categorical, nelbo, plan, q_sample, sample, sample_cached
from exact import order_loss
from helpers import call, make_dataset, refused
from model import sees_in_order
from toy import all_sequences, chi_square, count
from toy import network as model_of
from tools import convert, exact, machine

pytestmark = pytest.mark.usefixtures("small_nano")

CLOSE = 1e-5
LIMIT = 1e-6                     # a chi-square test fails below this chance


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def uncached(model, z, order, when, draw, seen):
    """sample_cached without a cache: in each step a whole forward pass, in the order so far. `seen`
    is called with the states at the positions that open."""
    (B, L), n = z.shape, order.shape[1]
    known = torch.ones(B, L).scatter_(1, order, 0)
    known = (torch.rand(B, L) + 2 * (1 - known)).argsort(1)[:, :L - n]
    place = torch.cat((known, order), 1).argsort(1).double()         # of each position in the order
    z = z.clone()
    for i in range(int(when.max()) + 1):
        row, j = (when == i).nonzero().unbind(1)
        h = model.hidden(z, rank=place)[row, order[row, j]]
        seen(h)
        z[row, order[row, j]] = draw(model.head(h))
    return z


def test_who_sees_whom():
    """By the definition, pair by pair. Exact."""
    model = model_of()
    z = torch.randint(11, (4, 9))
    z[torch.rand(4, 9) < 0.4] = model.mask_id
    order = torch.rand(4, 9)
    mask = sees_in_order(z, order, model.mask_id)
    for b, i, j in itertools.product(range(4), range(9), range(9)):
        token = z[b, j] != model.mask_id
        before = z[b, i] == model.mask_id or order[b, j] < order[b, i]
        assert mask[b, i, j] == (i == j or bool(token and before))


def test_a_tokens_state_is_the_same_whatever_is_revealed_after_it():
    """And a mask's differs. Exact up to rounding."""
    model, x = model_of(), torch.randint(11, (2, 12))
    order = torch.rand(2, 12).argsort(1).argsort(1).double()
    states = []
    for n in (4, 8, 12):
        states.append(model.hidden(torch.where(order < n, x, model.mask_id), rank=order))
    first = order < 4
    for h in states[1:]:
        assert (h - states[0])[first].abs().max() < CLOSE
        assert (h - states[0])[~first].abs().max() > 0.1


@pytest.mark.parametrize("positions", ["rope", "learned", "both"])
@pytest.mark.parametrize("prompt", [0, 1, 5])
@pytest.mark.parametrize("steps", [1, 3, 8, 40])
def test_cached_states_and_samples_are_those_without_a_cache(monkeypatch, positions, prompt, steps):
    """With and without a prompt, with fewer and more steps than masks, equal seeds. States within
    CLOSE, samples equal (a draw within 1e-5 of a border would differ: one seed in 1,000)."""
    model, z = model_of(positions=positions), torch.full((3, 12), 11)
    where = torch.rand(3, 12).argsort(1)[:, :prompt]
    z.scatter_(1, where, torch.randint(11, where.shape))
    order, when = plan(z, steps, 11)
    slow, fast = [], []
    torch.manual_seed(1)
    expected = uncached(model, z, order, when, categorical, slow.append)
    head = model.head
    monkeypatch.setattr(model, "head", lambda h: (fast.append(h), head(h))[1])
    torch.manual_seed(1)
    x = sample_cached(model, z, order, when, categorical)
    assert len(slow) == len(fast)
    assert all((a - b).abs().max() < CLOSE for a, b in zip(slow, fast))
    assert torch.equal(x, expected) and not (x == 11).any()
    assert torch.equal(x.gather(1, where), z.gather(1, where))


@pytest.mark.parametrize("steps", [2, 5, 12, 100])
@pytest.mark.parametrize("positions, prompt", [("rope", 0), ("both", 0), ("rope", 4)])
def test_each_position_is_read_twice_whatever_the_steps(steps, positions, prompt):
    """Counted at the embedding: masks once and tokens once, but for the tokens of the last step,
    which nobody asks; where all is masked and positions are relative, the first step is one.
    Exact."""
    model, z = model_of(positions=positions), torch.full((3, 12), 11)
    z[:, :prompt] = 1
    read = []
    model.embed.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    torch.manual_seed(2)
    order, when = plan(z, steps, 11)
    torch.manual_seed(2)
    sample(model, z, steps, 11)
    last, first = (int((when == i).sum()) for i in (when.max(), 0))
    saved = last + (first - 1 if positions == "rope" and not prompt else 0)
    assert sum(read) == 3 * (2 * 12 - prompt) - saved
    assert len(read) == int(when.max()) + 1 <= steps


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samples_have_the_law_of_the_model(steps):
    """All 27 sequences of 3 positions and 3 tokens against the sum over all orders and steps of
    reveal of the model's probabilities. Chi-square of 20,000: one in a million with another seed;
    a law with the orders of two steps mixed up would differ (the model is far from that)."""
    model = model_of(vocab=3, context=3, scale=8.0, positions="both")
    x, law = all_sequences(3, 3), torch.zeros(27, dtype=torch.float64)
    # the steps of the three tokens, sorted as they come: how many of all choices are so
    whens = collections.Counter(tuple(sorted(when))
                                for when in itertools.product(range(steps), repeat=3))
    for order in itertools.permutations(range(3)):
        place = torch.tensor(order).argsort().double().expand(27, 3)
        for when, number in whens.items():
            p = torch.ones(27, dtype=torch.float64)
            for i in sorted(set(when)):
                open_now = [order[j] for j in range(3) if when[j] == i]
                known = [order[j] for j in range(3) if when[j] < i]
                z = torch.full((27, 3), 3)
                z[:, known] = x[:, known]
                log_p = model.head(model.hidden(z, rank=place)).double().log_softmax(-1)
                for position in open_now:
                    p = p * log_p[:, position].gather(1, x[:, [position]])[:, 0].exp()
            law += p * number / (6 * steps ** 3)
    drawn = sample(model, torch.full((20_000, 3), 3), steps, 3)
    assert law.sum().item() == pytest.approx(1) and law.max() > 2 * law.min()
    assert chi_square(count(drawn, 3), law) > LIMIT


def test_the_bound_is_the_mean_over_all_orders():
    """nelbo of a text, 40,000 draws, against the model's mean negative log-likelihood over the 6
    orders of its 3 tokens. Within 4.5 standard errors: one seed in 100,000."""
    model = model_of(vocab=3, context=3, positions="both")
    x = torch.tensor([[2, 0, 1]])
    expected = 0.0
    for order in itertools.permutations(range(3)):
        place = torch.tensor([order]).argsort(1).double()
        for j in range(3):
            z = torch.where(place < j, x, 3)
            log_p = model.head(model.hidden(z, rank=place)).double().log_softmax(-1)
            expected -= log_p[0, order[j], x[0, order[j]]].item() / 6 / 3
    found = torch.stack([nelbo(model, x.expand(200, 3), 3) for _ in range(200)]).double()
    assert abs(found.mean() - expected) < 4.5 * found.std() / math.sqrt(200)


def test_the_bound_of_the_rest_is_the_mean_over_all_orders_that_begin_with_the_prompt():
    """Two of 4 tokens are given, in any order, then come the other two, in any order: nelbo, 40,000
    draws, and the loss of validation, 8,000, against the mean over these 4 orders of what the
    others cost. Within 4.5 standard errors: two seeds in 100,000. (With all 24 orders the mean is
    0.05 higher, which is 4 and 15 of these errors.)"""
    torch.manual_seed(3)
    model = model_of(vocab=3, context=4, positions="both", scale=12.0)
    x, given, others = torch.tensor([[2, 0, 1, 2]]), (0, 2), (1, 3)
    costs = []
    for first, then in itertools.product(itertools.permutations(given),
                                         itertools.permutations(others)):
        order = first + then
        place = torch.tensor([order]).argsort(1).double()
        cost = 0.0
        for j in (2, 3):
            z = torch.where(place < j, x, 3)
            log_p = model.head(model.hidden(z, rank=place)).double().log_softmax(-1)
            cost -= log_p[0, order[j], x[0, order[j]]].item() / 2
        costs.append(cost)
    assert max(costs) > min(costs) + 0.1                 # the order matters
    keep = torch.tensor([[True, False, True, False]])
    for loss, n in ((nelbo, 200), (order_loss, 40)):
        found = torch.stack([loss(model, x.expand(n, 4), 3, keep.expand(n, 4))
                             for _ in range(200)]).double()
        error = found.std() / math.sqrt(200)
        assert abs(found.mean() - sum(costs) / 4) < 4.5 * error


@pytest.mark.parametrize("attention", ["reveal", "full"])
def test_a_student_that_is_its_teacher_has_no_loss_at_one_step(attention):
    """k = 1: both see the same tokens in the same order; with orders of their own the loss would be
    far from 0. Exact up to rounding."""
    model, x = model_of(attention=attention), torch.randint(11, (8, 12))
    loss = distill.sdtt_loss(copy.deepcopy(model), x, model, (0.1, 1), "kld", 11)
    assert abs(loss) < CLOSE


def test_targets_see_what_the_teacher_revealed_after_all_else():
    """Two steps of half the time: the second step's states are those of the text with the tokens of
    the first at the end of the order. Exact up to rounding."""
    model, x, t = model_of(), torch.randint(11, (4, 12)), torch.full((4,), 0.9)
    z, rank, asked = q_sample(x, t, 11), torch.rand(4, 12), []

    def hidden(z, at=None, rank=None, usual=model.hidden):
        asked.append((z, rank))
        return usual(z, at, rank)
    model.hidden = hidden
    distill.sdtt_targets(model, z, t, 0.4, 2, 11, rank)
    (z1, rank1), (z2, rank2) = asked
    assert torch.equal(z1, z) and torch.equal(rank1, rank)           # 12 masks each, all rows
    first = (z1 == 11) & (z2 != 11)
    assert first.any() and (z2 == 11).any()
    assert torch.equal(rank2[~first], rank[~first]) and (rank2[first] >= 1).all()


def test_gradients_reach_every_weight_in_training():
    """Through the mask, also with --recompute. No chance involved."""
    model = model_of().requires_grad_(True).train()
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        nelbo(model, torch.randint(11, (4, 12)), 11).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ---- the scripts

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "d")
    return tmp_path


SHORT = ["--dataset", "d", "--batch", 4]
ROUNDS = [*SHORT, "--rounds", 2, "--teacher_steps", 8, "--steps_per_round", 2, "--samples", 4]


def attention_of(path):
    return checkpoints.load_model(path)[0].config.attention


def test_the_whole_path_with_reveal(folder, monkeypatch, capsys):
    """A reveal teacher is trained and distilled in a folder of its own; a full one is adapted
    first; samples and the benchmark take the students. No chance involved."""
    monkeypatch.setattr(machine, "limits", lambda *_: dict(     # measuring them takes a while
        device="CPU", threads=2, torch="2", dtype="float32", load=0, bytes_per_s=1, flop_per_s=1))
    monkeypatch.setattr(train.TrainConfig, "__post_init__", lambda self: setattr(
        self, "steps", self.steps or 2))
    call(distill, *ROUNDS, "--attention", "reveal")
    assert attention_of("out/d-nano-reveal/teacher.pt") == "reveal"
    assert attention_of("out/d-nano-reveal/round2.pt") == "reveal"
    # the table has a column of exact samples, and tools.exact its rows, each once
    columns = json.loads((folder / "out/d-nano-reveal/results.json").read_text())["rows"]
    assert {row["model"] for row in columns if row["steps"] == "exact"} == {
        "teacher", "round 1", "round 2"}
    for wanted in (42, 42):
        call(exact, "out/d-nano-reveal", "--samples", 4, "--json", "exact.json")
        rows = json.loads((folder / "exact.json").read_text())["rows"]
        assert len(rows) == len({row["key"] for row in rows}) == wanted
    # other temperatures of teacher and rounds are added to the rows that are there
    call(exact, "out/d-nano-reveal", "--samples", 4, "--what", "heat", "--json", "exact.json")
    heated = json.loads((folder / "exact.json").read_text())["rows"]
    assert len(heated) == 42 + 3 * len(exact.HEAT)
    students = [row for row in heated if row["model"] == "round 1"]
    assert {(row["divergence"], row["variant"]) for row in students} == {
        ("kld", "steps_per_round 2")}
    assert not any("variant" in row for row in heated if row["model"] in ("ar", "data"))
    # and in 32 steps
    call(exact, "out/d-nano-reveal", "--samples", 4, "--what", "heat32", "--json", "heat32.json")
    heated32 = json.loads((folder / "heat32.json").read_text())["rows"]
    assert sorted({row["temperature"] for row in heated32 if row["steps"] == 32}) == exact.HEAT
    # a folder of rounds alone, as --teacher of another leaves it: the same rows for these
    (folder / "out/rounds").mkdir()
    shutil.copy(folder / "out/d-nano-reveal/round1.pt", folder / "out/rounds")
    alone = ["out/rounds", "--judge", "out/d-nano-reveal/ar.pt", "--samples", 4, "--json"]
    call(exact, *alone, "exact.json")
    assert json.loads((folder / "exact.json").read_text())["rows"] == heated
    call(exact, *alone, "alone.json")
    assert len(json.loads((folder / "alone.json").read_text())["rows"]) == 1 + 4 + 2
    call(exact, "out/d-nano-reveal", "--samples", 4, "--lengths", 5, 12, "--json", "grow.json")
    grown = json.loads((folder / "grow.json").read_text())["rows"]
    assert len(grown) == 6 and {row["length"] for row in grown} == {5, 12}
    assert "--lengths 13" in refused(capsys, exact, "out/d-nano-reveal", "--lengths", 13)
    assert "--plot" in refused(capsys, exact, "x", "--lengths", 5, "--plot", "p.png")
    for content in ('{"rows"', "[]", '{"rows": [{"model": "a"}]}'):
        (folder / "other.json").write_text(content)
        assert "other.json" in refused(capsys, exact, "out/d-nano-reveal", "--json", "other.json")
    stopped = [row for row in rows if row["max_calls"]]
    assert all(row["calls"] <= row["max_calls"] for row in stopped) and len(stopped) == 7
    assert "full attention" not in capsys.readouterr().err
    call(train, *SHORT, "--objective", "mdlm")
    assert attention_of("out/d-nano/teacher.pt") == "full"
    # full attention: in steps, one token at a time, and nothing exact
    full = ["out/d-nano", "--judge", "out/d-nano-reveal/ar.pt", "--samples", 4]
    assert "--what steps" in refused(capsys, exact, *full)
    assert "--what steps" in refused(capsys, exact, *full, "--lengths", 5)
    call(exact, *full, "--what", "steps", "--json", "full.json")
    rows = json.loads((folder / "full.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [None, *exact.STEPS, 1024]
    assert {row.get("variant") for row in rows[1:]} == {"full attention"}
    flags = [*ROUNDS, "--attention", "reveal", "--teacher", "out/d-nano/teacher.pt",
             "--judge", "out/d-nano-reveal/ar.pt", "--out", "out/adapted"]
    call(distill, *flags)
    teacher = checkpoints.load_checkpoint("out/adapted/teacher.pt")
    assert teacher["config"]["init"] == "out/d-nano/teacher.pt"
    assert attention_of("out/adapted/round2.pt") == "reveal"
    first = checkpoints.load_checkpoint("out/d-nano/teacher.pt")["ema"]
    moved = [(first[k] - teacher["model"][k]).abs().max() for k in first]
    assert 0 < max(moved) < 0.1                          # 2 small steps from the given weights
    call(distill, *flags)                                # again: nothing to do
    capsys.readouterr()
    call(sample_script, "out/adapted/round2.pt", "--steps", 3, "--prompt", "w1 w2",
         "--num_samples", 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("w1 w2 w") for line in lines)
    call(bench, "--checkpoint", "out/d-nano-reveal/ar.pt", "out/adapted/round2.pt",
         "out/d-nano/teacher.pt", "--batch", 1, "--steps", 4, "--samples", 4, "--repeats", 1,
         "--no-compile", "--json", "rows.json")
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["ar", "diffusion", "diffusion-kv",
                                               "diffusion-naive"]
    assert rows[2]["nfe"] <= 4 and rows[2]["gen_ppl"] > 1 and rows[2]["roofline"] > 0


def test_a_start_with_other_tokens_is_refused(folder, capsys):
    """One sentence. No chance involved."""
    model = model_of(vocab=10)
    checkpoints.save_checkpoint(
        folder / "m.pt", kind="mdlm", model_config=vars(model.config), model=model.state_dict(),
        ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0, config={},
        tokenizer=dict(kind="words", items=[f"x{i}" for i in range(10)]))
    assert "other tokens" in refused(capsys, train, *SHORT, "--init", "m.pt", "--steps", 1)


def test_checkpoints_from_before_there_was_a_choice_still_load(folder):
    """Their `causal` says which attention it is. Exact."""
    for causal, attention in ((True, "causal"), (False, "full")):
        model = model_of(attention=attention)
        sizes = vars(model.config) | {"causal": causal}
        del sizes["attention"]
        checkpoints.save_checkpoint(
            folder / "m.pt", kind="mdlm", model_config=sizes, model=model.state_dict(),
            ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0, config={},
            tokenizer={})
        assert attention_of("m.pt") == attention


def test_reveal_cannot_be_exported_to_code_that_lacks_it(folder, capsys):
    """MDLM's. No chance involved."""
    pytest.importorskip("safetensors")
    model = model_of()
    checkpoints.save_checkpoint(
        folder / "m.pt", kind="mdlm", model_config=vars(model.config), model=model.state_dict(),
        ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0, config={},
        tokenizer={})
    assert "'reveal'" in refused(capsys, convert, "m.pt", "--export", "e")
    assert not (folder / "e").exists()


def test_unknown_attention_is_refused():
    """By name. No chance involved."""
    with pytest.raises(ValueError, match="attention.*'sideways'"):
        model_of(attention="sideways")
