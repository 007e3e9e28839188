"""Checkpoints that today's code did not write: those of older versions, and files of
others.

load_checkpoint asks here what it holds in its hands, so that a mistake ends in a sentence
which names the file's maker and the way to use it.
"""
import pickle

import torch


def as_today(content):
    """Change what an older version's checkpoint says of its model into today's words."""
    sizes = content["model_config"]
    # before `attention` there was `causal`
    if "causal" in sizes:
        causal = sizes.pop("causal")
        sizes["attention"] = "causal" if causal else "full"
    if "attention_bias" in sizes:
        return
    # before `attention_bias` some models had biases that were frozen at zero
    ends = "qkv.bias", "attn_out.bias"
    biases = [name for name in content["ema"] if name.endswith(ends)]
    rope = sizes.get("positions", "rope") == "rope"
    frozen = rope and sizes.get("attention") != "causal"
    if frozen and not any(content["ema"][name].any() for name in biases):
        sizes["attention_bias"] = False
        for weights in (content["model"], content["ema"]):
            for name in biases:
                weights.pop(name, None)


def folder_kind(path):
    """What a folder that was given as a checkpoint seems to be, in words."""
    if (path / "config.json").exists():
        return "is a folder of published weights, of which tools.convert makes a checkpoint"
    inside = sorted(file.name for file in path.glob("*.pt"))
    if inside:
        return f"is a folder, which holds {', '.join(inside)}"
    return "is a folder"


def file_kind(path, error):
    """What a file that torch.load refuses with `error` seems to be, in words, with a
    remedy."""
    with open(path, "rb") as f:
        begin = f.read(64)
    # other formats, by their first bytes
    if not begin:
        return "it is empty; name another"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, which fetches the file itself"
    if path.suffix == ".safetensors" or begin[8:10] == b'{"':
        return ("it is a safetensors file; tools.convert makes a checkpoint of the folder "
                "that holds it and its config.json")
    # PyTorch's own: a zip archive today, a pickle in early versions
    zipped, pickled = begin.startswith(b"PK"), begin.startswith(b"\x80")
    old = begin.startswith(b"\x80\x02")
    if isinstance(error, pickle.UnpicklingError) and (zipped or old):
        return ("it holds Python objects besides plain values and tensors, which are not "
                "read here because that would run code")
    if zipped:
        return "it is not whole, as after a copy that was cut short; copy it again"
    if pickled:
        return "it is a Python pickle, which is not read here because that would run code"
    return "it is no file of PyTorch's; name another"


def content_kind(content):
    """What the content of a PyTorch file seems to be, in words, with a remedy."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}; name another file"
    if content.get("format", 1) != 1:
        return (f"its format is number {content['format']}, this version reads number 1; "
                "use the version that made it")
    # the first few keys, for the sentence
    keys = [str(key) for key in content]
    some = ", ".join(keys[:6])
    if len(keys) > 6:
        some += ", ..."
    # other projects' checkpoints
    if {"model", "model_args", "iter_num"} <= content.keys():
        return (f"it is nanoGPT's ({some}), whose layout is not read here; tools.convert "
                "reads GPT-2 in the transformers package's")
    if "state_dict" in content:
        return (f"it is another trainer's ({some}); tools.convert reads MDLM, SDTT and "
                "GPT-2 from a folder with config.json and model.safetensors")
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return (f"it holds bare tensors ({some}); tools.convert reads published weights "
                "from a folder with config.json and model.safetensors")
    held = some or "nothing"
    return f"it holds {held}; name a file of train.py, distill.py or tools.convert"
