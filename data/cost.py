"""What texts cost: calls of the network, and positions that it reads."""
import contextlib
import typing


class Cost(typing.NamedTuple):
    """What a batch of texts cost."""
    nfe: int                     # calls of the network (number of function evaluations)
    calls: list                  # that each text took; the most of them is nfe
    reads: int                   # positions that the network read, of all texts


@contextlib.contextmanager
def counted_calls(model):
    """A list that gets an entry for each call of the network inside the `with`, the number
    of positions that it read: every call embeds tokens exactly once."""
    reads = []

    def embedded(module, args, output):
        reads.append(args[0].numel())    # ids of all positions that this call reads

    hook = model.embed.register_forward_hook(embedded)
    try:
        yield reads
    finally:
        hook.remove()                                                # also after an error


def calls_as_text(costs, max_calls):
    """What exact sampling cost, in a line for the reader."""
    calls = []                           # of each text
    for cost in costs:
        calls += cost.calls
    mean = sum(calls) / len(calls)
    text = f"calls of the network: {mean:.1f} a text, {max(calls)} at most"
    if max_calls and max(calls) == max_calls:
        text += "; texts that were stopped there are not exact"
    return text
