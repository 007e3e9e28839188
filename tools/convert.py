"""Published weights into this project's checkpoints, and back: MDLM, SDTT and GPT-2.

    python -m tools.convert kuleshov-group/mdlm-owt --out out/mdlm-owt.pt
    python -m tools.convert jdeschena/sdtt@baselines_kld_step_70000 --out out/sdtt.pt
    python -m tools.convert gpt2-large --out out/gpt2-large.pt
    python -m tools.convert out/stories-nano/round7.pt --export folder

SOURCE is a folder with config.json and model.safetensors (or several, with their index), or
the id of one on the Hugging Face hub, with @revision where it is not main. Needs
safetensors, and huggingface_hub for what is not on the disk yet.
"""
import errno
import functools
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data.checkpoints import load_checkpoint, save_checkpoint
from data.dataset import make_tokenizer
from data.files import UserError, reason, write
from data.script import command, flag, package, parse_flags
from model import ModelConfig, Transformer

# files that say which tokens a model knows
VOCABULARIES = "vocab.json", "tokenizer.json"
GPT2_TOKENS = 50257              # GPT-2's tokens
PADDED = 50304                   # and the next multiple of 64, to which some pad them
PICKLES = (".bin", ".ckpt", ".pth", ".pkl")      # endings of pickles, which are not read
COND = 128                       # the width of MDLM's conditioning in an export
FREQUENCIES = 256                # the sinusoids it is made from; half of them are cosines

# parts of our names of tensors, and of theirs
MDLM = (("embed.weight", "vocab_embed.embedding"),
        ("norm.", "output_layer.norm_final."),
        ("lm_head.", "output_layer.linear."),
        ("qkv.", "attn_qkv."),
        ("mlp_in.", "mlp.0."),
        ("mlp_out.", "mlp.2."))
GPT2 = (("blocks.", "h."),
        ("embed_pos.", "wpe."),
        ("embed.", "wte."),
        ("norm.", "ln_f."),
        ("norm1.", "ln_1."),
        ("norm2.", "ln_2."),
        ("qkv.", "attn.c_attn."),
        ("attn_out.", "attn.c_proj."),
        ("mlp_in.", "mlp.c_fc."),
        ("mlp_out.", "mlp.c_proj."))


@dataclass
class ConvertConfig:
    """The flags of tools.convert."""
    source: str                              # the argument without --
    out: str | None = flag(None, "checkpoint to write [out/NAME.pt]")
    export: str | None = flag(
        None, "folder to write: SOURCE, a checkpoint of train.py or distill.py, in MDLM's "
        "published layout")


# ---- names of tensors

def rename(name, table):
    """Our name of a tensor -> theirs, by a table such as MDLM."""
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def attention_bias(name):
    """Whether our tensor of that name is a bias in attention, of which MDLM has none."""
    return "qkv.bias" in name or "attn_out.bias" in name


def norm_bias(name):
    """Whether our tensor of that name is the bias of a norm, which MDLM's adaLN gives."""
    return "norm" in name and "bias" in name


# ---- files

def fetch(source):
    """A folder, or an id on the hub with an optional @revision -> the folder, downloaded if
    need be. Raises UserError where there is none."""
    path = Path(source)
    if path.suffix in PICKLES or path.suffix == ".pt":
        raise UserError(f"{source} is a pickle or a checkpoint of ours (for which see "
                        "--export); SOURCE is a folder that holds config.json and "
                        "model.safetensors")
    if path.is_dir():
        return path

    # what is no folder is an id on the hub: only the files that are read here
    hub = package("huggingface_hub")
    name, _, revision = source.partition("@")
    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json",
                *VOCABULARIES]
    try:
        folder = hub.snapshot_download(name, revision=revision or None,
                                       allow_patterns=patterns)
        return Path(folder)
    except Exception as e:               # the hub's, and those of network packages
        raise UserError(f"{source} cannot be fetched: {hub_trouble(e, name, revision)}")


def with_causes(error):
    """The list of an error and all that led to it, one after the other."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def hub_trouble(error, name, revision):
    """What an error of the hub's package means, in words with a remedy. The cause is often
    another error, which led to this one. name, revision: what was asked for."""
    chain = with_causes(error)
    # the names of its classes, since their places change between the package's versions
    classes = set()
    for one in chain:
        classes.update(kind.__name__ for kind in type(one).__mro__)
    # the server's answers, such as 404
    answers = [getattr(one, "response", None) for one in chain]
    statuses = [getattr(answer, "status_code", None) for answer in answers]
    statuses = [status for status in statuses if status]
    # the system's numbers, such as that of a full disk
    numbers = {getattr(one, "errno", None) for one in chain}

    # what was asked for is not there, or not for everybody
    if "HFValidationError" in classes:
        return "it is neither a folder nor an id on the hub, OWNER/NAME"
    if "RevisionNotFoundError" in classes:
        return f"the hub's {name} has no revision {revision!r}"
    if "GatedRepoError" in classes or 403 in statuses:
        return ("its owners grant access one by one; ask for it on its page of the hub, "
                "then log in (hf auth login, or HF_TOKEN)")
    if "RepositoryNotFoundError" in classes:
        return "the hub has no such repository that you may read"

    # the hub did not answer as it should, or there is no place for what it sent
    trouble = server_trouble(statuses) or disk_trouble(numbers)
    if trouble:
        return trouble
    return (f"the hub cannot be reached ({type(chain[0]).__name__}); connect, or name a "
            "folder that holds config.json and model.safetensors")


def server_trouble(statuses):
    """What the statuses of the hub's answers mean, in words; None for no known one."""
    if 401 in statuses:
        return ("the hub does not accept your token; log in anew (hf auth login), or unset "
                "HF_TOKEN")
    if 429 in statuses:
        return "the hub was asked too often; wait some minutes, or log in (hf auth login)"
    if any(status >= 500 for status in statuses):
        return f"the hub itself has a fault (status {max(statuses)}); try again later"
    return None


def disk_trouble(numbers):
    """What the system's error numbers mean, in words; None for no known one."""
    cache = "its cache (the folder in HF_HOME)"
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return f"there is no room in {cache}; make some, or set HF_HOME to another"
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"{cache} cannot be written; set HF_HOME to one that can"
    return None


def read_json(path):
    """The JSON object in a file, as a dict. Raises UserError."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; copy it there from where the "
                        "weights came from")
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}); make it readable")
    except ValueError:                   # also of text that is not UTF-8
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; get it again")
    return content


def read_tensors(folder):
    """{name: tensor} of a folder's safetensors files, names without their wrappers'
    prefixes. Raises UserError where a file is missing or broken."""
    load_file = package("safetensors.torch").load_file
    # an index names the files, if there are several
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))

    tensors = {}
    for path in [folder / name for name in names]:
        stop_if_missing(folder, path)
        try:
            loaded = load_file(path)
        except OSError as e:
            raise UserError(f"{path} cannot be read ({reason(e)}); make it readable")
        except Exception as e:           # SafetensorError
            raise UserError(f"{path} is not a whole safetensors file ({type(e).__name__}); "
                            "get it again")
        for name, tensor in loaded.items():
            # the prefixes come from torch.compile and from the classes around the model
            name = name.replace("_orig_mod.", "")
            name = re.sub(r"^((backbone|transformer|module)\.)*", "", name)
            if name in tensors:
                raise UserError(f"{path} has a second tensor {name} under another prefix; "
                                "keep one of the two")
            tensors[name] = tensor
    return tensors


def stop_if_missing(folder, path):
    """Raise UserError if a folder's file of tensors is not there."""
    pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
    if path.exists():
        return
    if pickles:
        raise UserError(f"{folder} has {pickles[0]} but no {path.name}: pickles may run "
                        "code when read and are not; make a copy with "
                        "safetensors.torch.save_file(torch.load(FILE, "
                        "weights_only=True), 'model.safetensors')")
    raise UserError(f"{folder} has no {path.name}; get the whole folder again")


# ---- the published layouts -> ours

def load_published(folder):
    """The model of a folder with config.json and model.safetensors: a Transformer in
    float32 and eval mode, whose model(idx (B, L)) gives the published model's logits
    (B, L, V) of the V real tokens (MDLM's has a V + 1st, for the mask, which it sets to
    minus infinity).

    Every tensor of the file is used, or known to be a constant and checked. Raises
    UserError for another family, and for a tensor that is missing, unknown or of another
    shape than config.json says."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if isinstance(config.get("model"), dict):            # SDTT's sizes are one level down
        config |= config["model"]

    # the family, which may have an ending: SDTT's is "ddit-orig"
    kind = config.get("model_type") or config.get("type") or "unknown"
    families = {"gpt2": from_gpt2, "mdlm": from_mdlm, "ddit": from_mdlm}
    read = families.get(kind.partition("-")[0])
    if read is None:
        raise UserError(f"{folder}/config.json is of a model of type {kind!r}; known are "
                        "gpt2, mdlm and SDTT's ddit")

    # each tensor is taken out once, so what is left at the end is unknown
    tensors = read_tensors(folder)
    take = functools.partial(take_tensor, folder, tensors)
    try:
        model = read(config, take)
    except KeyError as e:
        raise UserError(f"{folder}/config.json says nothing of {e.args[0]!r}; get it again")
    except (ValueError, TypeError) as e:
        raise UserError(f"{folder} holds no model that is known here ({e})")
    if tensors:
        raise UserError(f"{folder}: tensor {min(tensors)} belongs to no part of such a "
                        "model")
    return model.eval()


def take_tensor(folder, tensors, name, shape, default=None):
    """The tensor of that name, in float32, which is no longer in `tensors` then; without it
    the default. None in the shape is any length. Raises UserError for a tensor that is
    missing or of another shape. from_mdlm and from_gpt2 know it as take(name, shape)."""
    if name not in tensors and default is None:
        raise UserError(f"{folder} has no tensor {name}; get model.safetensors again")
    tensor = tensors.pop(name, default)
    # compare length by length
    fits = len(tensor.shape) == len(shape)
    for there, wanted in zip(tensor.shape, shape):
        if wanted is not None and wanted != there:
            fits = False
    if not fits:
        raise UserError(f"{folder}: tensor {name} has shape {list(tensor.shape)}, but by "
                        f"config.json it is {list(shape)}; they do not belong together")
    return tensor.float()


def check(take, name, constant):
    """A tensor that may be there, but is a constant of the architecture, perhaps rounded to
    the type that the file has its tensors in. Raises ValueError if it is another."""
    tensor = take(name, constant.shape, constant)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = constant.to(dtype).float()
        if torch.allclose(tensor, rounded, rtol=1e-3):
            return
    raise ValueError(f"{name} is not the usual constant")


def inv_freq(size):
    """Rotary frequencies of a ModelConfig, (D/2,), in radians per position."""
    D = size.width // size.heads
    return 10000.0 ** (-torch.arange(0, D, 2) / D)


# ---- MDLM's and SDTT's

def from_mdlm(config, take):
    """MDLM's diffusion transformer (arXiv 2406.07524; SDTT's is the same) as ours.
    The published models are conditioned on a time of zero (time_conditioning false): the
    shifts, scales and gates of adaLN are constants and fold into norms and output
    projections, exactly: norm(x) w (1 + scale) + shift, and gate (W y + b).
    Raises ValueError for a model that is conditioned on time."""
    if config["time_conditioning"]:
        raise ValueError("it is conditioned on time, which cannot be folded away")

    # the sizes; positions other than rotary ones are only in exports of ours
    C = config.get("hidden_dim") or config["hidden_size"]
    cond = config["cond_dim"]
    embed = take("vocab_embed.embedding", (config.get("vocab_size"), C))     # (V + 1, C)
    positions = config.get("nanosdtt", {}).get("positions", "rope")
    context = config.get("model_length") or config["length"]
    size = ModelConfig(len(embed) - 1, context, config["n_blocks"], config["n_heads"], C,
                       positions=positions, attention_bias=positions != "rope")
    model = Transformer(size)
    check(take, "rotary_emb.inv_freq", inv_freq(size))

    # the tensors as they are, then what adaLN does to them
    vector = time_vector(take, cond)                                 # (cond,)
    state = mdlm_state(model, take, embed)
    for i in range(size.layers):
        fold_block(state, f"blocks.{i}", modulation(take, f"blocks.{i}", (6, C), vector))
    shift, scale = modulation(take, "output_layer", (2, C), vector)
    fold_norm(state, "norm", shift, scale)
    model.load_state_dict(state)
    return model


def time_vector(take, cond):
    """What MDLM makes of a time of zero, (cond,): its adaLN reads nothing else."""
    # all cosines of zero are 1, all sines 0
    half = FREQUENCIES // 2
    vector = torch.cat((torch.ones(half), torch.zeros(half)))        # (FREQUENCIES,)
    # two layers, with SiLU after the second too, as adaLN applies it to what it reads
    for layer, n in ((0, FREQUENCIES), (2, cond)):
        weight = take(f"sigma_map.mlp.{layer}.weight", (cond, n))
        bias = take(f"sigma_map.mlp.{layer}.bias", (cond,))
        vector = F.silu(weight @ vector + bias)                      # (cond,)
    return vector


def mdlm_state(model, take, embed):
    """{our name: tensor} of an MDLM, before adaLN is folded in: all of our tensors but the
    norms' biases. embed: its embedding, (V + 1, C)."""
    state = {"embed.weight": embed}
    for name, ours in model.state_dict().items():
        # adaLN's shifts are the norms' biases, see fold_norm
        if name in state or norm_bias(name):
            continue
        rows, *rest = ours.shape
        theirs = rename(name, MDLM)
        if name.startswith("lm_head"):
            # their last row is the mask's, which is never predicted
            state[name] = take(theirs, (rows + 1, *rest))[:-1]       # (V, ...)
        elif attention_bias(name):
            # an export leaves out those that are zero
            state[name] = take(theirs, ours.shape, torch.zeros(rows))
        else:
            state[name] = take(theirs, ours.shape)
    return state


def modulation(take, part, shape, vector):
    """The constants of adaLN in a part of the network, a tuple of n tensors (C,); shape:
    (n, C). Of a block: shift, scale and gate of attention, then those of the MLP. Of the
    output layer: shift and scale. vector: see time_vector."""
    n, C = shape
    name = f"{part}.adaLN_modulation"
    weight = take(f"{name}.weight", (n * C, len(vector)))
    bias = take(f"{name}.bias", (n * C,))
    return (weight @ vector + bias).chunk(n)


def fold_block(state, block, constants):
    """Fold the six constants of adaLN into the tensors of a block, in `state`."""
    shift1, scale1, gate1, shift2, scale2, gate2 = constants
    fold_norm(state, f"{block}.norm1", shift1, scale1)
    fold_gate(state, f"{block}.attn_out", gate1)
    fold_norm(state, f"{block}.norm2", shift2, scale2)
    fold_gate(state, f"{block}.mlp_out", gate2)


def fold_norm(state, norm, shift, scale):
    """norm(x) w (1 + scale) + shift, as weight and bias of our norm; all (C,)."""
    state[f"{norm}.weight"] *= 1 + scale
    state[f"{norm}.bias"] = shift


def fold_gate(state, linear, gate):
    """gate (W y + b), as weight and bias of our projection; gate (C,)."""
    state[f"{linear}.weight"] *= gate[:, None]                       # (C, n)
    if f"{linear}.bias" in state:                                    # attention has none
        state[f"{linear}.bias"] *= gate


# ---- GPT-2's

def from_gpt2(config, take):
    """GPT-2 as the transformers package keeps it, as ours. Its linear layers are
    transposed, its head is the embedding. Our start symbol is the token that config.json
    calls bos_token_id, GPT-2's <|endoftext|>; without one, or with one that is no token,
    the last. Raises ValueError for another activation, or another kind of attention."""
    C = config["n_embd"]
    context = config["n_positions"]
    # what our blocks do; what the config does not say is as usual
    known = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
             "n_inner": 4 * C, "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False}
    for key, usual in known.items():
        if config.get(key) not in (None, usual):
            raise ValueError(f"{key} is {config[key]!r}, not {usual!r}")
    size = ModelConfig(config["vocab_size"], context, config["n_layer"], config["n_head"],
                       C, attention="causal", positions="learned")
    model = Transformer(size)

    # the embedding, with the start symbol's row after the tokens', and the head
    embed = take("wte.weight", (size.vocab, C))                      # (V, C)
    start = config.get("bos_token_id")
    if not isinstance(start, int) or not 0 <= start < size.vocab:
        start = size.vocab - 1
    state = {"embed.weight": torch.cat((embed, embed[start:start + 1])),     # (V + 1, C)
             "lm_head.weight": take("lm_head.weight", embed.shape, embed),
             "lm_head.bias": torch.zeros(size.vocab)}

    # the other tensors; the matrices in blocks are those of linear layers
    for name, ours in model.state_dict().items():
        if name in state:
            continue
        theirs = rename(name, GPT2)
        if name.startswith("blocks") and ours.ndim == 2:
            state[name] = take(theirs, ours.shape[::-1]).T
        else:
            state[name] = take(theirs, ours.shape)

    # older files hold the causal mask too, and what it puts in place of a score
    for i in range(size.layers):
        check(take, f"h.{i}.attn.bias", torch.ones(1, 1, context, context).tril())
        check(take, f"h.{i}.attn.masked_bias", torch.tensor(-1e4))
    model.load_state_dict(state)
    return model


# ---- our checkpoints -> the published layout

def export(path, folder):
    """Write a masked diffusion checkpoint of ours as MDLM publishes it: config.json and
    model.safetensors in `folder`, with constants for adaLN, which uses no time. Returns the
    names of tensors that MDLM's own code has no place for, because its attention has no
    biases and its positions are rotary alone: none for a model of train.py --positions
    rope. Raises UserError for another kind of model."""
    content = load_checkpoint(path, kinds=("mdlm", "sdtt"))
    size = ModelConfig(**content["model_config"])
    if size.attention != "full":
        raise UserError(f"{path} has attention {size.attention!r}, for which MDLM's code "
                        "has no place; export a model with full attention")

    # the tensors, under the name that MDLM's own code gives the network
    out, extra = published_tensors(size, content["ema"])
    named = {f"backbone.{name}": tensor.contiguous() for name, tensor in out.items()}
    # the sizes; "nanosdtt" is for ourselves, when we read it again
    config = dict(model_type="mdlm", vocab_size=size.vocab + 1, model_length=size.context,
                  hidden_dim=size.width, cond_dim=COND, n_blocks=size.layers,
                  n_heads=size.heads, dropout=0.1, time_conditioning=False,
                  torch_dtype="float32",
                  nanosdtt={"positions": size.positions, "tokenizer": content["tokenizer"]})

    data = package("safetensors.torch").save(named, {"format": "pt"})
    write(folder / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))
    write(folder / "model.safetensors", lambda f: f.write(data))
    return extra


def published_tensors(size, state):
    """{their name: tensor} of a masked diffusion model of ours in MDLM's layout; and the
    list of those names that MDLM's own code has no place for. size: its ModelConfig; state:
    {our name: tensor}."""
    # whatever the time is, the conditioning is zero
    out = {"rotary_emb.inv_freq": inv_freq(size)}
    for layer, n in ((0, FREQUENCIES), (2, COND)):
        out[f"sigma_map.mlp.{layer}.weight"] = torch.zeros(COND, n)
        out[f"sigma_map.mlp.{layer}.bias"] = torch.zeros(COND)

    # the tensors of ours
    extra = []
    for name, tensor in state.items():
        # adaLN gives the norms' biases; attention's are left out where they do nothing
        if norm_bias(name) or attention_bias(name) and not tensor.any():
            continue
        theirs = rename(name, MDLM)
        if name.startswith("lm_head"):
            # a last row for the mask, never used
            tensor = torch.cat((tensor, torch.zeros_like(tensor[:1])))       # (V + 1, ...)
        out[theirs] = tensor
        if attention_bias(name) or name.startswith("embed_pos"):
            extra.append(theirs)

    # adaLN, whose matrices are zero: its biases are all it gives
    for part in [f"blocks.{i}" for i in range(size.layers)] + ["output_layer"]:
        bias = adaln_bias(size, state, part)
        out[f"{part}.adaLN_modulation.weight"] = torch.zeros(len(bias), COND)
        out[f"{part}.adaLN_modulation.bias"] = bias
    return out, extra


def adaln_bias(size, state, part):
    """The constants of adaLN in a part of an exported network, one after the other: our
    norms' biases as shifts, scales of 0, gates of 1. (6 C,) of a block, (2 C,) of the
    output layer."""
    zero, one = torch.zeros(size.width), torch.ones(size.width)
    if part == "output_layer":
        return torch.cat((state["norm.bias"], zero))
    vectors = []
    for norm in ("norm1", "norm2"):
        vectors += [state[f"{part}.{norm}.bias"], zero, one]
    return torch.cat(vectors)


# ---- which tokens a published model knows

def byte_signs():
    """How GPT-2's vocabulary files write each of the 256 bytes: as the character of that
    number if it is a visible one, else as one of the characters from number 256 on, in
    their order. Returns {byte: character}."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    signs = {byte: chr(byte) for byte in visible}
    for i, byte in enumerate(hidden):
        signs[byte] = chr(256 + i)
    return signs


def gpt2_vocabulary():
    """GPT-2's tokens as its vocab.json has them, {spelling: id}."""
    import tiktoken
    make_tokenizer({"kind": "gpt2"})     # says what to do where it is missing
    bpe = tiktoken.get_encoding("gpt2")
    signs = byte_signs()
    vocabulary = {}
    for i in range(GPT2_TOKENS):
        spelling = "".join(signs[byte] for byte in bpe.decode_single_token_bytes(i))
        vocabulary[spelling] = i
    return vocabulary


def vocabulary_of(folder):
    """What vocab.json or tokenizer.json in a folder say, {spelling: id}; None without
    them."""
    for name in VOCABULARIES:
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        if name == "vocab.json":
            return content
        # special tokens stand beside the others
        special = {one["content"]: one["id"] for one in content.get("added_tokens", [])}
        return content.get("model", {}).get("vocab", {}) | special
    return None


def tokenizer_of(folder, config, V):
    """The tokenizer's spec of a published model of V tokens, and a note for the user, or
    None. What an export kept; GPT-2's where the folder's vocabulary is GPT-2's, or, where
    the folder has none, V is its size or that padded; else numbers."""
    # an export of ours says it itself
    kept = config.get("nanosdtt", {}).get("tokenizer")
    if kept:
        return kept, None

    # GPT-2's, by its number of tokens or by each of them
    vocabulary = vocabulary_of(folder)
    if vocabulary is None and GPT2_TOKENS <= V <= PADDED:
        return {"kind": "gpt2"}, ("the folder does not say which tokens it knows; by their "
                                  "number they are taken for GPT-2's")
    if vocabulary is not None and V >= GPT2_TOKENS:
        if all(vocabulary.get(token) == i for token, i in gpt2_vocabulary().items()):
            return {"kind": "gpt2"}, None

    # others: the token's number is its text
    numbers = {"kind": "words", "items": [str(i) for i in range(V)]}
    return numbers, ("its tokens are not GPT-2's and cannot be read here: texts are the "
                     "numbers of tokens")


# ---- the command

def drop_padding(model, V):
    """The model without the tokens from V on, which no text has: its law is then that of
    the first V, given that it is one of them."""
    state = model.state_dict()
    # the row after the last token, the mask's or the start symbol's, stays
    embed = state["embed.weight"]
    mask = embed[model.config.vocab:]                                # (1, C)
    state["embed.weight"] = torch.cat((embed[:V], mask))             # (V + 1, C)
    for name in ("lm_head.weight", "lm_head.bias"):
        state[name] = state[name][:V]
    smaller = Transformer(replace(model.config, vocab=V))
    smaller.load_state_dict(state)
    return smaller.eval()


def convert(source, out):
    """A published model as a checkpoint of ours, `out`. Returns the model, and a list of
    notes for the user."""
    folder = fetch(source)
    model = load_published(folder)

    # the tokens: rows of the embedding that are none are left out
    config = read_json(folder / "config.json")
    spec, note = tokenizer_of(folder, config, model.config.vocab)
    notes = [note] if note else []
    extra = model.config.vocab - GPT2_TOKENS
    if spec["kind"] == "gpt2" and extra > 0:
        model = drop_padding(model, GPT2_TOKENS)
        notes.append(f"the last {extra} of its {GPT2_TOKENS + extra:,} rows, which are no "
                     "tokens of GPT-2's, are left out: its predictions are those given the "
                     "others")

    # SDTT's revisions are named after optimizer steps: 10,000 a round, and each round
    # halves the sampling steps, which were 1,024
    trained = re.search(r"@(?:baselines|scaling)_\w+_step_(\d+)0000$", source)
    kind, sampling_steps = "mdlm", None
    if trained:
        kind, sampling_steps = "sdtt", 1024 >> int(trained[1])
    if model.config.causal:
        kind = "ar"
    save_checkpoint(out, kind=kind, model_config=asdict(model.config),
                    model=model.state_dict(), ema=model.state_dict(), optimizer=[], step=0,
                    steps=0, seconds=0.0, config={"source": source}, tokenizer=spec,
                    sampling_steps=sampling_steps)
    return model, notes


def main():
    config = parse_flags(ConvertConfig, __doc__,
                         source="a folder, an id on the hub, or a checkpoint")
    # ours -> published
    if config.export:
        extra = export(config.source, Path(config.export))
        print(f"{config.export}: model.safetensors and config.json in MDLM's layout")
        if extra:
            print(f"MDLM's own code has no place for {len(extra)} of the tensors, such as "
                  f"{extra[0]}; tools.convert reads them")
        return

    # published -> ours, called as its folder or its revision is
    name = re.split("[/@]", config.source.rstrip("/"))[-1]
    out = Path(config.out or f"out/{name}.pt")
    model, notes = convert(config.source, out)
    size = model.config
    kind = "autoregressive" if size.causal else "masked diffusion"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {kind}, {size.layers} layers, width {size.width}, {size.vocab:,} "
          f"tokens, context {size.context:,}, {parameters:,} parameters")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    command(main)
