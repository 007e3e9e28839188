"""Exact sampling: the distribution of one token at a time, in a handful of calls. The same
call, on a given text, gives its exact likelihood in an order.

For attention in the order of reveal, and for AR models, whose order is left to right. Slot
i of a text is the i-th in its order of reveal, from 0, with the prompt in the first slots:
see diffusion.py, which has all other samplers.

Each call predicts a run of slots, and draws their tokens anew. The slots before `final`
keep theirs, those from there to `guessed` - 1 hold guesses, the rest hold nothing. The call
asks for slots `final` to `end` - 1; c is the first of these that changes (a first guess is
a change). All slots up to c are then final; if none changes, all asked. One call, shown
left to right (a diffusion model's order is shuffled; sample_exact_plain is all this as a
loop):

    slot       0     1     2     3     4     5     6
    old        one   day   tom   lost  his   hat         final = 2, guessed = 6; end = 7
    new        one   day   tom   lost  her   bag   .     c = 4: final = 5, guessed = 7

The call predicts each of the slots 2 to 6 from the old tokens in the slots before it: 4
from "one day tom lost", 5 from "one day tom lost his". Each guess becomes a draw from its
prediction, one that equals the guess as often as possible (couple); a slot without a guess
becomes a plain draw. Slots 2 and 3 stayed, so slot 4 was predicted from tokens that stand:
2, 3 and 4 are final. Slot 5 was predicted from "his", which is gone: "bag" is a guess. The
cached keys are right for slots 0 to 3: the next call reads from slot 4 on (unread = 4). In
the first call there are no guesses, and only the first slot asked becomes final; in each
call at least one does. Once the early slots settle the story, most later guesses stay: then
one call makes many final.

Why one call predicts all these slots: with attention "reveal" a mask sees itself and
whatever tokens there are. The mask of slot s is shown (by its `limit`, see cache.Reading)
only those in the slots before s, as if the later ones were still masked: what it would see
with one token at a time. As no mask sees another, and no token a mask or a later token, one
call can ask all slots. (In AR the token in the slot before predicts a slot.)

Why it is exact: take a slot s, and fix the random numbers drawn at the slots before it. No
slot sees a later one, so as long as s is not final these numbers alone decide all of this:

    - the tokens before s after each call;
    - which calls ask s, and p[k], what the k-th of these predicts there;
    - K: the K-th of these is the first in which no slot before s changes.

It makes s final, whether s itself changes in it or not: so K, too, is decided without the
random numbers at s. Those draw the first token from p[1]; then couple turns a draw from
p[k - 1] into one from p[k]. So s ends as a draw from p[K], predicted from final tokens. (If
s were final once its own guess stayed, K would depend on the token, and tokens likely in
two predictions would come too often.)

To predict all slots again until none changes is a fixed-point iteration, as in arXiv
2002.03629; the coupling is from 2211.17192.
"""
import typing

import torch

from cache import Reading
from data.devices import in_float64, upload
from diffusion import (HEAD_ROWS, by_position, check_filled, draw_from, listed,
                       make_reading, prompt_first, random_order, rank_prompt_first, span)
from model import cross_entropy, shifted

COUPLE_SIZE = 2 ** 20            # numbers in one of couple's tables (n, V), n at least 32


# ---- the coupling, and the sampler as a plain loop

def couple_rows(p, q, guess, mask_id):
    """Guesses (n,) are draws from q (n, V). Returns draws from p (n, V) that equal them as
    often as possible: a guess x stays with probability min(1, p(x) / q(x)); otherwise the
    token is drawn from the excess of p over q, max(p - q, 0) (speculative sampling, arXiv
    2211.17192). As min(p, q) + max(p - q, 0) = p, the result is a draw from p. Where guess
    is mask_id there is none, and the draw is from p. q is overwritten."""
    has_guess = guess != mask_id                                     # (n,)
    q[~has_guess] = 0                            # then max(p - q, 0), below, is p
    # p and q of the guess itself (n,); where there is none any token will do
    token = guess.where(has_guess, 0)[:, None]                       # (n, 1)
    p_guess, q_guess = p.gather(1, token)[:, 0], q.gather(1, token)[:, 0]
    # it stays with probability min(1, p / q)
    u = torch.rand_like(p_guess)
    stays = has_guess & (u * q_guess < p_guess)
    # the others are drawn anew; if p - q rounds to nothing positive, from p
    others, = (~stays).nonzero(as_tuple=True)                        # (m,)
    p = p[others]                                                    # (m, V)
    rest = (p - q[others]).clamp_(min=0)
    empty = rest.amax(1, keepdim=True) == 0
    drawn = guess.clone()
    drawn[others] = draw_from(torch.where(empty, p, rest))
    return drawn


def sample_exact_plain(predict, L, mask_id):
    """sample_exact as a plain loop: one text, left to right, all slots asked in each call,
    and no cache. predict(x (L,)) -> probabilities (L, V): row s for slot s, given x[:s],
    the tokens before it. While x[:s] still holds a mask, row s may be anything: a draw from
    it is a poor guess, but q is known, so couple_rows corrects it later. Returns ids (L,)
    and the number of calls."""
    x = torch.full((L,), mask_id)
    q = None                             # what the guesses were drawn from
    final, calls = 0, 0
    while final < L:
        p = predict(x).double()                                      # (L, V), one call
        if q is None:
            q = torch.zeros_like(p)                                  # no guesses yet
        calls += 1
        # each guess becomes a draw from its new prediction
        new = x.clone()                                              # (L,)
        new[final:] = couple_rows(p[final:], q[final:], x[final:], mask_id)
        # the first slot that changed is final, like all before it
        changed, = (new != x).nonzero(as_tuple=True)                 # slots
        final = L
        if len(changed):
            final = int(changed[0]) + 1
        x, q = new, p
    return x, calls


# ---- the sampler

class Asked(typing.NamedTuple):
    """What one call reads and is asked, in slots of each text, (B,) each."""
    unread: torch.Tensor         # the first token that is not in the cache
    guessed: torch.Tensor        # slots from here on hold no token yet
    begin: torch.Tensor          # the first slot that is asked
    end: torch.Tensor            # the one after the last


def couple(model, h, h_old, x, mask_id, adjust=None):
    """couple_rows for guesses x (N,), with q what the states h_old (N, C) predict, and p
    what h (N, C) predicts: (N,). adjust: see sample_exact."""
    def probabilities(states):
        """What states (n, C) predict: (n, V). The softmax may be float32: its errors are
        relative, see categorical."""
        logits = model.head(states)
        if adjust:
            logits = adjust(logits)
        return in_float64(logits.softmax(-1))

    ids = []
    # some rows at a time: never all (N, V)
    size = max(32, COUPLE_SIZE // model.config.vocab)
    for new, old, guess in zip(h.split(size), h_old.split(size), x.split(size)):
        p, q = probabilities(new), probabilities(old)                # (n, V) both
        ids.append(couple_rows(p, q, guess.to(p.device), mask_id))
    return torch.cat(ids).to(x.device)


@torch.no_grad()
def sample_exact(model, z, mask_id, adjust=None, ahead=8, max_calls=None, watch=None):
    """Fill every mask of z (B, L), in few calls, with exactly the distribution of revealing
    one token at a time, as told above: for attention in the order of reveal, and for AR
    models, whose order is left to right. sample_exact_plain is the same without the cache.
    adjust: logits (N, V) -> logits, such as sharpen; None: the model's own.
    ahead: with f slots final a call asks for the next ahead + f: few at first, as guesses
    far ahead are mostly wrong then; None: always all.
    max_calls: stop there and leave the guesses as they are, which is not exact (AR's, of
    slots that it could not yet predict, are noise).
    watch: called after each call with z and the bool (B, L) of its final tokens.
    Returns ids (B, L) and the calls that each text took (B,); a batch takes as many as its
    slowest text. Raises ValueError for no calls or none ahead (and see how_to_ask), and
    FloatingPointError at predictions of NaN."""
    B, L = z.shape
    for least in (ahead, max_calls):     # None: no limit
        if least is not None and least < 1:
            raise ValueError("exact sampling needs a call, and a token ahead")
    ahead = L if ahead is None else min(ahead, L)
    # ask: ask_masks or ask_tokens; order (B, L): the positions of slots
    ask, order = how_to_ask(model, z, mask_id)
    order_z = upload(order, z.device)
    x = z.gather(1, order_z)             # (B, L), tokens by slot; a mask where no guess is

    # of each text, (B,): slots 0 to final - 1 are done, at first the prompt's; those up to
    # guessed - 1 hold guesses, and the rest masks
    final = (x != mask_id).sum(1).cpu()
    guessed = final
    # the first slot whose present token the cache lacks: at first all, and for AR also the
    # start symbol, in "slot" -1
    unread = torch.full_like(final, -1)
    # a place for each slot's token, and one for its mask, of which AR has none
    cache = model.cache(B, L, spare=0 if model.config.causal else L)
    # the state (B, L, C) that each slot's token was drawn from: kept instead of q =
    # softmax(head(state)), which is V wide; couple runs the head again
    states = None
    calls = torch.zeros(B, dtype=torch.long)                         # of each text
    made = 0                                                         # of the batch
    while bool((final < L).any()) and made != max_calls:             # None: no limit
        made += 1
        calls += final < L
        # what is asked: the slots from `final` to `end` - 1 (B,), N together; of a finished
        # text none. `end` never falls, so every guess is asked again
        end = (2 * final + ahead).clamp(max=L)   # the more is final, the better are guesses
        if made == max_calls:
            end = torch.full_like(end, L)                # no slot may stay without a guess
        asked = Asked(unread=unread, guessed=guessed, begin=final, end=end)
        h = ask(model, cache, order, x, asked)                                   # (N, C)
        if states is None:
            states = h.new_zeros(B, L, h.shape[1])

        # each guess becomes a draw from its new prediction
        where = listed(span(final, end), z.device)       # text and slot of each row of h
        old = x.clone()                                  # to see what changes
        x[where] = couple(model, h, states[where], x[where], mask_id, adjust)
        states[where] = h
        # c (B,): the first slot that changed; a mask that became a guess counts. (While end
        # < L it grows in every call, so masks were asked: if nothing changed, c = end = L)
        changed = (x != old).cpu()
        c = torch.where(changed, torch.arange(L), end[:, None]).amin(1)
        final = (c + 1).minimum(end)
        guessed = end
        # the cache is right up to slot c - 1. From c on its keys are the old token's, or
        # have seen it: the next call reads from c = final - 1 on. (c = L: the text is done)
        unread = final - 1
        if watch:
            done = torch.arange(L) < final[:, None]      # (B, L), by slot
            watch(by_position(x, order_z), by_position(done, order))
    return check_filled(by_position(x, order_z), mask_id), calls


# ---- how one call asks

def how_to_ask(model, z, mask_id):
    """What differs between models in sample_exact: (ask_masks or ask_tokens, order (B, L)).
    Raises ValueError for full attention, if an AR model's z has gaps, and for attention
    "reveal" if the rows of z differ in their number of masks."""
    B, L = z.shape
    if model.config.causal:
        if bool(((z[:, 1:] != mask_id) & (z[:, :-1] == mask_id)).any()):
            raise ValueError("an AR model goes on from a prompt, and fills no gaps")
        return ask_tokens, torch.arange(L).repeat(B, 1)
    if model.config.attention != "reveal":
        raise ValueError("exact sampling needs attention in the order of reveal")
    return ask_masks, prompt_first(random_order(z, mask_id), L)


def ask_masks(model, cache, order, x, asked):
    """One call of a model with attention in the order of reveal: the states (N, C) of masks
    at the slots that are asked (an Asked), which predict them. It reads, first, the tokens
    of x (B, L) that the cache lacks; then the masks. Both the token of slot s and its mask
    see all tokens in the slots before s. The cache keeps the token of slot s in place s,
    and its mask in place L + s: in place s it would overwrite the guess there, which this
    call reads, too."""
    masks = span(asked.begin, asked.end)
    # the token of the last slot asked is not read: nothing that is asked comes after it.
    # (clamp: "slot" -1 is AR's alone)
    tokens = span(asked.unread.clamp(min=0), (asked.end - 1).minimum(asked.guessed))
    # a mask sees the slots before its own, as far as they hold tokens
    limit = masks.slot.minimum(asked.guessed[:, None])
    new = make_reading(model, x, order, tokens, masks, limit, masks.slot + x.shape[1])
    return model.read(cache, new)


def ask_tokens(model, cache, order, x, asked):
    """ask_masks of an AR model, which predicts slot s at the token of slot s - 1, so that
    no masks are needed (skip this at a first reading):

        place p in the cache            0       1      2      3
        holds the token of slot p - 1   start   one    day    tom
        its state predicts slot p       one     day    tom    lost

    Slot `guessed` is the last that can be predicted: of later ones the token before is
    missing. For these the state is taken as 0. Any prediction will do for a first guess, as
    long as couple is told it later."""
    B, L = x.shape
    by_place = shifted(x, model.mask_id)                             # (B, L)
    # from the place of slot `unread`'s token to the place that predicts the last slot
    # asked; a text that is finished asks for nothing
    last = (asked.end - 1).minimum(asked.guessed)                    # (B,)
    last = last.where(asked.begin < asked.end, asked.unread)
    places = span(asked.unread + 1, last + 1)                        # (B, M), or empty
    idx = by_place.gather(1, upload(places.slot, x.device))
    new = Reading(idx=idx, pos=places.slot, place=places.slot, limit=places.slot,
                  valid=places.valid)
    h = model.read(cache, new)
    # place p predicts slot p: so the same number serves
    states = h.new_zeros(B, L, h.shape[1])
    states[listed(places, x.device)] = h
    return states[listed(span(asked.begin, asked.end), x.device)]    # (N, C)


# ---- the same call on a given text: its likelihood

@torch.no_grad()
def nll_in_order(model, x, mask_id, order=None, known=0):
    """-log p(x | order) of each text of x (B, L), exactly and in one call, in nats: (B,).
    For attention in the order of reveal. order (B, L): positions, on the CPU; random ones
    unless given. known: how many slots, from the first on, are given and cost nothing: a
    number, or (B,) on the CPU.
    The same reading as in sample_exact, with the text itself as the guess: a mask at each
    slot says what the token costs given those before it. The mean over orders is at least
    -log p(x), see nelbo, which estimates it with much more noise: here neither t nor masks
    are drawn, only the order is, and every token counts. Raises ValueError for another
    attention."""
    B, L = x.shape
    if model.config.attention != "reveal":
        raise ValueError("a likelihood in an order needs attention in the order of reveal")
    if order is None:                    # all are shuffled, as if all were masks
        order = random_order(torch.full_like(x, mask_id), mask_id)   # (B, L)
    by_slot = x.gather(1, upload(order, x.device))                   # (B, L)
    # all slots hold a token and none is in the cache; those that are not known are asked
    begin = torch.as_tensor(known).expand(B)                         # (B,)
    end = torch.full((B,), L)
    asked = Asked(unread=torch.zeros_like(end), guessed=end, begin=begin, end=end)
    cache = model.cache(B, L, spare=L)
    h = ask_masks(model, cache, order, by_slot, asked)               # (N, C)
    slots = span(begin, end)
    of_slots = nats_of(model, h, by_slot[listed(slots, x.device)])   # (N,)
    nats = of_slots.new_zeros(B, L)              # on the device that has float64
    nats[listed(slots, nats.device)] = of_slots
    return nats.sum(1)                                               # (B,)


def order_loss(model, x, mask_id, keep=None):
    """An estimate of what nelbo estimates, a scalar in nats per token of x (B, L), with
    much less noise: only the order of reveal is random, and all tokens of each text (but
    those to keep) are scored in it. For validation only, and attention "reveal": no
    gradient flows through it."""
    if keep is None:
        return nll_in_order(model, x, mask_id).mean() / x.shape[1]
    # here the prompt is first in the order, and its `known` tokens are not counted
    order = rank_prompt_first(keep).argsort(1).cpu()                 # (B, L)
    known = keep.sum(1).cpu()                                        # (B,)
    nats = nll_in_order(model, x, mask_id, order, known)             # (B,)
    return nats.sum() / (x.numel() - known.sum())


def nats_of(model, h, ids):
    """-log p of ids (N,) under what the states h (N, C) predict: (N,), float64. The head is
    given some states at a time, see draw_tokens."""
    nats = []
    for states, some in zip(h.split(HEAD_ROWS), ids.split(HEAD_ROWS)):
        nats.append(in_float64(cross_entropy(model.head(states), some)))
    return torch.cat(nats)
