"""Published weights: read as published, written back, used by every script.

The files here are random weights in the published layouts, written by this file, and the logits
that they are compared with come from this file's own forward passes, which follow the papers and
use nothing of model.py. ../shared/fixtures is read too where it is. Differences of float32 rounding
were under 2e-6 here with 20 seeds; CLOSE leaves room.
"""
import errno
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bench
import distill
import sample
import train
from cache import Reading
from data import checkpoints, measures, processes
from data.dataset import write_data
from data.files import UserError
from helpers import call, refused
from model import ModelConfig, Transformer
from tools import convert, machine

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("small_nano")

CLOSE = 1e-4
ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures"
MDLM = dict(model_type="mdlm", vocab_size=31, model_length=24, hidden_dim=32, cond_dim=12,
            n_blocks=2, n_heads=4, dropout=0.1, time_conditioning=False)
SDTT = dict(model=dict(type="ddit-orig", hidden_size=32, cond_dim=12, length=24, n_blocks=2,
                       n_heads=4), time_conditioning=False)
GPT2 = dict(model_type="gpt2", n_layer=2, n_head=4, n_embd=32, n_positions=24, vocab_size=31,
            layer_norm_epsilon=1e-5, activation_function="gelu_new")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# ---- the published layouts, written and run independently

def mdlm_tensors(V=30, C=32, layers=2, heads=4, cond=12):
    """Random tensors of an MDLM in the published layout; adaLN is far from the identity."""
    shapes = {"vocab_embed.embedding": (V + 1, C), "output_layer.norm_final.weight": (C,),
              "output_layer.linear.weight": (V + 1, C), "output_layer.linear.bias": (V + 1,),
              "output_layer.adaLN_modulation.weight": (2 * C, cond),
              "output_layer.adaLN_modulation.bias": (2 * C,),
              "sigma_map.mlp.0.weight": (cond, 256), "sigma_map.mlp.0.bias": (cond,),
              "sigma_map.mlp.2.weight": (cond, cond), "sigma_map.mlp.2.bias": (cond,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in {
            "norm1.weight": (C,), "norm2.weight": (C,), "attn_qkv.weight": (3 * C, C),
            "attn_out.weight": (C, C), "mlp.0.weight": (4 * C, C), "mlp.0.bias": (4 * C,),
            "mlp.2.weight": (C, 4 * C), "mlp.2.bias": (C,),
            "adaLN_modulation.weight": (6 * C, cond), "adaLN_modulation.bias": (6 * C,)}.items()}
    tensors = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    D = C // heads
    tensors["rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, D, 2).float() / D)
    return tensors


def mdlm_logits(w, idx, heads=4):
    """The published network's forward pass at time 0, in float64: ids (B, L) -> (B, L, V + 1)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    C = w["vocab_embed.embedding"].shape[1]
    D, L = C // heads, idx.shape[1]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    c = torch.cat([torch.cos(0 * frequencies), torch.sin(0 * frequencies)])
    c = F.silu(w["sigma_map.mlp.0.weight"] @ c + w["sigma_map.mlp.0.bias"])
    c = F.silu(w["sigma_map.mlp.2.weight"] @ c + w["sigma_map.mlp.2.bias"])
    angle = torch.arange(L).double()[:, None] * w["rotary_emb.inv_freq"]         # (L, D/2)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(x):                          # (B, L, H, D): halves are real and imaginary parts
        a, b = x.chunk(2, -1)
        y = torch.complex(a, b) * turn[:, None]
        return torch.cat((y.real, y.imag), -1)

    def norm(x, weight, shift, scale):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * weight * (1 + scale) + shift
    x = w["vocab_embed.embedding"][idx]
    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        b = f"blocks.{i}."
        m = (w[b + "adaLN_modulation.weight"] @ c + w[b + "adaLN_modulation.bias"]).view(6, C)
        h = norm(x, w[b + "norm1.weight"], m[0], m[1]) @ w[b + "attn_qkv.weight"].T
        q, k, v = h.view(*idx.shape, 3, heads, D).unbind(2)
        score = torch.einsum("blhd,bmhd->bhlm", rotated(q), rotated(k)) / math.sqrt(D)
        h = torch.einsum("bhlm,bmhd->blhd", score.softmax(-1), v).flatten(2)
        x = x + m[2] * (h @ w[b + "attn_out.weight"].T)
        h = norm(x, w[b + "norm2.weight"], m[3], m[4])
        h = F.gelu(h @ w[b + "mlp.0.weight"].T + w[b + "mlp.0.bias"], approximate="tanh")
        x = x + m[5] * (h @ w[b + "mlp.2.weight"].T + w[b + "mlp.2.bias"])
    m = w["output_layer.adaLN_modulation.weight"] @ c + w["output_layer.adaLN_modulation.bias"]
    x = norm(x, w["output_layer.norm_final.weight"], *m.view(2, C))
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def gpt2_tensors(V=31, C=32, layers=2, P=24):
    shapes = {"wte.weight": (V, C), "wpe.weight": (P, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(layers):
        shapes |= {f"h.{i}.{name}": shape for name, shape in {
            "ln_1.weight": (C,), "ln_1.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
            "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
            "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
            "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}.items()}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def gpt2_logits(w, idx, heads=4):
    """GPT-2's forward pass, token by token of attention, in float64: ids (B, L) -> (B, L, V)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    B, L, C = *idx.shape, w["wte.weight"].shape[1]
    x = w["wte.weight"][idx] + w["wpe.weight"][:L]
    for i in range(sum(name.endswith("ln_1.bias") for name in w)):
        def linear(y, name, b=f"h.{i}."):
            return y @ w[b + name + ".weight"] + w[b + name + ".bias"]

        def norm(y, name, b=f"h.{i}."):
            return F.layer_norm(y, (C,), w[b + name + ".weight"], w[b + name + ".bias"])
        q, k, v = linear(norm(x, "ln_1"), "attn.c_attn").split(C, -1)
        q, k, v = (y.view(B, L, heads, -1) for y in (q, k, v))
        out = [torch.einsum("bhm,bmhd->bhd", (torch.einsum(
            "bhd,bmhd->bhm", q[:, j], k[:, :j + 1]) / math.sqrt(C // heads)).softmax(-1),
            v[:, :j + 1]) for j in range(L)]
        x = x + linear(torch.stack(out, 1).flatten(2), "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, "ln_2"), "mlp.c_fc"), approximate="tanh"),
                       "mlp.c_proj")
    return F.layer_norm(x, (C,), w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def publish(folder, config, tensors, prefix="", dtype=None, files=1):
    """Write a folder as it is published, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    named = {prefix + name: (tensor.to(dtype) if dtype else tensor).contiguous()
             for name, tensor in tensors.items()}
    if files == 1:
        safetensors.save_file(named, folder / "model.safetensors")
        return folder
    where = {}
    for i in range(files):
        part = dict(list(named.items())[i::files])
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        safetensors.save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture
def mdlm(tmp_path):
    return publish(tmp_path / "mdlm", MDLM, mdlm_tensors(), "backbone.")


@pytest.fixture
def gpt2(tmp_path):
    return publish(tmp_path / "gpt2", GPT2, gpt2_tensors())


# ---- the same logits

@pytest.mark.parametrize("config", [MDLM, SDTT], ids=["mdlm", "sdtt"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.backbone.", "backbone._orig_mod.",
                                    "_orig_mod.backbone."])
def test_mdlm_gives_the_published_logits(tmp_path, config, prefix):
    """With adaLN far from the identity, under all prefixes; V real tokens are left of V + 1. Exact
    up to rounding."""
    w, idx = mdlm_tensors(), torch.randint(31, (3, 24))
    model = convert.load_published(publish(tmp_path / "m", config, w, prefix))
    expected = mdlm_logits(w, idx)
    assert expected.std() > 0.5                          # nothing cancelled out
    assert (model(idx) - expected[..., :-1]).abs().max() < CLOSE
    assert not model.training and model.config.vocab == 30 == model.mask_id
    assert all(t.dtype == torch.float32 for t in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("files", [1, 3])
def test_half_precision_and_several_files(tmp_path, dtype, files):
    """The logits of the rounded weights, but of exact rotary frequencies. Exact up to rounding."""
    w, idx = mdlm_tensors(), torch.randint(31, (2, 24))
    model = convert.load_published(publish(tmp_path / "m", MDLM, w, "backbone.", dtype, files))
    rounded = {name: t.to(dtype).float() if "rotary" not in name else t for name, t in w.items()}
    assert (model(idx) - mdlm_logits(rounded, idx)[..., :-1]).abs().max() < CLOSE


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_gives_the_published_logits(tmp_path, prefix):
    """Also with the causal masks that older files carry, and its start symbol is its last token.
    Exact up to rounding."""
    w, idx = gpt2_tensors(), torch.randint(31, (3, 24))
    buffers = {f"h.{i}.attn.bias": torch.ones(24, 24).tril()[None, None] for i in range(2)}
    buffers |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    model = convert.load_published(publish(tmp_path / "g", GPT2, w | buffers, prefix))
    assert (model(idx) - gpt2_logits(w, idx)).abs().max() < CLOSE
    start = torch.full((1, 3), 31)
    assert torch.equal(model(start), model(start - 1))


def test_gpt2_agrees_with_transformers(tmp_path):
    """The package's own model from the same files. Exact up to rounding."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    theirs.save_pretrained(tmp_path)
    idx = torch.randint(31, (2, 24))
    with torch.no_grad():
        expected = theirs(idx).logits
    assert (convert.load_published(tmp_path)(idx) - expected).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["mdlm_tiny", "sdtt_tiny", "gpt2_tiny"])
def test_fixtures(name):
    """Logits as given there; of GPT-2 also 20 greedy tokens after 5, by the KV cache."""
    folder = FIXTURES / name
    if not folder.exists():
        pytest.skip("no ../shared/fixtures")
    expected = safetensors.load_file(folder / "expected.safetensors")
    model, idx = convert.load_published(folder), expected["input_ids"]
    with torch.no_grad():
        logits = model(idx)
    assert (logits - expected["logits"][..., :model.config.vocab]).abs().max() < CLOSE
    if "greedy" in expected:
        B, begin, out, cache = len(idx), 0, idx[:, :5], model.cache(len(idx), 25)
        while out.shape[1] < 25:                         # by the cache, without a start symbol
            n = out.shape[1] - begin
            slot = torch.arange(begin, out.shape[1]).expand(B, n)
            valid = torch.ones(B, n, dtype=torch.bool)
            with torch.no_grad():
                h = model.read(cache, Reading(out[:, begin:], slot, slot, slot, valid))
            best = model.head(h.view(B, n, -1)[:, -1]).argmax(-1, keepdim=True)
            begin, out = out.shape[1], torch.cat((out, best), 1)
        assert torch.equal(out, expected["greedy"])


# ---- the way back

def ours(tmp_path, words=tuple(f"w{i}" for i in range(10)), **options):
    """A checkpoint of this project with random weights, of the shape that train.py makes."""
    config = ModelConfig(**dict(vocab=10, context=12, layers=2, heads=2, width=16) | options)
    config.attention_bias = not config.masks_alike
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    path = tmp_path / "ours.pt"
    checkpoints.save_checkpoint(
        path, kind="mdlm", model_config=vars(model.config), model=model.state_dict(),
        ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0, config={},
        tokenizer=dict(kind="words", items=list(words)))
    return path, model.eval()


@pytest.mark.parametrize("positions", ["rope", "both"])
def test_export_and_import_give_the_same_model(tmp_path, capsys, positions):
    """Weights bit for bit, and the tokenizer; what MDLM's code has no place for is said. Exact."""
    path, model = ours(tmp_path, positions=positions)
    call(convert, path, "--export", tmp_path / "out")
    said = "no place for" in capsys.readouterr().out
    assert said == (positions == "both")
    call(convert, tmp_path / "out", "--out", tmp_path / "again.pt")
    again, content = checkpoints.load_model(tmp_path / "again.pt")
    assert again.config == model.config and content["tokenizer"]["items"][3] == "w3"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_published_network_gives_our_logits_on_an_export(tmp_path):
    """A bidirectional model with rotary positions is MDLM's architecture, and no tensor is more or
    less than in a published file. Exact up to rounding."""
    path, model = ours(tmp_path)
    assert convert.export(path, tmp_path / "out") == []
    w = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    w = {name.removeprefix("backbone."): tensor for name, tensor in w.items()}
    assert w.keys() == mdlm_tensors().keys()
    idx = torch.randint(11, (3, 12))
    assert (mdlm_logits(w, idx, heads=2)[..., :-1] - model(idx)).abs().max() < CLOSE


def test_attention_learns_no_biases_where_mdlm_has_none(tmp_path, monkeypatch):
    """Trained and distilled with rotary positions; all other weights moved. No chance involved."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "d", [i * i % 7 for i in range(400)], [1, 2, 3] * 40,
               tokenizer=dict(kind="words", items=[f"w{i}" for i in range(7)]))
    for objective in ("mdlm", "ar"):
        call(train, "--objective", objective, "--dataset", "d", "--steps", 2, "--context", 8)
    call(distill, "--dataset", "d", "--rounds", 1, "--teacher_steps", 4, "--steps_per_round", 2,
         "--samples", 2, "--batch", 2, "--context", 8)
    for name in ("teacher", "round1"):
        state = checkpoints.load_checkpoint(tmp_path / "out" / "d-nano" / f"{name}.pt")["model"]
        for key, tensor in state.items():
            bias = "qkv.bias" in key or "attn_out.bias" in key
            assert bias != bool(tensor.any()), key
    assert convert.export(tmp_path / "out/d-nano/round1.pt", tmp_path / "e") == []


# ---- every script takes them

def test_scripts_run_on_converted_checkpoints(tmp_path, monkeypatch, capsys, mdlm):
    """sample, distill with a judge of the same tokens (the run that data/README.md names for an hour
    on a GPU), bench, and AR text: vocabulary, context and heads are those of the files. No chance
    involved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "limits", lambda *_: dict(     # measuring them takes a while
        device="CPU", threads=2, torch="2", dtype="float32", load=0, bytes_per_s=1, flop_per_s=1))
    gpt2 = publish(tmp_path / "gpt2", GPT2 | {"vocab_size": 30}, gpt2_tensors(V=30))
    for folder in (mdlm, gpt2):
        call(convert, folder)
    assert checkpoints.load_checkpoint("out/mdlm.pt")["kind"] == "mdlm"
    call(sample, "out/mdlm.pt", "--steps", 3, "--prompt", "5 7", "--num_samples", 2)
    call(sample, "out/gpt2.pt", "--num_samples", 1)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert all(len(line.split()) == 24 for line in lines)
    assert all(line.startswith("5 7 ") for line in lines[:2])
    write_data(tmp_path / "d", [i * i % 30 for i in range(400)], list(range(30)) * 3,
               tokenizer=dict(kind="words", items=[str(i) for i in range(30)]))
    # the run of an hour, as its page has it, in small: later flags win
    page = (ROOT / "data/README.md").read_text().replace("\\\n", "")
    of_an_hour = re.search(r"\npython distill.py (.*--out out/hour)\n", page)[1].split()
    call(distill, *of_an_hour, "--dataset", "d", "--rounds", 1, "--teacher_steps", 4,
         "--steps_per_round", 2, "--samples", 2, "--batch", 4, "--micro_batch", 2,
         "--teacher", "out/mdlm.pt", "--judge", "out/gpt2.pt")
    results = json.loads(Path("out/hour/results.json").read_text())
    assert results["judged"] == "tokens"
    assert {row["model"] for row in results["rows"]} == {"data", "ar", "teacher", "round 1"}
    call(bench, "--checkpoint", "out/gpt2.pt", "out/mdlm.pt", "--batch", 1, "--steps", 2,
         "--samples", 2, "--repeats", 1, "--no-compile", "--json", "rows.json")
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [(r["model"], r["length"]) for r in rows] == [("gpt2", 24), ("mdlm", 24), ("mdlm", 24)]
    assert all(r["gen_ppl"] > 1 for r in rows[:2])
    call(bench, "--checkpoint", "out/mdlm.pt", "--batch", 1, "--steps", 2, "--repeats", 1,
         "--no-compile")
    assert "no model here" in refused(capsys, bench, "--checkpoint", "out/mdlm.pt",
                                           "--engine", "ar")


def test_a_judge_with_other_tokens_reads_text(tmp_path, monkeypatch, capsys):
    """Characters of the words: the judge's own perplexity of the decoded texts, token-weighted, by
    hand. No row of the judge's own texts. Exact up to rounding."""
    monkeypatch.chdir(tmp_path)
    words = ["a", "bb", "ccc", "d", "ee", "f", "ggg", "h", "i", "j"]
    write_data(tmp_path / "d", [i * i % 10 for i in range(400)], [1, 2, 3] * 40,
               tokenizer=dict(kind="words", items=words))
    teacher, _ = ours(tmp_path, words)
    model = Transformer(ModelConfig(11, 12, 1, 2, 16, attention="causal")).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    spec = dict(kind="chars", items=list("abcdefghij "))
    checkpoints.save_checkpoint(
        Path("judge.pt"), kind="ar", model_config=vars(model.config), model=model.state_dict(),
        ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0, config={},
        tokenizer=spec)
    call(distill, "--dataset", "d", "--rounds", 1, "--teacher_steps", 4, "--steps_per_round", 1,
         "--samples", 3, "--batch", 2, "--teacher", teacher, "--judge", "judge.pt")
    results = json.loads(Path("out/d-nano/results.json").read_text())
    assert "own tokens" in results["judged"] and "own tokens" in capsys.readouterr().out
    assert {row["model"] for row in results["rows"]} == {"data", "teacher", "round 1"}
    tokenizer = distill.load_data("d", processes.Processes(torch.device("cpu"))).tokenizer
    x = torch.randint(10, (5, 8))
    nats, tokens = 0.0, 0
    for row in x.tolist():
        ids = [spec["items"].index(c) for c in tokenizer.decode(row)][:12]
        log_p = model(torch.tensor([[11] + ids[:-1]])).log_softmax(-1)[0]
        nats -= log_p[range(len(ids)), ids].sum().item()
        tokens += len(ids)
    judge = measures.make_judge(model, spec, tokenizer)
    assert abs(measures.gen_ppl(judge, x)[0] / math.exp(nats / tokens) - 1) < 1e-5


def test_revisions_of_sdtt_say_how_many_steps_they_are_for(tmp_path, monkeypatch):
    """10,000 optimizer steps a round, from 1,024 sampling steps down. Exact."""
    hub = pytest.importorskip("huggingface_hub")
    folder = publish(tmp_path / "m", SDTT, mdlm_tensors(), "backbone.")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, revision, **_: (
        asked.append((name, revision)), folder)[1])
    for revision, kind, steps in (("baselines_kld_step_70000", "sdtt", 8),
                                  ("scaling_400k_sm_step_10000", "sdtt", 512),
                                  ("teacher_400k_md_step_400000", "mdlm", None)):
        convert.convert(f"owner/sdtt@{revision}", tmp_path / "c.pt")
        content = checkpoints.load_checkpoint(tmp_path / "c.pt")
        assert (content["kind"], content["sampling_steps"]) == (kind, steps)
        assert asked[-1] == ("owner/sdtt", revision)


def test_full_size_has_the_published_number_of_parameters(tmp_path):
    """A file of zeros of mdlm-owt's shapes, 169,627,218 parameters as published (rotary frequencies
    are none); what adaLN, the mask's output and its time took is folded away. Exact."""
    with torch.device("meta"):
        w = mdlm_tensors(50257, 768, 12, 12, 128)
    del w["rotary_emb.inv_freq"]
    assert sum(t.numel() for t in w.values()) == 169_627_218
    w = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in w.items()}
    config = MDLM | dict(vocab_size=50258, model_length=1024, hidden_dim=768, cond_dim=128,
                         n_blocks=12, n_heads=12)
    model = convert.load_published(publish(tmp_path / "m", config, w, "backbone."))
    folded = 12 * 6 * 768 * 129 + 2 * 768 * 129 + 128 * (257 + 129) + 769
    added = 12 * 2 * 768 + 768                   # biases of norms
    assert sum(p.numel() for p in model.parameters()) == 169_627_218 - folded + added


# ---- what is refused

def changed(folder, config=None, **tensors):
    """The folder's files with other values in config.json, and tensors changed, or removed."""
    path = folder / "model.safetensors"
    w = safetensors.load_file(path) | tensors
    safetensors.save_file({k: v for k, v in w.items() if v is not None}, path)
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items()
                                                    if v is not None}))


@pytest.mark.parametrize("change, words", [
    ({"backbone.blocks.1.norm1.weight": None}, ["no tensor blocks.1.norm1.weight"]),
    ({"backbone.blocks.2.norm1.weight": torch.ones(32)}, ["blocks.2.norm1.weight", "no part"]),
    ({"backbone.blocks.0.mlp.0.bias": torch.ones(9)}, ["blocks.0.mlp.0.bias", "[9]", "[128]"]),
    ({"backbone.rotary_emb.inv_freq": torch.ones(4)}, ["rotary_emb.inv_freq", "constant"]),
    ({"blocks.0.mlp.0.bias": torch.ones(128)}, ["second tensor blocks.0.mlp.0.bias"]),
    ({"config": {"hidden_dim": 64}}, ["vocab_embed.embedding", "config.json"]),
    ({"config": {"vocab_size": 77}}, ["vocab_embed.embedding", "[77, 32]"]),
    ({"config": {"n_blocks": None}}, ["n_blocks"]),
    ({"config": {"n_blocks": "two"}}, ["no model"]),
    ({"config": {"model_type": "llama"}}, ["'llama'", "gpt2, mdlm"]),
    ({"config": {"model_type": None}}, ["'unknown'"]),
    ({"config": {"time_conditioning": True}}, ["conditioned on time"]),
])
def test_a_folder_that_does_not_fit_is_refused_by_name(mdlm, capsys, tmp_path, change, words):
    """One sentence, and no checkpoint. No chance involved."""
    changed(mdlm, **change)
    message = refused(capsys, convert, mdlm, "--out", tmp_path / "c.pt")
    assert all(word in message for word in words), message
    assert not (tmp_path / "c.pt").exists()


def test_gpt2_of_another_kind_is_refused(gpt2, capsys, tmp_path):
    """Another activation, and a mask that is not causal. No chance involved."""
    changed(gpt2, **{"h.0.attn.bias": torch.ones(1, 1, 24, 24)})
    assert "h.0.attn.bias" in refused(capsys, convert, gpt2, "--out", tmp_path / "c.pt")
    changed(gpt2, {"activation_function": "relu"})
    assert "relu" in refused(capsys, convert, gpt2, "--out", tmp_path / "c.pt")


def test_files_that_cannot_be_read_are_refused(mdlm, capsys, tmp_path):
    """Truncated, missing, pickled, no JSON, a pickle by name. No chance involved."""
    file, out = mdlm / "model.safetensors", tmp_path / "c.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refused(capsys, convert, mdlm, "--out", out)
    file.unlink()
    assert "no model.safetensors" in refused(capsys, convert, mdlm, "--out", out)
    (mdlm / "pytorch_model.bin").write_bytes(b"x")
    message = refused(capsys, convert, mdlm, "--out", out)
    assert "pytorch_model.bin" in message and "safetensors.torch.save_file" in message
    for name in ("pytorch_model.bin", "last.ckpt"):
        assert "pickle" in refused(capsys, convert, mdlm / name, "--out", out)
    file.write_bytes(whole)
    (mdlm / "config.json").write_text("{")
    assert "not a JSON object" in refused(capsys, convert, mdlm, "--out", out)
    (mdlm / "config.json").unlink()
    assert "no config.json" in refused(capsys, convert, mdlm, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("error, words", [
    ("RepositoryNotFoundError", "no such repository"),
    ("RevisionNotFoundError", "no revision 'v1'"),
    ("HFValidationError", "neither a folder nor an id"), ("ConnectionError", "cannot be reached")])
def test_what_the_hub_does_not_give_is_refused(monkeypatch, capsys, tmp_path, error, words):
    """By the name of its error. No chance involved."""
    hub = pytest.importorskip("huggingface_hub")

    def download(*args, **kwargs):
        raise type(error, (Exception,), {})("many\nlines")
    monkeypatch.setattr(hub, "snapshot_download", download)
    message = refused(capsys, convert, "owner/name@v1", "--out", tmp_path / "c.pt")
    assert words in message and "owner/name@v1" in message and not os.listdir(tmp_path)


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path, mdlm):
    """Each with its remedy; a folder does not need the hub's. No chance involved."""
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(capsys, convert, "owner/name")
    call(convert, mdlm, "--out", tmp_path / "c.pt")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused(capsys, convert, mdlm)


def test_only_masked_diffusion_of_ours_can_be_exported(capsys, tmp_path, gpt2, mdlm):
    """An AR model, a folder. No chance involved."""
    call(convert, gpt2, "--out", tmp_path / "ar.pt")
    assert "kind 'ar'" in refused(capsys, convert, tmp_path / "ar.pt", "--export", tmp_path / "e")
    assert "folder of published weights" in refused(capsys, convert, mdlm, "--export", tmp_path / "e")
    assert not (tmp_path / "e").exists()


# ---- what the tokens are, and the start symbol

needs_gpt2 = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                                reason="GPT-2's tokenizer needs TIKTOKEN_CACHE_DIR")


def test_tokens_are_gpt2s_by_their_number_where_nothing_else_is_known(tmp_path):
    """50,257 of them, or padded up to 50,304: said in a note; others are numbers. Exact."""
    for V in (50257, 50258, 50304):
        spec, note = convert.tokenizer_of(tmp_path, {}, V)
        assert spec == {"kind": "gpt2"} and "taken for GPT-2's" in note
    for V in (3, 50305):
        spec, note = convert.tokenizer_of(tmp_path, {}, V)
        assert spec == {"kind": "words", "items": [str(i) for i in range(V)]} and "numbers" in note
    kept = {"nanosdtt": {"tokenizer": {"kind": "chars", "items": ["a"]}}}
    assert convert.tokenizer_of(tmp_path, kept, 50257) == (kept["nanosdtt"]["tokenizer"], None)


@needs_gpt2
@pytest.mark.parametrize("name", convert.VOCABULARIES)
def test_a_vocabulary_in_the_folder_decides_whether_tokens_are_gpt2s(tmp_path, name):
    """GPT-2's own; the same with special tokens after it; one with two words exchanged, which is
    another language's for all one knows. Exact."""
    known = convert.gpt2_vocabulary()
    assert known["\u0120the"] == 262 and known["<|endoftext|>"] == 50256 and len(known) == 50257

    def spec(vocabulary, V):
        content = vocabulary
        if name == "tokenizer.json":
            special = {t: i for t, i in vocabulary.items() if i >= 50256}
            content = {"model": {"vocab": {t: i for t, i in vocabulary.items() if i < 50256}},
                       "added_tokens": [{"content": t, "id": i} for t, i in special.items()]}
        (tmp_path / name).write_text(json.dumps(content))
        return convert.tokenizer_of(tmp_path, {}, V)
    assert spec(known, 50257) == ({"kind": "gpt2"}, None)
    assert spec(known | {"<pad>": 50257}, 50258) == ({"kind": "gpt2"}, None)
    other = known | {"\u0120the": known["\u0120a"], "\u0120a": known["\u0120the"]}
    assert spec(other, 50257)[0]["kind"] == "words"


@pytest.mark.parametrize("V", [50258, 50304])
def test_rows_beyond_gpt2s_tokens_are_left_out_and_it_is_said(tmp_path, capsys, V):
    """The law is the published one given that the token is one of GPT-2's. float32: 1e-4."""
    config = GPT2 | dict(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=V)
    folder = publish(tmp_path / "m", config, gpt2_tensors(V, 4, 1, 8))
    call(convert, folder, "--out", tmp_path / "c.pt")
    assert f"last {V - 50257} of its {V:,} rows" in capsys.readouterr().out
    model, content = checkpoints.load_model(tmp_path / "c.pt")
    assert model.config.vocab == 50257 and content["tokenizer"] == {"kind": "gpt2"}
    whole, x = convert.load_published(folder), torch.tensor([[5, 50256, 7]])
    expected = whole(x)[..., :50257].log_softmax(-1)
    assert (model(x).log_softmax(-1) - expected).abs().max() < CLOSE
    assert torch.equal(model.embed.weight[50257], whole.embed.weight[V])


@pytest.mark.parametrize("start, row", [(0, 0), (7, 7), (None, 30), (50256, 30)])
def test_start_symbol_is_the_token_that_the_config_says(tmp_path, start, row):
    """bos_token_id; without one, or where there is no such token, the last. Exact."""
    config = GPT2 | ({} if start is None else {"bos_token_id": start})
    model = convert.load_published(publish(tmp_path / "m", config, gpt2_tensors()))
    assert torch.equal(model.embed.weight[model.mask_id], model.embed.weight[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [MDLM, SDTT])
def test_half_precision_weights_are_read(tmp_path, config, dtype):
    """inv_freq, a constant, is rounded in them too; another constant is still refused. The logits
    are those of the rounded weights. float32: 1e-4."""
    tensors = {name: t.to(dtype) for name, t in mdlm_tensors().items()}
    model = convert.load_published(publish(tmp_path / "m", config, tensors, "backbone."))
    full = {name: t.float() for name, t in tensors.items()} | {
        "rotary_emb.inv_freq": mdlm_tensors()["rotary_emb.inv_freq"]}
    exact = convert.load_published(publish(tmp_path / "f", config, full, "backbone."))
    x = torch.randint(31, (2, 24))
    assert (model(x) - exact(x)).abs().max() < CLOSE
    tensors["rotary_emb.inv_freq"] = (1.02 * tensors["rotary_emb.inv_freq"].float()).to(dtype)
    with pytest.raises(UserError, match="constant"):
        convert.load_published(publish(tmp_path / "b", config, tensors, "backbone."))


# ---- what the hub says

class Answer:
    def __init__(self, status):
        self.status_code = status


@pytest.mark.parametrize("classes, status, number, said", [
    (("GatedRepoError", "RepositoryNotFoundError"), 403, None, "grant access"),
    (("HfHubHTTPError",), 401, None, "does not accept your token"),
    (("LocalEntryNotFoundError", "HfHubHTTPError"), 429, None, "asked too often"),
    (("HfHubHTTPError",), 503, None, "status 503"),
    (("OSError",), None, errno.ENOSPC, "no room in its cache"),
    (("OSError",), None, errno.EROFS, "cannot be written; set HF_HOME"),
    (("LocalEntryNotFoundError", "ConnectError"), None, errno.ECONNREFUSED, "cannot be reached")])
def test_each_trouble_with_the_hub_has_its_own_sentence(monkeypatch, capsys, tmp_path, classes,
                                                       status, number, said):
    """Errors by the names that huggingface_hub 0.3x to 2.4 gives them, each caused by the next, the
    last with the server's status or the system's number. No chance involved."""
    hub = pytest.importorskip("huggingface_hub")

    def download(*args, **kwargs):
        error = None
        for name in reversed(classes):
            cause, error = error, type(name, (OSError,), {})("many\nlines")
            error.__cause__ = cause
            if cause is None:
                error.response, error.errno = Answer(status), number
        raise error
    monkeypatch.setattr(hub, "snapshot_download", download)
    message = refused(capsys, convert, "owner/name", "--out", tmp_path / "c.pt")
    assert said in message and "owner/name" in message and not os.listdir(tmp_path)
