"""Published weights into this project's checkpoints, and back: MDLM, SDTT and GPT-2.

    python -m tools.convert kuleshov-group/mdlm-owt --out out/mdlm-owt.pt
    python -m tools.convert jdeschena/sdtt@baselines_kld_step_70000 --out out/sdtt.pt
    python -m tools.convert gpt2-large --out out/gpt2-large.pt
    python -m tools.convert out/stories-nano/round7.pt --export folder

SOURCE is a folder with config.json and model.safetensors (or several, with their index), or the id
of one on the Hugging Face hub, with @revision where it is not main. Needs safetensors, and
huggingface_hub for what is not on the disk yet.
"""
import errno
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from common import command, flag, load_checkpoint, package, parse_flags, save_checkpoint
from data.dataset import make_tokenizer
from data.files import UserError, reason, write
from model import ModelConfig, Transformer

VOCABULARIES = "vocab.json", "tokenizer.json"        # which tokens a model knows, where it is said
GPT2_TOKENS, PADDED = 50257, 50304                   # GPT-2's, and the next multiple of 64
PICKLES = (".bin", ".ckpt", ".pth", ".pkl")
COND, FREQUENCIES = 128, 256     # MDLM's conditioning: its width in an export, and its sinusoids
MDLM = (("embed.weight", "vocab_embed.embedding"), ("norm.", "output_layer.norm_final."),
        ("lm_head.", "output_layer.linear."), ("qkv.", "attn_qkv."), ("mlp_in.", "mlp.0."),
        ("mlp_out.", "mlp.2."))              # our names and theirs
GPT2 = (("blocks.", "h."), ("embed_pos.", "wpe."), ("embed.", "wte."), ("norm.", "ln_f."),
        ("norm1.", "ln_1."), ("norm2.", "ln_2."), ("qkv.", "attn.c_attn."),
        ("attn_out.", "attn.c_proj."), ("mlp_in.", "mlp.c_fc."), ("mlp_out.", "mlp.c_proj."))


@dataclass
class ConvertConfig:
    source: str                              # the argument without --
    out: str | None = flag(None, "checkpoint to write [out/NAME.pt]")
    export: str | None = flag(None, "folder to write: SOURCE, a checkpoint of train.py or "
                              "distill.py, in MDLM's published layout")


def rename(name, table):
    """Our name of a tensor -> theirs."""
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


# ---- files

def fetch(source):
    """A folder, or an id on the hub with an optional @revision, downloaded -> the folder."""
    path = Path(source)
    if path.suffix in PICKLES or path.suffix == ".pt":
        raise UserError(f"{source} is a pickle or a checkpoint of ours (for which see --export); "
                        "SOURCE is a folder that holds config.json and model.safetensors")
    if path.is_dir():
        return path
    hub = package("huggingface_hub")
    name, _, revision = source.partition("@")
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=[
            "config.json", "model*.safetensors", "model.safetensors.index.json", *VOCABULARIES]))
    except Exception as e:           # the hub's own errors, and those of several network packages
        raise UserError(f"{source} cannot be fetched: {hub_trouble(e, name, revision)}")


def hub_trouble(error, name, revision):
    """What an error of the hub's package means, in words with a remedy. The cause is often another
    error in its chain."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    classes = {one.__name__ for e in chain for one in type(e).__mro__}
    status = [getattr(getattr(e, "response", None), "status_code", None) for e in chain]
    numbers = {getattr(e, "errno", None) for e in chain}
    cache = "its cache (the folder in HF_HOME)"
    if "HFValidationError" in classes:
        return "it is neither a folder nor an id on the hub, OWNER/NAME"
    if "RevisionNotFoundError" in classes:
        return f"the hub's {name} has no revision {revision!r}"
    if "GatedRepoError" in classes or 403 in status:
        return ("its owners grant access one by one; ask for it on its page of the hub, then log in "
                "(hf auth login, or HF_TOKEN)")
    if "RepositoryNotFoundError" in classes:
        return "the hub has no such repository that you may read"
    if 401 in status:
        return "the hub does not accept your token; log in anew (hf auth login), or unset HF_TOKEN"
    if 429 in status:
        return "the hub was asked too often; wait some minutes, or log in (hf auth login)"
    if any(one and one >= 500 for one in status):
        return f"the hub itself has a fault (status {max(filter(None, status))}); try again later"
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return f"there is no room in {cache}; make some, or set HF_HOME to another"
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"{cache} cannot be written; set HF_HOME to one that can"
    return (f"the hub cannot be reached ({type(chain[0]).__name__}); connect, or name a folder "
            "that holds config.json and model.safetensors")


def read_json(path):
    """The JSON object in a file, as a dict. Raises UserError."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; copy it there from where the weights "
                        "came from")
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); make it readable")
    except ValueError:                                   # also of text that is not UTF-8
        pass
    raise UserError(f"{path} is not a JSON object; get it again")


def read_tensors(folder):
    """{name: tensor} of a folder's safetensors files, names without their wrappers' prefixes."""
    load_file = package("safetensors.torch").load_file
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    tensors = {}
    for path in [folder / name for name in names]:
        pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
        if not path.exists() and pickles:
            raise UserError(f"{folder} has {pickles[0]} but no {path.name}: pickles may run code "
                            "when read and are not; make a copy with safetensors.torch.save_file("
                            "torch.load(FILE, weights_only=True), 'model.safetensors')")
        if not path.exists():
            raise UserError(f"{folder} has no {path.name}; get the whole folder again")
        try:
            loaded = load_file(path)
        except OSError as e:
            raise UserError(f"{path} cannot be read ({reason(e)}); make it readable")
        except Exception as e:       # SafetensorError
            raise UserError(f"{path} is not a whole safetensors file ({type(e).__name__}); get it "
                            "again")
        for name, tensor in loaded.items():
            name = re.sub(r"^((backbone|transformer|module)\.)*", "",
                          name.replace("_orig_mod.", ""))
            if name in tensors:
                raise UserError(f"{path} has a second tensor {name} under another prefix; keep one "
                                "of the two")
            tensors[name] = tensor
    return tensors


# ---- the published layouts -> ours

def load_published(folder):
    """The model of a folder with config.json and model.safetensors: a Transformer in float32 and
    eval mode, whose model(idx (B, L)) gives the published model's logits (B, L, V) of the V real
    tokens (MDLM's has a V + 1st, for the mask, which it sets to minus infinity).

    Every tensor of the file is used, or known to be a constant and checked. Raises UserError for
    another family, and for a tensor that is missing, unknown or of another shape than config.json
    says."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    config |= config["model"] if isinstance(config.get("model"), dict) else {}       # SDTT's
    kind = config.get("model_type") or config.get("type") or "unknown"
    read = {"gpt2": from_gpt2, "mdlm": from_mdlm, "ddit": from_mdlm}.get(kind.partition("-")[0])
    if read is None:
        raise UserError(f"{folder}/config.json is of a model of type {kind!r}; known are gpt2, "
                        "mdlm and SDTT's ddit")
    tensors = read_tensors(folder)

    def take(name, shape, default=None):
        """The tensor of that name, in float32; None in the shape is any length."""
        if name not in tensors and default is None:
            raise UserError(f"{folder} has no tensor {name}; get model.safetensors again")
        tensor = tensors.pop(name, default)
        if len(tensor.shape) != len(shape) or any(
                n not in (None, m) for m, n in zip(tensor.shape, shape)):
            raise UserError(f"{folder}: tensor {name} has shape {list(tensor.shape)}, but by "
                            f"config.json it is {list(shape)}; they do not belong together")
        return tensor.float()
    try:
        model = read(config, take)
    except KeyError as e:
        raise UserError(f"{folder}/config.json says nothing of {e.args[0]!r}; get it again")
    except (ValueError, TypeError) as e:
        raise UserError(f"{folder} holds no model that is known here ({e})")
    if tensors:
        raise UserError(f"{folder}: tensor {min(tensors)} belongs to no part of such a model")
    return model.eval()


def check(take, name, constant):
    """A tensor that may be there, but is a constant of the architecture, perhaps rounded to the
    type that the file has its tensors in."""
    tensor = take(name, constant.shape, constant)
    rounded = [constant.to(t).float() for t in (torch.float32, torch.bfloat16, torch.float16)]
    if not any(torch.allclose(tensor, one, rtol=1e-3) for one in rounded):
        raise ValueError(f"{name} is not the usual constant")


def inv_freq(size):
    """Rotary frequencies of a ModelConfig, (D/2,)."""
    D = size.width // size.heads
    return 10000.0 ** (-torch.arange(0, D, 2) / D)


def from_mdlm(config, take):
    """MDLM's diffusion transformer (arXiv 2406.07524; SDTT's is the same) as ours.
    The published models are conditioned on a time of zero (time_conditioning false): the shifts,
    scales and gates of adaLN are constants and fold into norms and output projections, exactly:
    norm(x) w (1 + scale) + shift, and gate (W y + b)."""
    if config["time_conditioning"]:
        raise ValueError("it is conditioned on time, which cannot be folded away")
    C, cond = config.get("hidden_dim") or config["hidden_size"], config["cond_dim"]
    embed = take("vocab_embed.embedding", (config.get("vocab_size"), C))
    positions = config.get("nanosdtt", {}).get("positions", "rope")
    size = ModelConfig(len(embed) - 1, config.get("model_length") or config["length"],
                       config["n_blocks"], config["n_heads"], C, positions=positions,
                       attention_bias=positions != "rope")           # published ones have none
    model = Transformer(size)
    check(take, "rotary_emb.inv_freq", inv_freq(size))
    c = torch.cat((torch.ones(FREQUENCIES // 2), torch.zeros(FREQUENCIES // 2)))     # cos 0, sin 0
    for layer, n in ((0, FREQUENCIES), (2, cond)):
        name = f"sigma_map.mlp.{layer}"
        c = F.silu(take(f"{name}.weight", (cond, n)) @ c + take(f"{name}.bias", (cond,)))
    state = {"embed.weight": embed}
    for name, ours in model.state_dict().items():
        rows, *rest = ours.shape
        if name.startswith("lm_head"):                   # the last row is the mask's
            state[name] = take(rename(name, MDLM), (rows + 1, *rest))[:-1]
        elif not (name in state or "norm" in name and "bias" in name):
            none = torch.zeros(rows) if re.search("(qkv|attn_out).bias", name) else None
            state[name] = take(rename(name, MDLM), ours.shape, none)
    for part in [f"blocks.{i}" for i in range(size.layers)] + ["output_layer"]:
        n, name = (2 if part == "output_layer" else 6), f"{part}.adaLN_modulation"
        vectors = take(f"{name}.weight", (n * C, cond)) @ c + take(f"{name}.bias", (n * C,))
        vectors = vectors.chunk(n)                       # shift, scale, gate, shift, scale, gate
        norms = ["norm"] if n == 2 else [f"{part}.norm1", f"{part}.norm2"]
        for norm, shift, scale in zip(norms, vectors[::3], vectors[1::3]):
            state[f"{norm}.weight"] *= 1 + scale
            state[f"{norm}.bias"] = shift
        for linear, gate in zip(("attn_out", "mlp_out"), vectors[2::3]):
            for kind, factor in (("weight", gate[:, None]), ("bias", gate)):
                if f"{part}.{linear}.{kind}" in state:
                    state[f"{part}.{linear}.{kind}"] *= factor
    model.load_state_dict(state)
    return model


def from_gpt2(config, take):
    """GPT-2 as the transformers package keeps it, as ours. Its linear layers are transposed, its
    head is the embedding; our start symbol is the token that config.json calls bos_token_id,
    GPT-2's <|endoftext|> (without one, or with one that is no token, the last)."""
    C, context = config["n_embd"], config["n_positions"]
    for key, usual in dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=4 * C,
                           scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False).items():
        if config.get(key) not in (None, usual):
            raise ValueError(f"{key} is {config[key]!r}, not {usual!r}")
    size = ModelConfig(config["vocab_size"], context, config["n_layer"], config["n_head"], C,
                       attention="causal", positions="learned")
    model = Transformer(size)
    embed = take("wte.weight", (size.vocab, C))
    start = config.get("bos_token_id")
    if not isinstance(start, int) or not 0 <= start < size.vocab:
        start = size.vocab - 1
    state = {"embed.weight": torch.cat((embed, embed[start:start + 1])),
             "lm_head.weight": take("lm_head.weight", embed.shape, embed),
             "lm_head.bias": torch.zeros(size.vocab)}
    for name, ours in model.state_dict().items():
        if name not in state:
            flip = name.startswith("blocks") and ours.ndim == 2
            tensor = take(rename(name, GPT2), ours.shape[::-1] if flip else ours.shape)
            state[name] = tensor.T if flip else tensor
    for i in range(size.layers):                         # buffers in older files: the causal mask
        check(take, f"h.{i}.attn.bias", torch.ones(1, 1, context, context).tril())
        check(take, f"h.{i}.attn.masked_bias", torch.tensor(-1e4))
    model.load_state_dict(state)
    return model


# ---- our checkpoints -> the published layout

def export(path, folder):
    """Write a masked diffusion checkpoint of ours as MDLM publishes it: config.json and
    model.safetensors in `folder`, with constants for adaLN, which uses no time. Returns the names
    of tensors that MDLM's own code has no place for, because its attention has no biases and its
    positions are rotary alone: none for a model of train.py --positions rope."""
    content = load_checkpoint(path, kinds=("mdlm", "sdtt"))
    size, state = ModelConfig(**content["model_config"]), content["ema"]
    if size.attention != "full":
        raise UserError(f"{path} has attention {size.attention!r}, for which MDLM's code has no "
                        "place; export a model with full attention")
    C, out, extra = size.width, {"rotary_emb.inv_freq": inv_freq(size)}, []
    for layer, n in ((0, FREQUENCIES), (2, COND)):
        out[f"sigma_map.mlp.{layer}.weight"] = torch.zeros(COND, n)
        out[f"sigma_map.mlp.{layer}.bias"] = torch.zeros(COND)
    for name, tensor in state.items():
        attention = re.search("(qkv|attn_out).bias", name)
        if attention and not tensor.any() or "norm" in name and "bias" in name:
            continue
        if name.startswith("lm_head"):                   # a last row for the mask, never used
            tensor = torch.cat((tensor, torch.zeros_like(tensor[:1])))
        out[rename(name, MDLM)] = tensor
        if attention or name.startswith("embed_pos"):
            extra.append(rename(name, MDLM))
    zero, one = torch.zeros(C), torch.ones(C)
    for part in [f"blocks.{i}" for i in range(size.layers)] + ["output_layer"]:
        vectors = ([state["norm.bias"], zero] if part == "output_layer" else
                   [v for n in "12" for v in (state[f"{part}.norm{n}.bias"], zero, one)])
        out[f"{part}.adaLN_modulation.weight"] = torch.zeros(len(vectors) * C, COND)
        out[f"{part}.adaLN_modulation.bias"] = torch.cat(vectors)
    config = dict(model_type="mdlm", vocab_size=size.vocab + 1, model_length=size.context,
                  hidden_dim=C, cond_dim=COND, n_blocks=size.layers, n_heads=size.heads,
                  dropout=0.1, time_conditioning=False, torch_dtype="float32",
                  nanosdtt={"positions": size.positions, "tokenizer": content["tokenizer"]})
    data = package("safetensors.torch").save(
        {f"backbone.{name}": tensor.contiguous() for name, tensor in out.items()}, {"format": "pt"})
    write(folder / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))
    write(folder / "model.safetensors", lambda f: f.write(data))
    return extra


def byte_signs():
    """How GPT-2's vocabulary files write each of the 256 bytes: as the character of that number if
    it is a visible one, else as one of the characters from number 256 on, in their order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def gpt2_vocabulary():
    """GPT-2's tokens as its vocab.json has them, {spelling: id}."""
    import tiktoken
    make_tokenizer({"kind": "gpt2"})                     # says what to do where it is missing
    bpe = tiktoken.get_encoding("gpt2")
    signs = byte_signs()
    return {"".join(signs[b] for b in bpe.decode_single_token_bytes(i)): i
            for i in range(GPT2_TOKENS)}


def vocabulary_of(folder):
    """What vocab.json or tokenizer.json in a folder say, {spelling: id}; None without them."""
    for name in VOCABULARIES:
        if (folder / name).exists():
            content = read_json(folder / name)
            if name == "tokenizer.json":                 # special tokens stand beside the others
                extra = {one["content"]: one["id"] for one in content.get("added_tokens", [])}
                content = content.get("model", {}).get("vocab", {}) | extra
            return content
    return None


def tokenizer_of(folder, config, V):
    """The tokenizer's spec of a published model of V tokens, and a note for the user, or None. What
    an export kept; GPT-2's where the folder's vocabulary is GPT-2's, or, where the folder has
    none, V is its size or that padded; else numbers."""
    kept = config.get("nanosdtt", {}).get("tokenizer")
    if kept:
        return kept, None
    numbers = {"kind": "words", "items": [str(i) for i in range(V)]}
    vocabulary = vocabulary_of(folder)
    if vocabulary is None and GPT2_TOKENS <= V <= PADDED:
        return {"kind": "gpt2"}, ("the folder does not say which tokens it knows; by their number "
                                  "they are taken for GPT-2's")
    if vocabulary is not None and V >= GPT2_TOKENS:
        if all(vocabulary.get(token) == i for token, i in gpt2_vocabulary().items()):
            return {"kind": "gpt2"}, None
    return numbers, ("its tokens are not GPT-2's and cannot be read here: texts are the numbers of "
                     "tokens")


def drop_padding(model, V):
    """The model without the tokens from V on, which no text has: its law is then that of the first
    V, given that it is one of them."""
    state = model.state_dict()
    old = model.config.vocab
    state["embed.weight"] = torch.cat((state["embed.weight"][:V], state["embed.weight"][old:]))
    for name in ("lm_head.weight", "lm_head.bias"):
        state[name] = state[name][:V]
    smaller = Transformer(replace(model.config, vocab=V))
    smaller.load_state_dict(state)
    return smaller.eval()


def convert(source, out):
    """A published model as a checkpoint of ours, `out`. Returns the model, and notes for the user.
    """
    folder = fetch(source)
    model = load_published(folder)
    spec, note = tokenizer_of(folder, read_json(folder / "config.json"), model.config.vocab)
    notes = [note] if note else []
    extra = model.config.vocab - GPT2_TOKENS
    if spec["kind"] == "gpt2" and extra > 0:
        model = drop_padding(model, GPT2_TOKENS)
        notes.append(f"the last {extra} of its {GPT2_TOKENS + extra:,} rows, which are no tokens of "
                     "GPT-2's, are left out: its predictions are those given the others")
    trained = re.search(r"@(?:baselines|scaling)_\w+_step_(\d+)0000$", source)       # SDTT's rounds
    save_checkpoint(out, kind="ar" if model.config.causal else "sdtt" if trained else "mdlm",
                    model_config=asdict(model.config), model=model.state_dict(),
                    ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0,
                    config={"source": source}, tokenizer=spec,
                    sampling_steps=trained and 1024 >> int(trained[1]))
    return model, notes


def main():
    c = parse_flags(ConvertConfig, __doc__, source="a folder, an id on the hub, or a checkpoint")
    if c.export:
        extra = export(c.source, Path(c.export))
        print(f"{c.export}: model.safetensors and config.json in MDLM's layout")
        if extra:
            print(f"MDLM's own code has no place for {len(extra)} of the tensors, such as "
                  f"{extra[0]}; tools.convert reads them")
        return
    out = Path(c.out or f"out/{re.split('[/@]', c.source.rstrip('/'))[-1]}.pt")
    model, notes = convert(c.source, out)
    size = model.config
    print(f"{out}: {'autoregressive' if size.causal else 'masked diffusion'}, {size.layers} "
          f"layers, width {size.width}, {size.vocab:,} tokens, context {size.context:,}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    command(main)
