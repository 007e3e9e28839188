"""The text that a sample is given, a prompt or a text with gaps, and where it ends."""
import re
import sys

import torch

from data.files import UserError

GAP = re.compile(r"(?<!\S)(_+\d+_+|_+)(?!\S)")       # alone between white space or ends


def parse_infill(text, tokenizer, mask_id):
    """"a ___ b _20_" -> ids with mask_id in the gaps: 3 for the first, 20 for the second.
    Any other underscore is text, as in file_name."""
    ids = []                                                         # (P,)
    # split() returns text and gaps in turn, text first
    for i, part in enumerate(GAP.split(text)):
        is_gap = i % 2 == 1
        if is_gap:
            number = part.strip("_")                                 # "" or "20"
            ids += [mask_id] * int(number or len(part))              # _20_ or ___
        elif tokenizer.spec["kind"] == "chars":
            ids += tokenizer.encode(part)
        else:                            # the space before a gap belongs to the gap's token
            ids += tokenizer.encode(part.removesuffix(" "))
    return ids


def without_last_space(prompt, tokenizer):
    """The prompt without spaces at its end, where a token begins with its space (GPT-2's
    tokens and ours): a space by itself is hardly ever followed by a word. Says so on
    stderr."""
    if tokenizer.spec["kind"] not in ("bpe", "gpt2") or not prompt.endswith(" "):
        return prompt
    print("the space at the end of --prompt is left out: it belongs to the token that "
          "follows", file=sys.stderr)
    return prompt.rstrip(" ")                                        # also several spaces


def known_tokens(config, model, tokenizer):
    """The tokens that the flags give: ids (P,), mask_id in gaps. Raises UserError where the
    model cannot take them."""
    context = model.config.context
    # what cannot be, before anything is computed
    if config.infill is not None and config.prompt:
        raise UserError("--prompt and --infill together; put the prompt at the start of "
                        "--infill")
    if config.infill is not None and model.config.causal:
        raise UserError(f"{config.checkpoint} is autoregressive and cannot fill gaps; give "
                        "--prompt, or a diffusion checkpoint")
    if config.length and config.length > context:
        raise UserError(f"--length {config.length} is beyond the model's context of "
                        f"{context} tokens")

    if config.infill is not None:
        name, ids = "infill", parse_infill(config.infill, tokenizer, model.mask_id)
    else:
        # put back, so that a race of several models says it once
        config.prompt = without_last_space(config.prompt, tokenizer)
        name, ids = "prompt", tokenizer.encode(config.prompt)
    length = config.length or context                                # L
    if len(ids) > length:
        raise UserError(f"--{name} has {len(ids)} tokens, more than the text's {length}; "
                        "shorten it")
    return torch.tensor(ids, dtype=torch.long)


def check_until_end(config, tokenizer):
    """Raise UserError where --until_end is asked for and means nothing."""
    if not config.until_end:
        return
    if config.infill is not None:
        raise UserError("--until_end and --infill together; a text with gaps ends where it "
                        "was given to end, so leave --until_end out")
    if tokenizer.end is None:
        raise UserError(f"--until_end: {config.checkpoint} has no end-of-text token, as "
                        "its tokens are single words or characters; leave it out, or train "
                        "on data that data/text/prepare.py made with --tokenizer bpe")


def ends_of(x, P, end):
    """Of each text of x (n, L) the number of tokens up to its first `end` after the P
    tokens of its prompt, that included: (n,). L where there is none."""
    L = x.shape[1]
    place = torch.arange(L, device=x.device)
    is_end = (x == end) & (place >= P)                               # (n, L)
    return torch.where(is_end, place, L - 1).amin(1) + 1


def up_to_end(ids, P, end):
    """A text's ids (a list) up to its first `end` after the P ids of the prompt, without
    it; the whole text where there is none. Without a prompt, an end that comes before all
    else begins the text, as in rows of --chunk, and is dropped."""
    begin = 0
    if P == 0:
        while begin < len(ids) and ids[begin] == end:
            begin += 1
    stop = max(P, begin)
    while stop < len(ids) and ids[stop] != end:
        stop += 1
    return ids[begin:stop]
