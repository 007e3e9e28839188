"""The papers' sampler as they write it: diffusion-naive of bench.py, and --joint and
--precision of tools.evaluate.
"""
from dataclasses import dataclass

import torch

import diffusion
from cache import NOT_FINITE
from data.devices import float64_device
from diffusion import draw_from, sharpen
from sample import Sampling, with_masks_behind


@torch.no_grad()
def sample_joint(model, z, steps, mask_id, dtype=torch.float64, temperature=1.0):
    """Ancestral sampling as MDLM and SDTT write it, z (B, L) -> ids (B, L): in each step
    logits everywhere, and one draw from {V tokens, stay masked} by Gumbel noise. The same
    distribution as diffusion.sample's, and the yardstick of its speed. In float32, as
    public code has it, uniform draws are at most 1 - 2^-24, so Gumbel noise is at most
    16.6, and a token whose chance in a step is below e^-16.6 = 6e-8 is hardly ever drawn
    (arXiv 2409.02908)."""
    for i in range(steps):
        # the step from t to s, the share that is masked at t, and at s
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        times = torch.tensor([t, s], dtype=torch.float64)
        masked_t, masked_s = diffusion.mask_share(times).tolist()
        # what the network says, everywhere
        logits = sharpen(model(z), temperature)                      # (B, L, V)
        p = logits.to(float64_device(z.device)).to(dtype).softmax(-1)
        if bool(p.isnan().any()):
            raise FloatingPointError(NOT_FINITE)
        # reveal_share(t, s) is shared out among the tokens, the rest stays masked
        token = p * (masked_t - masked_s) / masked_t                 # (B, L, V)
        stay = torch.full_like(p[..., :1], masked_s / masked_t)      # (B, L, 1)
        joint = torch.cat((token, stay), dim=-1)                     # (B, L, V + 1)
        # one draw: the largest of log p plus Gumbel noise; V, the mask's id, means to stay
        gumbel = -(-torch.rand_like(joint).log()).log()
        choice = (joint.log() + gumbel).argmax(-1).to(z.device)      # (B, L)
        z = torch.where(z == mask_id, choice, z)
    return z


@dataclass
class PublicSampling(Sampling):
    """A Sampling that can draw as the field's public code does. precision: bits of a token
    draw, 32 or 64; joint: in steps, by sample_joint (which ignores top_p and order)."""
    precision: int = 64
    joint: bool = False

    def draw(self, logits):
        """See Sampling.draw."""
        if self.precision == 64:
            return super().draw(logits)
        logits = self.adjust(logits)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        # where diffusion.categorical draws, so that the random numbers are the same ones
        return draw_from(weights.to(float64_device(logits.device))).to(logits.device)

    def write(self, model, known):
        """See Sampling.write."""
        if not self.joint or model.config.causal:
            return super().write(model, known)
        z = with_masks_behind(model, known, self.length)
        dtype = {32: torch.float32, 64: torch.float64}[self.precision]
        x = sample_joint(model, z, self.steps, model.mask_id, dtype, self.temperature)
        return x, None
