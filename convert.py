"""Published weights into this project's checkpoints, and back: MDLM, SDTT and GPT-2.

    python convert.py kuleshov-group/mdlm-owt --out out/mdlm-owt.pt
    python convert.py jdeschena/sdtt@baselines_kld_step_70000 --out out/sdtt.pt
    python convert.py gpt2-large --out out/gpt2-large.pt
    python convert.py out/stories-nano/round7.pt --export folder

SOURCE is a folder with config.json and model.safetensors (or several, with their index), or the id
of one on the Hugging Face hub, with @revision where it is not main. Needs safetensors, and
huggingface_hub for what is not on the disk yet.
"""
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (UserError, command, flag, load_checkpoint, package, parse_flags,
                    save_checkpoint, write)
from model import ModelConfig, Transformer

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
            "config.json", "model*.safetensors", "model.safetensors.index.json"]))
    except Exception as e:           # the hub's own errors, and those of several network packages
        why = {"HFValidationError": "it is neither a folder nor an id on the hub, OWNER/NAME",
               "RepositoryNotFoundError": "the hub has no such repository that you may read",
               "RevisionNotFoundError": f"the hub's {name} has no revision {revision!r}"}
        raise UserError(f"{source} cannot be had: " + why.get(
            type(e).__name__, f"the hub cannot be reached ({type(e).__name__}); connect, or name "
            "a folder that holds config.json and model.safetensors"))


def read_json(path):
    """The JSON object in a file, as a dict. Raises UserError."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; copy it there from where the weights "
                        "came from")
    except (OSError, ValueError):
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
        except Exception as e:       # SafetensorError, OSError
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
    """A tensor that may be there, but is a constant of the architecture."""
    if not torch.allclose(take(name, constant.shape, constant), constant, rtol=1e-3):
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
    size = ModelConfig(len(embed) - 1, config.get("model_length") or config["length"],
                       config["n_blocks"], config["n_heads"], C,
                       positions=config.get("nanosdtt", {}).get("positions", "rope"))
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
            state[f"{part}.{linear}.weight"] *= gate[:, None]
            state[f"{part}.{linear}.bias"] *= gate
    model.load_state_dict(state)
    return model


def from_gpt2(config, take):
    """GPT-2 as the transformers package keeps it, as ours. Its linear layers are transposed, its
    head is the embedding; our start symbol is its <|endoftext|>, the last token."""
    C, context = config["n_embd"], config["n_positions"]
    for key, usual in dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=4 * C,
                           scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False).items():
        if config.get(key) not in (None, usual):
            raise ValueError(f"{key} is {config[key]!r}, not {usual!r}")
    size = ModelConfig(config["vocab_size"], context, config["n_layer"], config["n_head"], C,
                       attention="causal", positions="learned")
    model = Transformer(size)
    embed = take("wte.weight", (size.vocab, C))
    state = {"embed.weight": torch.cat((embed, embed[-1:])),
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


def tokenizer_of(config, V):
    """The tokenizer's spec: what an export kept, GPT-2's, or numbers where V is another."""
    return config.get("nanosdtt", {}).get("tokenizer") or (
        {"kind": "gpt2"} if V == 50257 else {"kind": "words", "items": [str(i) for i in range(V)]})


def convert(source, out):
    """A published model as a checkpoint of ours, `out`. Returns the model."""
    folder = fetch(source)
    model = load_published(folder)
    spec = tokenizer_of(read_json(folder / "config.json"), model.config.vocab)
    trained = re.search(r"@(?:baselines|scaling)_\w+_step_(\d+)0000$", source)       # SDTT's rounds
    save_checkpoint(out, kind="ar" if model.config.causal else "sdtt" if trained else "mdlm",
                    model_config=asdict(model.config), model=model.state_dict(),
                    ema=model.state_dict(), optimizer=[], step=0, steps=0, seconds=0.0,
                    config={"source": source}, tokenizer=spec,
                    sampling_steps=trained and 1024 >> int(trained[1]))
    return model


def main():
    c = parse_flags(ConvertConfig, __doc__, source="a folder, an id on the hub, or a checkpoint")
    if c.export:
        extra = export(c.source, Path(c.export))
        print(f"{c.export}: model.safetensors and config.json in MDLM's layout")
        if extra:
            print(f"MDLM's own code has no place for {len(extra)} of the tensors, such as "
                  f"{extra[0]}; convert.py reads them")
        return
    out = Path(c.out or f"out/{re.split('[/@]', c.source.rstrip('/'))[-1]}.pt")
    model = convert(c.source, out)
    size = model.config
    print(f"{out}: {'autoregressive' if size.causal else 'masked diffusion'}, {size.layers} "
          f"layers, width {size.width}, {size.vocab:,} tokens, context {size.context:,}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    command(main)
