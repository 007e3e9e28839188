"""Another order of reveal: the surest tokens first, as LLaDA (arXiv 2502.09992) writes.

It is not the model's law. A masked diffusion model averages over all orders, and none of
them looks at what the network says; here the tokens that are drawn decide which of them
stay. Likely tokens stay more often than they are drawn, also with one token a step, as if
the temperature were lower. So every table and every row that is made like this says so.
"""
import torch

from data.devices import in_float64
from data.files import UserError
from diffusion import blank_states, categorical, check_filled, draw_tokens, random_order

ORDERS = ["random", "confidence"]        # as --order names them; random is the model's own


@torch.no_grad()
def sample_confident(model, z, steps, mask_id, draw=categorical):
    """Fill every mask of z (B, L), the surest tokens first. In each step every masked
    position gets a draw, and those whose drawn token has the highest probability, under the
    model itself, whatever `draw` does to it, keep theirs; the others stay masked. (By
    probabilities at a low temperature all would be about as sure.) Equal probabilities are
    put in random order. How many tokens a step reveals is not drawn: see even_counts.

    steps: more than there are masks are as many as there are masks. For attention "full".
    draw: logits (N, V) -> ids (N,). Returns ids (B, L). Raises ValueError on rows of
    unequal numbers of masks, FloatingPointError where predictions are not finite."""
    left = random_order(z, mask_id).to(z.device)         # (B, n), positions still masked
    row = torch.arange(len(z), device=z.device)[:, None]             # (B, 1)
    blank = left.shape[1] == z.shape[1]          # nothing but masks: there is no prompt
    z = z.clone()
    for i, count in enumerate(even_counts(left.shape[1], steps)):
        # what the network says at all N = B n masks
        if i == 0 and blank:             # the same, in less time
            h = blank_states(model, z, left)                         # (B, n, C)
        else:
            h = model.hidden(z, at=(row, left))
        h = h.flatten(0, 1)                                          # (N, C)
        # a token for each, and the surest of every text
        ids, sure = draw_with_confidence(model, h, draw)             # (N,) both
        sure = sure.view(left.shape)                                 # (B, n)
        first = sure.argsort(dim=1, descending=True, stable=True)    # (B, n)
        first = first.to(z.device)
        chosen = first[:, :count]                                    # (B, count)
        z.scatter_(1, left.gather(1, chosen), ids.view_as(left).gather(1, chosen))
        left = left.gather(1, first[:, count:])                      # (B, n - count)
    return check_filled(z, mask_id)


def even_counts(n, steps):
    """How many of n masks each of `steps` steps reveals: n / steps, and where that is no
    whole number one more in the first steps. Steps that would reveal none are left out."""
    counts = []
    for i in range(min(n, steps)):
        count = n // steps
        if i < n % steps:
            count += 1
        counts.append(count)
    return counts


def draw_with_confidence(model, h, draw):
    """draw(logits) at each of the states h (N, C), ids (N,), and the probabilities of these
    tokens under the model, (N,). Never with all logits at once: see draw_tokens."""
    sure = []

    def draw_and_note(logits):
        """Draw from logits (n, V), and keep the probabilities of what was drawn."""
        ids = draw(logits)                                           # (n,)
        # float64: in float32 every probability from 1 - 3e-8 on would be 1
        p = in_float64(logits).softmax(-1)                           # (n, V)
        # where predictions are NaN the draw is V, which check_filled will find
        token = ids.clamp(max=p.shape[-1] - 1)[:, None]              # (n, 1)
        sure.append(p.gather(1, token.to(p.device))[:, 0])
        return ids

    ids = draw_tokens(model, h, draw_and_note)
    return ids, torch.cat(sure)


def check_order(order, model, path):
    """Raise UserError where --order asks for what a model cannot do. path: the model's."""
    attention = model.config.attention
    if order == "confidence" and attention != "full":
        kept = "its own order of reveal" if attention == "reveal" else "left to right"
        raise UserError(f"--order confidence is for diffusion with full attention, and "
                        f"{path} has attention {attention}, which keeps to {kept}; leave "
                        "one of the two out")
