"""What texts cost: calls of the network, and positions that it reads."""
import contextlib
import typing

import torch


class Cost(typing.NamedTuple):
    """What a batch of texts cost."""
    nfe: int                     # calls of the network (number of function evaluations)
    calls: list                  # of each text: those that made something final in it
    reads: int                   # positions that the network read, of all texts


@contextlib.contextmanager
def counted_calls(model):
    """Yields a list, to which each call of the network inside the `with` appends the number
    of positions that it read."""
    reads = []
    # every call of the network is one of these; it may be compiled, and the model's own
    run, own = model.run, "run" in vars(model)

    def counted_run(idx, *args, **kw):
        reads.append(idx.numel())        # ids of all positions that this call reads
        return run(idx, *args, **kw)

    model.run = counted_run
    try:
        yield reads
    finally:
        del model.run                                                # also after an error
        if own:
            model.run = run


def cost_of(sizes, calls, B):
    """The Cost of a batch of B texts. sizes: of each call of the network, how many
    positions it computed; calls (B,): of each text, or None if each needed all of them."""
    nfe = len(sizes)
    if calls is None:
        calls = torch.full((B,), nfe)
    return Cost(nfe, calls.tolist(), sum(sizes))


def calls_as_text(costs, max_calls):
    """What exact sampling cost, as a line of text. max_calls: where it was stopped, or
    None."""
    calls = []                           # of each text
    for cost in costs:
        calls += cost.calls
    mean = sum(calls) / len(calls)
    text = f"calls of the network: {mean:.1f} a text, {max(calls)} at most"
    if max_calls and max(calls) == max_calls:
        text += "; a text that was cut off there is not exact"
    return text


class CallsOfTexts:
    """A `watch` of diffusion.sample that counts, for each text, the calls that revealed
    something in it. z (B, L): the texts before the first call."""

    def __init__(self, z):
        self.texts = z
        # beside z: to count does not make the CPU wait for a GPU
        self.calls = torch.zeros(len(z), dtype=torch.long, device=z.device)      # (B,)

    def __call__(self, texts):
        """texts (B, L): a copy of all texts after a call."""
        self.calls += (texts != self.texts).any(1)
        self.texts = texts
