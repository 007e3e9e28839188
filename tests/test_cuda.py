"""What a GPU computes is what the CPU computes, and it does not wait for the CPU where it need not.

Each check is a function of a device:

    on_gpu      all of them, in full: this is what counts, and what tools.gpu runs
    on_cpu      the same in small with the CPU as the device, so that the checks' own code is known
                to work: there different ways to compute the same thing are compared. Left out are
                the waits of samplers, as nothing waits for a CPU; long texts; and of what needs a
                compiler, whose front end alone runs there, all but one of each kind
    on_pretend  in a process of test_pretend.py, on a device that keeps a GPU's rules (pretend.py):
                all but compiled code, bfloat16 blocks, runs that are stopped, long texts, and
                positions of one kind only

Tolerances. Distances are 2-norms, relative to what is expected. float32: sums in another order give
3e-7, and products in TF32 (tried by rounding) 3e-4; SAME is between. bfloat16 keeps 8 bits, which
gives about 1e-2: a device may be ROUGHER times as far from float32 as the CPU is in bfloat16. No
false alarm but by a GPU's other rounding; of the chi-square tests, whose seeds are fixed for each
device, one in a million on a new one.
"""
import contextlib
import copy
import functools
import math
import re

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
import common
import model as model_module
import pretend
import train
from cache import Reading, decode, generate
from data import checkpoints, processes
from data.cost import counted_calls
from diffusion import categorical, make_reading, nelbo, sample, span
from distill import sdtt_loss
from exact import nll_in_order, sample_exact
from helpers import NANO, call, make_dataset
from model import ModelConfig, Transformer, nll, sees_in_order, see_sequence, shifted
from test_processes import distil_on_the_way, together
from tools import compiled_ar, fast_models, machine, static
from toy import Model, Ordered, all_sequences, ancestral_law, chi_square, count, exact_model, joint

SAME = 1e-4
ROUGHER = 4
LIMIT = 1e-6                     # a chi-square test fails below this chance
KINDS = ["full", "causal", "reveal"]
# sizes of a model, its batch and text
SMALL = dict(vocab=29, context=24, layers=2, heads=2, width=32)
LARGE = dict(vocab=1000, context=96, layers=2, heads=2, width=128)
BATCH = 4

DEVICES = ["on_cpu", "on_gpu"]
if hasattr(torch, pretend.NAME):         # set up, as in test_pretend.py's process
    DEVICES.append("on_pretend")


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """The device of a check; and on a CPU the compiler's front end alone, which is quick."""
    torch.manual_seed(0)
    if request.param == "on_gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        yield processes.start("cuda").device            # as the scripts set it up
        return
    in_full = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(in_full, backend="eager"))
    if request.param == "on_cpu":
        yield torch.device("cpu")
        return
    with pretend.GPU():
        yield torch.device(pretend.NAME, 0)


def compiler_for(device, enough=True):
    """A compiler that has seen nothing yet. Skips the check where there is none, and on a CPU,
    where tracing takes seconds, unless this one is enough there."""
    if device.type == pretend.NAME:
        pytest.skip("a pretend device has no compiler")
    if device.type == "cpu" and not enough:
        pytest.skip("in small, another one of these is enough")
    torch.compiler.reset()
    counters.clear()


def model_of(device, **options):
    """A model in eval mode on the CPU, all of whose weights are random and matter."""
    sizes = LARGE if device.type == "cuda" else SMALL
    model = Transformer(ModelConfig(**(sizes | options))).eval()
    with torch.no_grad():
        for w in model.parameters():
            w.normal_(std=1.2 / model.config.width ** 0.5)
    return model


def at_work(model, device, bf16=False, compiled=False):
    """A copy of a model on the device, as train.py prepares it."""
    config = train.TrainConfig(bf16=bf16, compile=compiled)
    return train.prepare_model(copy.deepcopy(model), config, processes.Processes(device))


def texts(model):
    return torch.randint(model.config.vocab, (BATCH, model.config.context))


@torch.no_grad()
def apart(a, b):
    """The distance of a from b, relative to b; infinite where something is not finite."""
    if not bool(a.isfinite().all()):
        return torch.inf
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def noise_of_the_cpu():
    """Inside, uniform noise comes from the CPU's generator, for all devices the same."""
    usual = torch.rand

    def rand(*size, device=None, **options):
        return usual(*size, **options).to(device or "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        yield


# ---- the same numbers

def cached(model, z, order):
    """Logits (B, M, V) at the second half of the slots, read with a cache in two calls. z (B, L);
    order (B, L): the positions of the slots, on the CPU. Of a causal model all tokens are read, of
    one with attention "reveal" those of the first half, and then masks."""
    B, L = z.shape
    cache, half, quarter = model.cache(B, L), L // 2, L // 4

    def slots(begin, end):
        return span(torch.full((B,), begin), torch.full((B,), end))
    if model.config.causal:
        for slot, valid in (slots(0, half), slots(half, L)):
            ids = z.gather(1, slot.to(z.device))
            h = model.read(cache, Reading(ids, slot, slot, slot, valid))
        return model.head(h).view(B, L - half, -1)
    x = z.gather(1, order.to(z.device))                              # by slot
    for tokens, masks in ((slots(0, quarter), slots(0, 0)), (slots(quarter, half), slots(half, L))):
        known = torch.full((B,), half)
        new = make_reading(model, x, order, tokens, masks,
                           known[:, None].expand_as(masks.slot), place=masks.slot)
        h = model.read(cache, new)
    return model.head(h).view(B, L - half, -1)


def losses_of(model, teacher, dt):
    """{name: loss(x, keep=...)} of all objectives that a model may have."""
    mask_id = model.mask_id
    if model.config.causal:
        return {"ar": functools.partial(train.ar_loss, model, mask_id=mask_id)}
    return {"mdlm": functools.partial(nelbo, model, mask_id=mask_id),
            "sdtt": functools.partial(sdtt_loss, model, teacher=teacher, leap=(dt, 2),
                                      kind="kld", mask_id=mask_id)}


def outputs(model, teacher, x, dt):
    """{name: numbers} that a model computes from texts x (B, L), on the CPU; the noise is the same
    whatever the device. Where the model knows places, losses are of texts that begin with prompts.
    dt: of SDTT's teacher."""
    device, results = x.device, {}
    B, L = x.shape
    torch.manual_seed(1)
    order = torch.rand(B, L).argsort(1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(L).expand(B, L)).to(device)
    z = x
    if not model.config.causal:
        z = torch.where(rank < L // 2, x, model.mask_id)
    # the positions of the second half of the slots
    row, pos = torch.arange(B, device=device)[:, None], order[:, L // 2:].to(device)
    if model.config.causal:
        pos = torch.arange(L // 2, L, device=device).expand(B, -1)
    with torch.no_grad():
        results["forward"] = model(z, rank=rank)
        results["there"] = results["forward"][row, pos]
        if not model.config.causal:
            results["chosen positions"] = model.head(model.hidden(z, at=(row, pos), rank=rank))
        if model.config.attention != "full":
            results["cached"] = cached(model, z, order)
        if model.config.attention == "reveal":
            results["likelihood"] = nll_in_order(model, x, model.mask_id, order)
    keep = None
    if model.config.positions == "both":
        prompts = torch.arange(B, device=device)[:, None]            # of 0, 1, ... tokens
        keep = torch.arange(L, device=device) < prompts
    for name, loss in losses_of(model, teacher, dt).items():
        torch.manual_seed(2)
        with noise_of_the_cpu():
            value = loss(x, keep=keep)
        model.zero_grad()
        value.backward()
        results[name] = value.detach()
        results[f"{name}, gradient"] = torch.cat([w.grad.flatten() for w in model.parameters()])
    return {name: value.float().cpu() for name, value in results.items()}


def compare(device, compiled, **options):
    """The device's outputs with the CPU's, in both precisions."""
    model, teacher = model_of(device, **options), model_of(device, **options).requires_grad_(False)
    x, cpu = texts(model), torch.device("cpu")

    def all_outputs(where, bf16, dt, compiled=False):
        student = at_work(model, where, bf16, compiled)
        return outputs(student, at_work(teacher, where, bf16, compiled), x.to(where), dt)

    expected = all_outputs(cpu, False, dt=0.2)
    got = all_outputs(device, False, 0.2, compiled)
    for name, value in got.items():
        assert apart(value, expected[name]) < SAME, name
        if name in ("chosen positions", "cached"):
            assert apart(value, expected["there"]) < SAME, name
    # a pretend device has no bfloat16, and on a CPU tracing takes seconds
    if device.type == pretend.NAME or (compiled and device.type == "cpu"):
        return
    # dt = 0: the teacher draws nothing. One other token would be another loss
    expected, rounded = all_outputs(cpu, False, dt=0.0), all_outputs(cpu, True, dt=0.0)
    got = all_outputs(device, True, 0.0, compiled)
    for name, value in got.items():
        # a single number may be right by chance
        usual = max(2 ** -8, apart(rounded[name], expected[name]))
        assert apart(value, expected[name]) < ROUGHER * usual, name


@pytest.mark.parametrize("positions", ["rope", "learned", "both"])
@pytest.mark.parametrize("attention", KINDS)
def test_device_computes_what_the_cpu_computes(device, attention, positions):
    """Whole sequences, chosen positions, cached reading, the likelihood in an order; losses and
    gradients."""
    if device.type == pretend.NAME and positions != "both":
        pytest.skip("both are enough for the rules of a device")
    compare(device, False, attention=attention, positions=positions)


@pytest.mark.parametrize("attention", KINDS)
def test_compiled_blocks_compute_what_plain_ones_on_the_cpu_compute(device, attention):
    """The same with compiled blocks, for positions of both kinds at once."""
    compiler_for(device, attention == "causal")
    compare(device, True, attention=attention, positions="both")


@pytest.mark.parametrize("L", [64, 192, 704, 1024])
def test_masked_attention_is_that_of_the_plain_kernel(device, L):
    """In the order of reveal, forward and backward, against PyTorch's plain kernel in float32. Also
    where a token that sees nothing but itself likes that little (opposed: its score is -8, -80),
    which gives NaN in some kernels. float32: 1e-3, as scores are up to 100; bfloat16: 3e-2."""
    if L > 192 and device.type != "cuda":
        pytest.skip("too long for a quick test")
    H, D = 2, 64
    idx, rank = torch.randint(2, (2, L)), torch.rand(2, L)           # id 1 is the mask
    mask = sees_in_order(idx, rank, 1)

    def attention(q, k, v, g, mask):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        y = see_sequence(*leaves, mask)
        return [x.float().cpu() for x in (y, *torch.autograd.grad(y, leaves, g))]
    for dtype, near in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        for opposed in (0, 1, 10):
            q, k, v, g = torch.randn(4, 2, L, H, D)
            k = k - opposed * q
            parts = [x.to(dtype) for x in (q, k, v, g)]
            got = attention(*[x.to(device) for x in parts], mask.to(device))
            with sdpa_kernel(SDPBackend.MATH):
                expected = attention(*[x.float() for x in parts], mask)
            for a, b in zip(got, expected):
                assert a.isfinite().all()
                assert apart(a, b) < near


def constant(value, *size, device=None, **options):
    """torch.rand of a generator that always draws the same."""
    return torch.empty(*size).fill_(value).to(device or "cpu")


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_in_which_nothing_is_masked_or_revealed_give_zero(device, monkeypatch, compiled):
    """Noise that masks nothing: both losses are 0, and so are the gradients. Then masks of which
    the teacher's first step reveals none: the loss of a student that is its teacher is 0. Exact,
    but the last to 1e-5: two softmaxes."""
    if compiled:
        compiler_for(device, enough=False)
    for attention in ("full", "reveal"):
        model = at_work(model_of(device, attention=attention), device, compiled=compiled)
        teacher = at_work(model, device, compiled=compiled).requires_grad_(False)
        x = texts(model).to(device)
        for dt, drawn in ((0.1, 0.999), (0.0, 0.5)):
            for name, loss in losses_of(model, teacher, dt).items():
                model.zero_grad()
                with monkeypatch.context() as patch:
                    patch.setattr(torch, "rand", functools.partial(constant, drawn))
                    value = loss(x)
                value.backward()
                value = float(value.detach())
                norm = float(sum(w.grad.abs().sum() for w in model.parameters()
                                 if w.grad is not None))
                assert math.isfinite(norm), name
                if drawn == 0.999:
                    assert value == 0 and norm == 0, name
                elif name == "sdtt":
                    assert abs(value) < 1e-5


# ---- waiting

def forbid_waits(device, forbidden):
    """Whether it is an error from now on that the CPU waits for the device."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
    if device.type == pretend.NAME:
        pretend.Device.now.forbidden = forbidden


def waits_of(run, device):
    """How often the CPU waits for the device in run()."""
    if device.type == pretend.NAME:
        gpu = pretend.Device.now
        gpu.waits.clear()
        run()
        return gpu.waits.total()
    return sum(machine.host_waits(run, device).values())


def compiled_as_in_bench(device, step):
    """cache.decode or compiled_ar.decode_and_draw, as bench.py compiles it on a GPU."""
    if device.type == "cuda":
        return fast_models.compiled_decode(device, BATCH, step)
    return torch.compile(step, fullgraph=True, backend="eager")


@pytest.mark.parametrize("compiled", [False, True])
def test_cpu_does_not_wait_while_ar_decodes(device, monkeypatch, compiled):
    """From the first draw to the last: only before, when masks are sent, and at the end, where NaN
    is looked for, it may. Compiled, where a step draws: in the third run, when all is recorded. On
    a CPU nothing waits, and the number of draws alone is checked."""
    usual, runs = categorical, [True]                    # whether it must not wait
    if compiled:
        compiler_for(device, enough=False)
        usual = compiled_as_in_bench(device, compiled_ar.decode_and_draw)
        runs = [False, False, True]
    model = at_work(model_of(device, attention="causal"), device)
    L, drawn = model.config.context, []
    for last in runs:
        def draw(*args, **more):
            drawn.append(1)
            if len(drawn) == 1:
                forbid_waits(device, last)
            ids = usual(*args, **more)
            if len(drawn) == L:
                forbid_waits(device, False)
            return ids
        drawn.clear()
        monkeypatch.setattr(bench, "ARSampler", functools.partial(
            compiled_ar.ARSampler, compiler=lambda *args: draw))
        monkeypatch.setattr(bench, "categorical", draw)
        try:
            bench.ar_engine(model, BATCH, L, None, compiled)()
        finally:
            forbid_waits(device, False)
        assert len(drawn) == L


@pytest.mark.parametrize("name, begin, a_call", [("full", 2, 0), ("cached", 2, 0), ("exact", 3, 3)])
def test_the_cpu_waits_for_samplers_at_their_ends_only(device, name, begin, a_call):
    """Diffusion in steps knows its plan beforehand: the CPU reads once which tokens are masks, and at
    the end whether one is left. Exact sampling must see in each call which guesses have changed:
    three times. No more than that."""
    if device.type == "cpu":
        pytest.skip("nothing waits for a CPU")
    model = at_work(model_of(device, attention="full" if name == "full" else "reveal"), device)
    z = torch.full((BATCH, model.config.context), model.mask_id, device=device)

    def run():
        if name == "exact":
            return sample_exact(model, z, model.mask_id)
        return sample(model, z, 8, model.mask_id)
    with counted_calls(model) as calls:
        waits = waits_of(run, device)
    assert 0 < waits <= begin + a_call * len(calls)


@pytest.mark.parametrize("attention", ["full", "reveal"])
@pytest.mark.parametrize("name, most", [("nelbo", 1), ("sdtt", 3)])
def test_the_cpu_waits_once_for_each_set_of_masks_in_a_training_step(device, attention, name, most):
    """To learn how many masks there are: those of z_t, in SDTT also those that the teacher's first
    step reveals, and the rest. Loss and gradient wait no more. No chance in it."""
    if device.type == "cpu":
        pytest.skip("nothing waits for a CPU")
    plain = model_of(device, attention=attention)
    model, x = at_work(plain, device), texts(plain).to(device)
    teacher = at_work(plain, device).eval().requires_grad_(False)

    def run():
        if name == "nelbo":
            loss = nelbo(model, x, model.mask_id)
        else:
            loss = sdtt_loss(model, x, teacher, (1 / 8, 2), "kld", model.mask_id)
        loss.backward()
    run()
    assert 0 < waits_of(run, device) <= most


# ---- compiled code

FORMS = ["float32", "bfloat16 blocks", "bfloat16 weights"]


@pytest.mark.parametrize("form", FORMS)
def test_compiled_decoding_gives_the_logits_of_whole_sequences(device, form):
    """AR decoding, plain and compiled, made to draw given texts: the logits of each step, in the
    third run, are those of one forward pass on the CPU. On a GPU the steps are CUDA graphs, none of
    which is skipped."""
    compiler_for(device, form == "bfloat16 blocks")
    plain, cpu = model_of(device, attention="causal"), torch.device("cpu")
    x, start = texts(plain), plain.mask_id

    def prepared(where):
        if form == "bfloat16 weights":
            return fast_models.prepare(copy.deepcopy(plain), "bfloat16", False, where)
        return at_work(plain, where, form == "bfloat16 blocks").requires_grad_(False)

    def whole(model):
        return model(shifted(x, start))                              # (B, L, V)
    expected = whole(plain).detach()
    near = SAME
    if form != "float32":
        near = ROUGHER * apart(whole(prepared(cpu)).detach(), expected)
    model, logits = prepared(device), []

    def draw(one):
        logits.append(one.cpu())
        return x[:, len(logits) - 1].to(device)
    L, cache = x.shape[1], model.cache(BATCH, x.shape[1])
    for stored in cache.k + cache.v:
        torch._dynamo.mark_static_address(stored)
    prompt = torch.zeros((BATCH, 0), dtype=torch.long, device=device)
    for step in (decode, compiled_as_in_bench(device, decode)):
        run = functools.partial(generate, model, prompt, L, draw, step, 16, cache)
        for _ in range(3):
            logits.clear()
            run()
        assert apart(torch.stack(logits, 1), expected) < near
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("attention", ["full", "reveal"])
def test_compiled_steps_of_few_shapes_draw_the_texts_of_sample(device, attention):
    """The likeliest tokens, in the third run (on a GPU a CUDA graph by then), against diffusion.sample
    on the CPU from the same plans. Random weights, without ties. No chance involved."""
    compiler_for(device)
    plain = model_of(device, attention=attention)
    model, L = at_work(plain, device), plain.config.context
    backend = "inductor" if device.type == "cuda" else "eager"

    def likeliest(logits, u=None):
        return logits.argmax(-1)
    sampler = static.StaticSampler(model, BATCH, L, 5, likeliest, backend)
    for seed in range(3):
        torch.manual_seed(seed)
        drawn = sampler().cpu()
    torch.manual_seed(2)
    z = torch.full((BATCH, L), plain.mask_id)
    assert torch.equal(drawn, sample(plain.cpu(), z, 5, plain.mask_id, likeliest))


def test_few_graphs_are_compiled_in_50_steps_of_sdtt(device):
    """Student and teacher, compiled: batches differ in how many tokens are masked and revealed. On
    a GPU all have the same shape; on a CPU, in 10 steps, rows of which nothing is wanted are
    dropped, see diffusion.states_at, and no more than 8 graphs, the compiler's limit, may come of
    that."""
    compiler_for(device)
    model = at_work(model_of(device, layers=1), device, compiled=True)
    teacher = at_work(model, device, compiled=True).requires_grad_(False)
    loss = losses_of(model, teacher, dt=1 / 64)["sdtt"]
    for _ in range(50 if device.type == "cuda" else 10):
        loss(texts(model).to(device)).backward()
    assert 0 < counters["stats"]["unique_graphs"] <= (4 if device.type == "cuda" else 8)


# ---- laws

def test_draws_of_50257_tokens_have_their_law(device):
    """Of a law like natural text's, token i of probability 1 / (i H), in 40 bins of about equal
    probability. Chi-square."""
    V, rows, times = 50257, 32, 30
    if device.type == "cuda":
        rows, times = 512, 100           # so many rows has draw_tokens there
    p = 1 / torch.arange(1, V + 1).double()
    p /= p.sum()
    place = ((p.cumsum(0) - p / 2) * 40).long()                      # (V,) the bin of a token
    logits = p.log().float().expand(rows, V).to(device)
    counts = torch.zeros(40)
    for _ in range(times):
        counts += torch.bincount(place[categorical(logits).cpu()], minlength=40)
    assert chi_square(counts, torch.zeros(40).double().scatter_add_(0, place, p)) > LIMIT


class Posterior(Ordered):
    """The perfect model of a joint law, in the form that cached and exact sampling ask for, with
    its states on a device."""

    def __init__(self, p, device, causal=False):
        super().__init__(p.shape[0], causal)
        self.exact, self.device = exact_model(p), device
        self.L = p.dim()

    def conditional(self, pos, known):
        key = pos, frozenset(known)
        if key not in self.table:
            z = torch.full((1, self.L), self.V)
            for place, token in known:
                z[0, place] = token
            self.table[key] = self.exact(z)[0, pos]
        return self.table[key]

    def read(self, cache, new):
        return super().read(cache, new).to(self.device)


@pytest.mark.parametrize("name", ["full", "cached", "exact", "exact AR"])
def test_samplers_have_their_law(device, name):
    """3,000 texts of 3 positions and 3 tokens, from the perfect model of a law, in 2 steps or
    exact, against their probabilities by enumeration. Chi-square."""
    p = joint(3, 3, seed=3)
    z = torch.full((3000, 3), 3, device=device)
    if name == "full":
        perfect = exact_model(p)
        model = Model(lambda z, at: perfect.f(z.cpu(), at.cpu()).to(device))
    else:
        model = Posterior(p, device, causal=name == "exact AR")
    if name.startswith("exact"):
        x, law = sample_exact(model, z, 3)[0], p
    else:
        x, law = sample(model, z, 2, 3), ancestral_law(p, 2)
    assert chi_square(count(x.cpu(), 3), law) > LIMIT


def test_ar_texts_have_the_law_of_the_likelihood(device):
    """4,000 texts of 3 positions and 3 tokens, of a network, against exp(-nll) on the CPU.
    Chi-square."""
    plain = model_of(device, attention="causal", vocab=3, context=3)
    law = (-nll(plain, all_sequences(3, 3)).sum(1)).double().exp()
    model = at_work(plain, device)
    x = generate(model, torch.zeros((4000, 0), dtype=torch.long, device=device), 3, categorical)
    assert chi_square(count(x.cpu(), 3), law) > LIMIT


# ---- training

class Texts:
    """Random texts in place of a dataset."""

    def __init__(self, vocab):
        self.vocab = vocab

    def batch(self, split, size, context, device):
        return torch.randint(self.vocab, (size, context)).to(device), None


def test_validation_leaves_the_generators_alone(device):
    """Its value is the same each time, whatever was drawn before, and what is drawn next is not
    changed by it. Exact."""
    model = at_work(model_of(device), device).requires_grad_(False)
    loss, config = functools.partial(nelbo, mask_id=model.mask_id), train.TrainConfig()
    values, after = [], []
    for seed, validates in ((0, True), (1, True), (1, False)):
        common.seed_all(seed)
        torch.rand(3, device=device)
        if validates:
            values.append(train.validate(model, loss, Texts(model.config.vocab), config))
        after.append((torch.rand(4), torch.rand(4, device=device).cpu()))
    assert values[0] == values[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(after[1], after[2]))
    assert not torch.equal(after[0][1], after[1][1])


def test_run_that_is_stopped_goes_on_to_the_same_weights(device, monkeypatch, tmp_path):
    """6 steps of train.py at once, and stopped in the fifth, after a checkpoint of the third. On a
    CPU the weights are equal bit for bit (test_stopping.py); a GPU may add up in another order: to
    a tenth of what the last three steps change. With other noise they would be as far apart as
    that."""
    if device.type == pretend.NAME:
        pytest.skip("test_devices.py trains on such a device")
    monkeypatch.setitem(model_module.PRESETS, "nano", NANO)
    argv = ["--dataset", make_dataset(tmp_path / "data"), "--steps", 6, "--save_every", 3,
            "--warmup", 1, "--batch", 8, "--optimizer", "adamw", "--dropout", 0.1, "--no-compile",
            "--device", device.type]
    update, calls = train.ema_update, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        update(*args)

    def weights(name):
        content = checkpoints.load_checkpoint(tmp_path / name / "teacher.pt")
        return torch.cat([w.flatten() for w in content["model"].values()])
    call(train, *argv, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "ema_update", stop)
        call(train, *argv, "--out", tmp_path / "stopped")
    third = weights("stopped")
    call(train, *argv, "--out", tmp_path / "stopped")
    assert apart(weights("stopped") - third, weights("whole") - third) < 0.1


def test_processes_on_two_gpus_distil_from_one_teacher(device, tmp_path):
    """Judge and teacher are trained on the way: in each round both processes hold one teacher, bit
    for bit. (On the CPU: test_processes.py.)"""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    outputs = together(2, tmp_path, distil_on_the_way, [
        "--dataset", str(make_dataset(tmp_path / "data")), "--out", str(tmp_path / "out"),
        "--rounds", "2", "--teacher_steps", "8", "--steps_per_round", "2", "--samples", "2",
        "--batch", "6", "--micro_batch", "3", "--device", "cuda", "--no-compile"])
    held = [re.findall("^teachers of round.*", output, re.M) for output in outputs]
    assert held[0] == held[1] and len(held[0]) == 2
