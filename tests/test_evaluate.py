"""The command: what it measures, what it refuses, and that a seed gives the same table again."""
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

import sample
import toy
from data import checkpoints, dataset, processes
from data.files import UserError
from data.processes import Processes
from data.prompts import ends_of
from helpers import call, make_dataset, refused
from model import ModelConfig, Transformer
from sample import Sampling
from tools import evaluate, figures
from tools.joint import PublicSampling, sample_joint

CPU = Processes(torch.device("cpu"))
WORDS = dict(kind="words", items=[f"w{i}" for i in range(10)])


def random_model(attention="full", vocab=10, context=12, seed=0, scale=6):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab, context, 1, 2, 16, attention=attention)).eval()
    for w in model.parameters():                         # far from uniform
        w.data *= scale
    return model


def save(path, kind, model, data, tokenizer=WORDS):
    checkpoints.save_checkpoint(
        path, kind=kind, model_config=model.config.__dict__, model=model.state_dict(),
        ema=model.state_dict(), optimizer=[], step=1, steps=1, seconds=1.0,
        config={"dataset": str(data)}, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a dataset, a teacher, a student, a model with reveal attention, and a judge."""
    top = tmp_path_factory.mktemp("evaluate")
    make_dataset(top / "data")
    save(top / "teacher.pt", "mdlm", random_model(scale=3), top / "data")
    save(top / "round1.pt", "sdtt", random_model(scale=9), top / "data")
    save(top / "reveal.pt", "mdlm", random_model("reveal"), top / "data")
    save(top / "ar.pt", "ar", random_model("causal"), top / "data")
    return top


FEW = ["--samples", 8, "--steps", 2, "--sequences", 4]


@pytest.mark.parametrize("attention", ["full", "causal", "reveal"])
def test_samples_depend_on_the_seed_alone(attention):
    """Also on how many are asked for only beyond whole batches. Exact; two sets of 40 random texts
    are never equal by chance."""
    model = random_model(attention, 4, 6, scale=1)
    one, two, other = (sample.draw_samples(model, 40, Sampling(3, seed), CPU) for seed in (0, 0, 1))
    assert one.shape == (40, 6) and int(one.max()) < 4
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(one[:32], sample.draw_samples(model, 32, Sampling(3), CPU))


@pytest.mark.parametrize("attention", ["causal", "reveal"])
def test_exact_samples_of_two_processes_are_those_of_one(attention, monkeypatch):
    """70 texts in three batches: texts, calls and reads, whichever process draws a batch. The two
    processes run one after the other here, and each is then given what both have drawn. Exact."""
    model, sampling, drawn = random_model(attention, 4, 6, scale=2), Sampling("exact"), {}

    class Drawn(Exception):
        pass

    def gather(everyone, mine):
        drawn[now.rank] = mine
        if len(drawn) < 2:
            raise Drawn
        everyone[:] = [drawn[0], drawn[1]]
    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    costs = []
    alone = sample.draw_samples(model, 70, sampling, CPU, costs=costs)
    for rank in (0, 1, 0):               # the first time 0 has nobody to ask
        now, found = Processes(torch.device("cpu"), rank, 2), []
        try:
            x = sample.draw_samples(model, 70, sampling, now, costs=found)
        except Drawn:
            continue
        assert torch.equal(x, alone) and found == costs
    assert len(drawn) == 2 and len(costs) == 3 and sum(len(cost.calls) for cost in costs) == 70


def test_the_whole_table(made, tmp_path, capsys):
    """Every part that is asked for is there, in text and as JSON, with how each row was drawn; the
    data has a row of its own, and the judge its likelihood. Exact."""
    out, text = tmp_path / "e.json", tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{(i * j) % 10}" for i in range(20)) for j in (1, 3)))
    call(evaluate, made / "teacher.pt", made / "round1.pt", made / "reveal.pt", made / "ar.pt",
         *FEW, "--steps", 4, 2, "--temperature", 0.8, 1.0, "--last_word", text, "--continuations",
         3, "--prompts", 2, "--prompt_tokens", 4, "--json", out)
    shown, results = capsys.readouterr().out, json.loads(out.read_text())
    rows = results["samples"]
    assert [(r["model"], r["steps"], r["temperature"]) for r in rows] == [("data", None, None)] + [
        (name, steps, T) for name in ("teacher", "round1", "reveal") for steps in (2, 4)
        for T in (0.8, 1.0)] + [("ar", None, 0.8), ("ar", None, 1.0)]
    for row in rows:
        assert (row["samples"], row["tokens"], row["joint"]) == (8, 96, False)
        assert row["precision"] == (None if row["model"] == "data" else 64)
        assert row["gen_ppl"] > 1 and row["gen_ppl_se"] > 0 and row["low"] is not None
        assert {"text_ppl", "self_bleu4_se", "distinct2", "seen", "repetition_se"} <= row.keys()
    calls = {(r["model"], r["steps"]): r["nfe"] for r in rows}
    assert calls["teacher", 2] == 2 and calls["teacher", 4] <= 4 and calls["ar", None] == 12
    assert [r["model"] for r in results["likelihood"]] == ["teacher", "round1", "reveal", "ar",
                                                           "judge"]
    assert {r["model"]: set(r) & {"bound", "any_order", "mixture", "nll"}
            for r in results["likelihood"]} == {
        "teacher": {"bound", "any_order"}, "round1": {"bound", "any_order"},
        "reveal": {"any_order", "mixture"}, "ar": {"nll"}, "judge": {"nll"}}
    assert {r["tasks"] for r in results["last_word"]} == {2}
    assert len(results["frontier"]) == 7 and len(results["continuations"]) == 8
    assert results["teacher"] == "teacher" and "ar.pt, in tokens" in results["judge"]
    for part in ("likelihood", "samples", "diversity", "frontier", "last_word", "continuations"):
        assert figures.HEADINGS[part][0] in shown
    assert shown.count("\nround1 ") == 1 + 4 + 4 + 2 + 1 + 2


def test_exact_samples_have_rows_of_their_own(made, tmp_path):
    """Of AR and of attention in the order of reveal, with calls and reads beside them, which are
    fewer with --max_calls; a token takes one read of AR's one by one, and n reads of full
    attention's n calls at most. No chance involved."""
    found = []
    for argv in ([], ["--max_calls", 1]):
        call(evaluate, made / "reveal.pt", made / "ar.pt", "--samples", 40, "--sequences", 4,
             "--steps", "exact", 2, *argv, "--json", tmp_path / "e.json")
        rows = json.loads((tmp_path / "e.json").read_text())["samples"]
        found.append({(row["model"], row["steps"]): row for row in rows})
    for name in ("reveal", "ar"):
        whole, stopped = (rows[name, "exact"] for rows in found)
        assert 1 < whole["calls"] <= whole["nfe"] <= 12 and whole["reads"] > 1
        assert stopped["calls"] == stopped["nfe"] == 1 and stopped["reads"] <= 1
    assert found[0]["ar", None]["calls"] == 12 and found[0]["ar", None]["reads"] == 1
    assert found[0]["reveal", 2]["calls"] == 2 and found[0]["reveal", 2]["reads"] < 2


def test_exact_samples_are_refused_where_they_cannot_be(made, capsys):
    """Full attention, --joint, --max_calls without exact: a sentence each."""
    exact = ["--steps", "exact"]
    assert "full attention" in refused(capsys, evaluate, made / "teacher.pt", *exact)
    assert "--joint" in refused(capsys, evaluate, made / "ar.pt", *exact, "--joint")
    assert "64 bits" in refused(capsys, evaluate, made / "ar.pt", *exact, "--precision", 32)
    assert "teacher.pt has full" in refused(capsys, evaluate, made / "ar.pt", made / "ar.pt",
                                            made / "teacher.pt", *exact)
    assert "--max_calls" in refused(capsys, evaluate, made / "reveal.pt", "--max_calls", 2)


def test_the_same_seed_gives_the_same_table(made, tmp_path):
    """All numbers but the seconds; another seed gives others. Exact."""
    found = []
    for seed in (0, 0, 1):
        call(evaluate, made / "round1.pt", *FEW, "--seed", seed, "--json", tmp_path / "e.json")
        found.append(json.loads((tmp_path / "e.json").read_text()))
        for row in found[-1]["samples"]:
            del row["seconds"], row["seed"]
        del found[-1]["argv"]
    assert found[0] == found[1] and found[0]["samples"] != found[2]["samples"]


def test_likelihood_of_all_models_is_under_the_same_noise(made):
    """Two copies of one model have the same estimates, down to the bit; AR's is exact and needs
    none: exp of the mean of model.nll. float64: 1e-9."""
    x = torch.randint(10, (40, 12), generator=torch.Generator().manual_seed(0))
    rows = [evaluate.likelihood_row("a", random_model(), x, CPU) for _ in range(2)]
    assert rows[0] == rows[1] and rows[0]["bound"] > 0
    ar = random_model("causal")
    row = evaluate.likelihood_row("ar", ar, x, CPU)
    truth = torch.cat([evaluate.likelihood.nll(ar, x[i:i + 1]) for i in range(40)]).mean()
    assert row["ppl"] == pytest.approx(math.exp(truth.item()), rel=1e-5)


def test_pieces_of_the_validation_data_are_rows_evenly_spread(made):
    """Rows where the dataset has rows; otherwise pieces that do not overlap. Exact."""
    data = dataset.load_data(str(made / "data"), CPU)
    rows = np.asarray(data.val).reshape(-1, 12)
    assert data.pieces(3, 12).tolist() == rows[[0, 19, 39]].tolist()
    assert data.pieces(100, 5).tolist() == rows[:, :5].tolist()
    data.stride = None
    assert data.pieces(100, 100).tolist() == [
        data.val[i:i + 100].tolist() for i in (0, 100, 200, 300)]


def test_likelihood_only_needs_no_judge_and_draws_nothing(made, tmp_path):
    """Exact."""
    save(tmp_path / "alone.pt", "mdlm", random_model(), made / "data")
    call(evaluate, tmp_path / "alone.pt", "--likelihood_only", "--json", tmp_path / "e.json")
    results = json.loads((tmp_path / "e.json").read_text())
    assert [row["model"] for row in results["likelihood"]] == ["alone"] and not results["samples"]


def test_a_text_file_can_be_the_dataset(made, tmp_path):
    """In the checkpoint's tokens: the likelihood is that of its ids; no training data, no share of
    8-grams. Exact."""
    text = tmp_path / "other.txt"
    text.write_text(" ".join(f"w{i % 7}" for i in range(60)))
    call(evaluate, made / "ar.pt", *FEW, "--dataset", text, "--json", tmp_path / "e.json")
    results = json.loads((tmp_path / "e.json").read_text())
    x = (torch.arange(60) % 7).view(5, 12)[[0, 1, 2, 4]]
    truth = evaluate.likelihood.exact(random_model("causal"), x).mean().item()
    assert results["likelihood"][0]["nll"] == pytest.approx(truth, rel=1e-5)
    assert results["samples"][0]["seen"] is None


def test_a_judge_of_other_tokens_reads_the_text_and_the_table_says_so(made, tmp_path, capsys):
    """Exact."""
    other = dict(kind="chars", items=list("w0123456789 "))
    save(tmp_path / "chars.pt", "ar", random_model("causal", 12, 64), "none", other)
    call(evaluate, made / "teacher.pt", *FEW, "--judge", tmp_path / "chars.pt", "--json",
         tmp_path / "e.json")
    assert "re-tokenised" in capsys.readouterr().out
    results = json.loads((tmp_path / "e.json").read_text())
    assert [row["model"] for row in results["likelihood"]] == ["teacher"]


def law_model(p):
    """The perfect model of a law, as draw_samples wants it."""
    model = toy.exact_model(p)
    model.config = type("C", (), dict(
        causal=False, attention="full", masks_alike=False, context=p.dim()))
    model.mask_id, model.run = p.shape[0], None
    return model


@pytest.mark.parametrize("how", [{}, {"joint": True}, {"precision": 32}])
def test_every_way_to_draw_has_the_models_law(how):
    """On a toy no probability is small enough for float32 to lose it: 12,000 texts of 3 positions
    against ancestral sampling's law by enumeration, chi-square over 0.001 (the chance of another
    seed to fail)."""
    torch.manual_seed(0)
    p = toy.joint(3, 3, 0)
    x = sample.draw_samples(law_model(p), 12_000, PublicSampling(2, **how), CPU)
    assert toy.chi_square(toy.count(x, 3), toy.ancestral_law(p, 2)) > 0.001


def test_temperature_sharpens_what_the_model_has_learned():
    """One position, temperature 1/2: probabilities are squared. Chi-square over 0.001."""
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for joint in (False, True):
        how = PublicSampling(1, temperature=0.5, joint=joint)
        x = sample.draw_samples(law_model(p), 4000, how, CPU)
        assert toy.chi_square(toy.count(x, 3), p ** 2 / (p ** 2).sum()) > 0.001


def test_the_joint_draw_loses_rare_tokens_where_noise_has_few_bits():
    """200 tokens of 0.1 % each beside one of 80 %, 64 steps, 1,280 positions: 256 rare ones are
    expected, with a spread of 14; in float16, whose noise of 11 bits ends at 7.6, a token with less
    than 0.05 % in a step is never drawn, and under 100 are left. (In float32 the same happens under
    6e-8: with 50,257 tokens and 1,024 steps.) Beyond that with another seed: one in 10^6."""
    p = torch.full((201,), 1e-3, dtype=torch.float64)
    p[0] = 0.8
    model = toy.Model(lambda z, at: p.log().expand(*at.shape, -1)[at])
    z = torch.full((32, 40), 201)
    rare = []
    for dtype in (torch.float64, torch.float16):
        torch.manual_seed(0)
        rare.append(int((sample_joint(model, z, 64, 201, dtype) > 0).sum()))
    assert abs(rare[0] - 256) < 70 and rare[1] < 100


def test_continuations_keep_the_prompt_and_are_judged_without_it(made):
    """The first tokens are the prompt's; the judge counts the rest only. Exact."""
    prompts = torch.arange(8).expand(5, 8)
    x = sample.draw_samples(random_model(), 5, Sampling(4), CPU, prompts)
    assert x.shape == (5, 12) and torch.equal(x[:, :8], prompts)
    ar = random_model("causal")
    assert torch.equal(sample.draw_samples(ar, 5, Sampling(), CPU, prompts)[:, :8], prompts)
    nats, tokens = evaluate.make_judge(ar)(x, 8)
    truth = evaluate.likelihood.nll(ar, x)[:, 8:].sum(1)
    assert tokens.tolist() == [4] * 5 and torch.allclose(nats, truth.double(), atol=1e-4)


def test_continuations_of_a_prompt_do_not_make_its_error_smaller(monkeypatch):
    """If a model writes the same four times, perplexity and error are those of one time. Exact."""
    x = torch.arange(60).view(5, 12)
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_, **how: x.repeat_interleave(4, 0))
    c = evaluate.EvaluateConfig([], continuations=4, prompt_tokens=8)

    def judge(y, skip, stop):
        return y[:, skip:].double().sum(1) / 99, torch.full((len(y),), 12 - skip)
    c.temperature, model = [1.0], random_model()
    data = dataset.Data(None, None, x, None, 12, True, None)         # without an oracle
    everything = evaluate.Evaluation(c, CPU, {}, evaluate.Judge(judge, None, ""), data, {})
    once, often = (evaluate.continuation_row(everything, "", m, Sampling(3), x, None)
                   for m in (None, model))
    for key in ("gen_ppl", "gen_ppl_se"):
        assert once[key] == pytest.approx(often[key], rel=1e-12)
    assert (once["texts"], often["texts"], once["prompts"]) == (5, 20, 5)


def test_continuations_are_valid_as_whole_texts_and_a_prompt_counts_once(monkeypatch):
    """Of two prompts one has three valid continuations of four, the other none: the mean is 3/8,
    and so is the error, that of two values, 3/4 and 0. Exact."""
    x = torch.zeros(2, 12, dtype=torch.long)
    y = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])[:, None].expand(8, 12)
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_, **how: y)
    monkeypatch.setattr(evaluate, "oracle", lambda y, data: (1.0 - y[:, 0], None))
    c = evaluate.EvaluateConfig([], continuations=4, prompt_tokens=8)
    c.temperature = [1.0]
    read = evaluate.make_judge(random_model("causal"))
    everything = evaluate.Evaluation(c, CPU, {}, evaluate.Judge(read, None, ""), None, {})
    row = evaluate.continuation_row(everything, "", random_model(), Sampling(3), x, None)
    assert row["valid"] == pytest.approx(3 / 8) and row["valid_se"] == pytest.approx(3 / 8)
    assert "valid" in figures.show({"continuations": [row]})


def test_until_end_a_continuation_counts_up_to_its_first_end():
    """Cost and number of tokens are those of the text cut there by hand, end included; ends in the
    prompt do not count, a text without one is whole; half of the texts have one. Exact but for
    rounding."""
    end, P = 9, 4
    x = torch.tensor([[1, 9, 2, 3, 4, 9, 5, 9], [1, 9, 2, 3, 4, 5, 6, 7],
                      [0, 1, 2, 3, 9, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 6]])
    stop = ends_of(x, P, end)
    assert stop.tolist() == [6, 8, 5, 8]
    ar = random_model("causal")
    whole = evaluate.likelihood.nll(ar, x)                                # (4, 8)
    nats, tokens = evaluate.make_judge(ar)(x, P, stop)
    for i in range(4):
        assert nats[i] == pytest.approx(whole[i, P:stop[i]].sum().item(), abs=1e-4)
    assert tokens.tolist() == [2, 4, 1, 4]

    c = evaluate.EvaluateConfig([], continuations=2, prompt_tokens=P, until_end=True)
    tokenizer = dataset.make_tokenizer(WORDS)
    tokenizer.end = end
    data = dataset.Data(None, None, x, tokenizer, 8, True, None)
    everything = evaluate.Evaluation(c, CPU, {}, evaluate.Judge(evaluate.make_judge(ar), None, ""),
                                     data, {})
    row = evaluate.continuation_row(everything, "", None, Sampling(), x, None)
    assert row["gen_ppl"] == pytest.approx((nats.sum() / 11).exp().item(), rel=1e-6)
    assert row["ended"] == 0.5 and "ended" in figures.show({"continuations": [row]})


@pytest.mark.parametrize("argv, words", [
    (["teacher.pt", "--until_end"], "--until_end is of continuations"),
    (["teacher.pt", "--until_end", "--continuations", 3], "has no end-of-text token"),
    (["teacher.pt", "--judge", "round1.pt"], "kind 'sdtt', but ar is needed"),
    (["teacher.pt", "--judge", "none.pt"], "none.pt: no such checkpoint"),
    (["teacher.pt", "--judge", "other.pt"], "other.pt cannot read these texts"),
    (["teacher.pt", "--dataset", "nowhere"], "--dataset nowhere: no such folder"),
    (["teacher.pt", "--length", 13], "--length 13 is beyond the context of 12"),
    (["teacher.pt", "--prompt_tokens", 12, "--continuations", 3], "--prompt_tokens 12 leaves"),
    (["teacher.pt", "--mauve", "gpt2.pt"], "give --continuations too"),
    (["teacher.pt", "--teacher", "other.pt"], "--teacher other.pt is not among the checkpoints"),
    (["reveal.pt", "--joint"], "--joint is not for models with attention reveal"),
    (["teacher.pt", "--dataset", "short.txt"], "5 tokens to validate with, fewer than three"),
    (["teacher.pt", "--last_word", "single.txt"], "--last_word single.txt has a single passage"),
    (["teacher.pt", "--dataset", "bad.txt"], "'what' is not in the vocabulary"),
    (["teacher.pt", "--lambada", "bad.txt"], "bad.txt, line 1: not a JSON object"),
    (["teacher.pt", "--lambada", "long.jsonl"], "passage 1 has 13 tokens, more than"),
    (["teacher.pt", "--last_word", "short.txt"], "no passage of 20 words"),
    (["teacher.pt", "--last_word", "missing.txt"], "missing.txt cannot be read"),
])
def test_bad_input_is_refused_in_one_sentence(made, capsys, monkeypatch, argv, words):
    """And before anything is written. Exact."""
    monkeypatch.chdir(made)
    (made / "short.txt").write_text("w1 w2 w3 w4 w5")
    (made / "bad.txt").write_text("what is this")
    save(made / "other.pt", "ar", random_model("causal", 2), "", WORDS | {"items": ["v", "w"]})
    (made / "single.txt").write_text("w1 " * 20)
    (made / "long.jsonl").write_text(json.dumps({"text": " ".join(["w1"] * 13)}))
    assert words in refused(capsys, evaluate, *argv, "--json", "e.json")
    assert not (made / "e.json").exists()


def test_mauve_needs_its_package_and_a_gpt2(made, capsys, monkeypatch):
    """Both are asked for before anything is sampled. Exact."""
    argv = [made / "teacher.pt", "--mauve", "gpt2.pt", "--continuations", 3]
    monkeypatch.setitem(sys.modules, "mauve", None)
    assert "this needs mauve-text (pip install mauve-text)" in refused(capsys, evaluate, *argv)
    monkeypatch.setitem(sys.modules, "mauve", type(sys)("mauve"))
    assert "gpt2.pt: no such checkpoint" in refused(capsys, evaluate, *argv)


def test_missing_judge_and_zero_samples_are_refused(made, tmp_path, capsys):
    """Without ar.pt beside the checkpoint --judge is asked for; fewer than 3 samples end in usage.
    Exact."""
    save(tmp_path / "alone.pt", "mdlm", random_model(), made / "data")
    assert "give an AR checkpoint as --judge" in refused(capsys, evaluate, tmp_path / "alone.pt")
    with pytest.raises(SystemExit) as stop:
        call(evaluate, made / "teacher.pt", "--samples", 0)
    assert stop.value.code == 2 and "--samples: 0 is not 3 or more" in capsys.readouterr().err


def test_models_of_different_tokens_are_refused(made, tmp_path, capsys):
    """Among each other, and with the dataset. Exact."""
    other = dict(kind="words", items=[f"x{i}" for i in range(10)])
    save(tmp_path / "other.pt", "mdlm", random_model(), made / "data", other)
    assert "know different tokens" in refused(capsys, evaluate, made / "teacher.pt",
                                              tmp_path / "other.pt")
    assert "knows other tokens than" in refused(capsys, evaluate, tmp_path / "other.pt", "--judge",
                                                made / "ar.pt")


# ---- what is measured is what was asked for

def test_checkpoints_of_one_name_have_a_row_each_and_the_teacher_is_a_file(made, tmp_path, capsys):
    """a/kld/round1.pt and b/kld/round1.pt; --teacher is found by its file, and one that is not
    among those given is refused although another has its name. Exact."""
    for folder in ("a", "b"):
        (tmp_path / folder / "kld").mkdir(parents=True)
    shutil.copy(made / "round1.pt", tmp_path / "a/kld/round1.pt")
    shutil.copy(made / "teacher.pt", tmp_path / "b/kld/round1.pt")
    paths = [tmp_path / folder / "kld/round1.pt" for folder in "ab"]
    argv = [*paths, "--judge", made / "ar.pt", *FEW, "--json", tmp_path / "e.json"]
    call(evaluate, *argv, "--teacher", tmp_path / "a/../b/kld/round1.pt")
    results = json.loads((tmp_path / "e.json").read_text())
    names = [row["model"] for row in results["samples"]]
    assert names == ["data", "a/kld/round1", "b/kld/round1"]
    assert results["teacher"] == "b/kld/round1"
    one, two = results["samples"][1:]
    assert one["gen_ppl"] != two["gen_ppl"]
    message = refused(capsys, evaluate, *argv, "--teacher", tmp_path / "nowhere/round1.pt")
    assert "nowhere/round1.pt" in message


def test_data_that_changed_under_its_name_are_not_measured_unless_asked_for(made, tmp_path,
                                                                           capsys):
    """The checkpoint says which tokens it was trained on. Exact."""
    data = tmp_path / "data"
    shutil.copytree(made / "data", data)
    content = torch.load(made / "teacher.pt", weights_only=True)
    mark = dataset.load_data(str(data), CPU).fingerprint
    for known, fine in ((mark, True), ("another", False)):
        content["config"]["dataset"], content["data"] = str(data), known
        torch.save(content, tmp_path / "teacher.pt")
        argv = [tmp_path / "teacher.pt", "--likelihood_only", "--sequences", 4]
        if fine:
            call(evaluate, *argv)
        else:
            assert "other text" in refused(capsys, evaluate, *argv)
            call(evaluate, *argv, "--dataset", data)


def test_pieces_of_texts_are_not_called_invalid(made, tmp_path, capsys):
    """With an oracle and a shorter --length validity is not measured, which is said; at full length
    it is. The words are not the oracle's, so all are faulty. Exact."""
    data = tmp_path / "data"
    shutil.copytree(made / "data", data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"oracle": "stories"}))
    whole, note = evaluate.with_oracle(dataset.load_data(str(data), CPU), 12)
    assert whole.oracle == "stories" and note is None
    pieces, note = evaluate.with_oracle(whole, 11)
    assert pieces.oracle is None and "12" in note and "11" in note
    call(evaluate, made / "teacher.pt", "--dataset", data, *FEW, "--length", 11, "--json",
         tmp_path / "e.json")
    rows = json.loads((tmp_path / "e.json").read_text())["samples"]
    assert all(row["valid"] is None for row in rows) and note in capsys.readouterr().out


def test_tasks_have_the_models_context_whatever_the_length_of_samples(made, tmp_path):
    """Passages of 12 words for models that read 12, with samples of 9. Exact."""
    lines = [json.dumps({"text": " ".join(f"w{(i + j) % 10}" for i in range(12))})
             for j in range(3)]
    (tmp_path / "l.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    call(evaluate, made / "teacher.pt", "--length", 9, "--lambada", tmp_path / "l.jsonl", *FEW,
         "--json", tmp_path / "e.json")
    rows = json.loads((tmp_path / "e.json").read_text())["lambada"]
    assert [(row["model"], row["tasks"]) for row in rows] == [("teacher", 3), ("judge", 3)]


def test_results_are_in_the_file_before_anything_is_shown(made, tmp_path, monkeypatch):
    """A table that cannot be shown is not lost. Exact."""
    def show(results):
        raise UserError("the terminal is gone")
    monkeypatch.setattr(figures, "show", show)
    with pytest.raises(SystemExit):
        call(evaluate, made / "teacher.pt", *FEW, "--json", tmp_path / "e.json")
    assert len(json.loads((tmp_path / "e.json").read_text())["samples"]) == 2


def test_picture_of_an_unknown_format_is_refused_before_anything_is_measured(made, capsys):
    """By the ending of its name. Exact."""
    message = refused(capsys, evaluate, made / "teacher.pt", *FEW, "--plot", "x.jpeg2")
    assert "--plot x.jpeg2" in message
