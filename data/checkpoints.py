"""Checkpoints, and training runs that can be stopped and resumed from one.

A checkpoint is one file of plain values and tensors, which says all that is needed to use
its model: sizes, tokens, and the flags that it was made with.
"""
import dataclasses
import hashlib
from pathlib import Path

import torch

from data.files import UserError, reason, write
from data.foreign import as_today, content_kind, file_kind, folder_kind
from model import ModelConfig, Transformer

# ---- checkpoints

# teacher, student of a round, autoregressive model
KINDS = ("mdlm", "sdtt", "ar")
# what every checkpoint has
KEYS = {"kind", "model_config", "model", "ema", "optimizer", "step", "steps", "seconds",
        "config", "tokenizer"}


def save_checkpoint(path, **content):
    """Save {'format', 'kind', 'model_config', 'model', 'ema', 'tokenizer', 'step', ...}."""
    write(path, lambda f: torch.save({"format": 1, **content}, f))


def load_checkpoint(path, kinds=KINDS):
    """Read a checkpoint onto the CPU. Raises UserError on a missing, foreign or wrong
    one."""
    makers = "train.py, distill.py or tools.convert"                 # for the sentences
    try:
        # weights_only: a file that is not ours cannot run code
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train.py and distill.py make them")
    except OSError as e:
        what = f"cannot be read ({reason(e)})"
        if Path(path).is_dir():
            what = folder_kind(Path(path))
        raise UserError(f"{path} {what}; name a checkpoint of {makers}")
    except Exception as e:       # torch.load fails in many ways on what is not a checkpoint
        raise UserError(f"{path} is not a checkpoint of this project: "
                        f"{file_kind(Path(path), e)}")
    # a file of PyTorch's: is it one of ours, of this format, of the kind that is needed?
    ours = isinstance(content, dict) and content.get("format") == 1
    if not ours or not KEYS <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project: "
                        f"{content_kind(content)}")
    as_today(content)                                                # older versions' words
    if content["kind"] not in kinds:
        raise UserError(f"{path} holds a model of kind {content['kind']!r}, but "
                        f"{' or '.join(kinds)} is needed here")
    return content


def load_model(path, device="cpu", kinds=KINDS):
    """The averaged (EMA) model of a checkpoint in eval mode, and the checkpoint's content.
    Raises UserError, also for weights that are not finite numbers."""
    content = load_checkpoint(path, kinds)
    try:
        # the file says its own sizes; the averaged weights are what is evaluated
        model = Transformer(ModelConfig(**content["model_config"]))
        model.load_state_dict(content["ema"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}: its weights do not fit its model_config ({in_short(e)}); "
                        "make it again, or name another")
    # train.py never saves such weights, but other programs may have
    if not finite(model):
        raise UserError(f"{path} holds weights that are not finite numbers: its training "
                        "diverged; train anew with a lower --lr")
    # on a GPU the blocks run in bfloat16, as in training there
    model.bf16 = torch.device(device).type == "cuda"
    return model.to(device).eval(), content                          # no dropout


def load_for(data, path, device, kinds, bf16=None):
    """load_model, of a model that is to write or read what a Dataset holds. bf16: whether
    its blocks run in bfloat16; None: as load_model chooses. Raises UserError where the
    model does not suit the data."""
    model, content = load_model(path, device, kinds)
    if bf16 is not None:
        model.bf16 = bf16
    context = model.config.context
    # the same tokens, of the same length, as the data have
    known = content["tokenizer"] == data.tokenizer.spec
    # only a judge, which is causal, may have other tokens: it reads the texts in its own
    if not known and not model.config.causal:
        raise UserError(f"{path} knows {model.config.vocab} tokens, {data.folder} other "
                        f"ones ({data.tokenizer.vocab}); give the --dataset it was trained "
                        "on")
    if known and data.context(context) != context:
        raise UserError(f"{path} writes {context} tokens, a text of {data.folder} has "
                        f"{data.stride}; give the --dataset it was trained on")
    return model, content


def model_from(config, data):
    """A Transformer of the sizes and weights of --init, on the CPU, with the
    attention and dropout of a TrainConfig; and a fingerprint of these weights. Raises
    UserError."""
    # an AR model goes on from AR weights, a diffusion model from diffusion weights
    kinds = ("ar",) if config.causal else ("mdlm", "sdtt")
    given, checkpoint = load_model(config.init, kinds=kinds)         # averaged weights
    # ids would mean other words
    if checkpoint["tokenizer"] != data.tokenizer.spec:
        raise UserError(f"--init {config.init} knows other tokens than {data.folder}; give "
                        "the --dataset it was trained on")
    data.context(given.config.context)   # raises where there is not enough of it
    # a prompt begins a row, so rows must be read one by one
    if data.prompts and given.config.context != data.stride:
        raise UserError(f"--init {config.init} reads {given.config.context} tokens, a row "
                        f"of {data.folder} has {data.stride}; with prompts both must "
                        "agree: prepare rows of that length, filled up with the token that "
                        "ends a text")
    # the attention may differ: the tensors are the same
    attention = "causal" if config.causal else config.attention or "full"
    model = Transformer(dataclasses.replace(given.config, attention=attention,
                                            dropout=config.dropout))
    model.load_state_dict(given.state_dict())
    return model, fingerprint(given)


def in_short(error):
    """The first 150 characters of an exception's message, in one line."""
    return " ".join(str(error).split())[:150]


def finite(model):
    """Whether all weights are finite numbers."""
    return all(bool(w.isfinite().all()) for w in model.parameters())


def fingerprint(model):
    """A short hash of a model's weights: which model a file or a result belongs to."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        # the bytes themselves, whatever the dtype
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]       # 48 bits tell models apart


# ---- a run: training that can be stopped, and goes on from its checkpoint

@dataclasses.dataclass
class Run:
    """A model in training, and what its checkpoint says of it."""
    path: Path                   # of the checkpoint; the log is kept beside it
    steps: int                   # optimizer steps from beginning to end
    model: Transformer
    ema: Transformer             # the averaged weights, which are what is evaluated
    optimizers: list
    content: dict             # what else the checkpoint holds: kind, config, tokenizer, ...
    updates_before: int = 0      # of ema, before step 0; not saved
    step: int = 0                # steps done
    seconds: float = 0.0         # time they took
    micro: int | None = None     # sequences of a micro-batch, on which the noise depends


def save(run):
    """Write run's checkpoint."""
    content = dict(run.content)          # a copy: run keeps its teacher
    # the frozen teacher of a round is needed only until the round is done
    if run.step == run.steps:
        content["teacher"] = None
    save_checkpoint(run.path, **content, step=run.step, steps=run.steps,
                    seconds=run.seconds, micro=run.micro,
                    model_config=dataclasses.asdict(run.model.config),
                    model=run.model.state_dict(), ema=run.ema.state_dict(),
                    optimizer=[optimizer.state_dict() for optimizer in run.optimizers])


# what a run depends on besides its flags: (key of its checkpoint, what is said if its value
# is another one now)
ORIGINS = (("tokenizer", "was made with other tokens than {dataset} has now"),
         ("data", "was made from other text or prompts than {dataset} holds now"),
         ("origin", "was distilled from another teacher"),
         ("init", "began with other weights than --init holds now"))
# {key of a checkpoint that tells what a path holds: flag that is the path}: not the paths
# are compared, but what they hold, as a folder may have moved
PATH_FLAGS = {"data": "dataset", "init": "init"}


def flags_of(saved, Config):
    """The flags that a checkpoint was made with, {name: value}, as Config has them today: a
    flag that is newer than the checkpoint has its default, and one that no longer exists is
    dropped."""
    if "seed" not in saved:      # not made by training, for example by tools.convert
        return saved
    names = {field.name for field in dataclasses.fields(Config)}
    # a flag that is gone is dropped, one that is new has its default
    known = {name: value for name, value in saved.items() if name in names}
    return dataclasses.asdict(Config(**known))


def resume(run, config, free):
    """Load run's checkpoint into it, if there is one; returns the checkpoint, or None.
    Raises UserError if a flag that is not in `free` has changed since, or the tokens, the
    text, the teacher or the first weights have, see ORIGINS."""
    if not run.path.exists():
        return None
    saved = load_checkpoint(run.path, kinds=(run.content["kind"],))

    # the same flags; of paths the loop over ORIGINS compares what they hold
    paths = {name for key, name in PATH_FLAGS.items() if saved.get(key)}
    made_with = flags_of(saved["config"], type(config))
    for name, value in dataclasses.asdict(config).items():           # the flags of now
        if name in free or name in paths or made_with.get(name) == value:
            continue
        raise UserError(f"{run.path} was made with --{name} {made_with.get(name)}, not "
                        f"{value}; give the same flag, move the file away, or choose "
                        "another --out")
    # the same tokens, text and weights to begin from
    for key, what in ORIGINS:
        known = saved.get(key)           # older checkpoints do not have all
        if known is not None and known != run.content.get(key):
            raise UserError(f"{run.path} {what.format(dataset=config.dataset)}; move it "
                            "away (of rounds, all of them), or choose another --out")

    # weights, optimizers and counters
    try:
        run.model.load_state_dict(saved["model"])
        run.ema.load_state_dict(saved["ema"])        # the averaged weights, too
        for optimizer, state in zip(run.optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)         # its moments and counters
    except (ValueError, RuntimeError, KeyError) as e:
        raise UserError(f"{run.path} does not fit the model that it is said to hold "
                        f"({in_short(e)}); move it away, or choose another --out")
    # the loop goes on from this step
    run.step, run.seconds, run.micro = saved["step"], saved["seconds"], saved.get("micro")
    return saved


def with_saved_flags(config, free):
    """A TrainConfig with the flags that its checkpoint, finished or not, was made with, but
    for those in `free`: for distill.py, which takes the teacher and the judge that it
    finds. Raises UserError where train.py did not make them."""
    saved = load_checkpoint(config.path, kinds=(config.objective,))
    # a checkpoint that tools.convert made has no objective
    if "objective" not in saved["config"]:
        name = "judge" if config.causal else "teacher"
        raise UserError(f"{config.path} was made by tools.convert, not by train.py; move "
                        f"it to another folder and give it as --{name}")
    # some flags may differ, and keep their present values
    kept = set(free)
    # the checkpoint has a fingerprint of its data, which resume() compares: the folder may
    # have another name today
    if saved.get("data"):
        kept |= {"dataset"}
    flags = {name: value for name, value in saved["config"].items() if name not in kept}
    return dataclasses.replace(config, **flags)
