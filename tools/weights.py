"""The models in weights/, made from a folder of distill.py: AR, teacher and last student.

    python -m tools.weights out/reveal-0

Of a checkpoint the averaged weights are kept, without optimizers. The matrices of the MLPs,
six tenths of a nano model's weights, are stored in half precision, all else as it was: no
logit moves by 0.01. (With every tensor in half precision some move by 0.03, most of it
through the embeddings and the first block.) The files are checkpoints like any other, and
the models that they give are float32.
"""
import dataclasses
from pathlib import Path

import torch

from common import seed_all
from data.checkpoints import load_model, save_checkpoint
from data.dataset import load_data
from data.files import UserError
from data.processes import Processes
from data.results import round_files
from data.script import command, flag, parse_flags
from diffusion import q_sample

CPU = torch.device("cpu")
HALVED = ".mlp_in.weight", ".mlp_out.weight"
LIMIT = 1e-2                             # by which no logit may move
TEXTS = 256                              # of the validation data, on which that is measured


@dataclasses.dataclass
class WeightsConfig:
    """The flags of tools.weights."""
    folder: str                          # the argument without --
    out: str = flag("weights", "folder of the new files")


def halved(weights):
    """Tensors {name: float32}, the matrices of the MLPs in half precision."""
    smaller = dict(weights)
    for name in weights:
        if name.endswith(HALVED):
            smaller[name] = weights[name].half()
    return smaller


def small_checkpoint(content):
    """The content of a checkpoint without what only training needs."""
    weights = halved(content["ema"])
    # one tensor under two names takes its room once
    return content | {"model": weights, "ema": weights, "optimizer": [], "teacher": None}


@torch.no_grad()
def logits_of(model, weights, z):
    """Logits (B, L, V) of ids z (B, L), with these weights in a model's place."""
    model.load_state_dict(weights)
    # with attention reveal the order of reveal is drawn: the same for all weights
    seed_all("weights", "order")
    return model(z)


def moved(path):
    """The content of a checkpoint, and by how much its smaller weights move the logits: the
    largest absolute difference on texts of its data, for a diffusion model partly masked.
    """
    model, content = load_model(path)
    data = load_data(content["config"]["dataset"], Processes(CPU))
    z = data.pieces(TEXTS, model.config.context)                     # (B, L)
    if not model.config.causal:
        seed_all("weights", "noise")
        z = q_sample(z, torch.rand(len(z)), model.mask_id)
    weights = content["ema"]
    distance = logits_of(model, weights, z) - logits_of(model, halved(weights), z)
    return content, distance.abs().max().item()


def main():
    config = parse_flags(WeightsConfig, __doc__, folder="of distill.py")
    folder, out = Path(config.folder), Path(config.out)
    if folder.resolve() == out.resolve():
        raise UserError(f"--out {out} would replace the checkpoints, which can be trained "
                        "further; choose another folder")
    rounds = round_files(folder)
    if not rounds:
        raise UserError(f"{folder} has no round file; python distill.py makes them")
    paths = [folder / "ar.pt", folder / "teacher.pt", rounds[-1]]

    # all are looked at before the first is written
    made = []
    for path in paths:
        content, distance = moved(path)
        if not distance < LIMIT:
            raise UserError(f"half precision would move the logits of {path} by "
                            f"{distance:.3f}, not by less than {LIMIT}; keep that file as "
                            "it is")
        made.append((path, content, distance))

    for path, content, distance in made:
        target = out / path.name
        save_checkpoint(target, **small_checkpoint(content))
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; its logits are within "
              f"{distance:.4f} of those of {path}")


if __name__ == "__main__":
    command(main)
