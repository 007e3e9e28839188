"""What PyTorch could do, too, in less memory or less time: the sum of a loss over the rows
of a head's logits, GELU, and nn.Linear."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class HeadSum(torch.autograd.Function):
    """f(h W^T + b, *rows).sum() over all rows of h (N, C), `size` of them at a time: see
    Transformer.chunked_sum.
    A chunk's logits exist only for a moment. So the gradients of h, W and b are computed
    then, in forward, and wait for backward, which only scales them: nothing is done
    twice."""

    @staticmethod
    def forward(ctx, f, size, h, W, b, *rows):
        need_grad = any(ctx.needs_input_grad[2:5])                   # of h, W, b
        dh = dW = db = None
        if need_grad:
            dh, dW, db = torch.zeros_like(h), torch.zeros_like(W), torch.zeros_like(b)
        total = torch.zeros((), device=h.device)                     # a scalar
        for i in range(0, len(h), size):
            # this chunk's part of the sum
            part = slice(i, i + size)
            # autograd is off in here, so the graph begins at these logits (n, V)
            logits = F.linear(h[part], W, b).requires_grad_(need_grad)
            with torch.set_grad_enabled(need_grad):
                value = f(logits, *[r[part] for r in rows]).sum()
            total += value.detach()
            # and of the gradient
            if need_grad:
                g, = torch.autograd.grad(value, logits)              # (n, V)
                torch.mm(g, W, out=dh[part])
                dW.addmm_(g.T, h[part])
                db += g.sum(0)
        ctx.grads = dh, dW, db
        ctx.rest = [None] * len(rows)                    # rows have no gradient
        return total

    @staticmethod
    def backward(ctx, scale):
        # in place, which saves memory: backward can be called only once
        grads, ctx.grads = ctx.grads, None
        grads = [grad.mul_(scale) for grad in grads]
        return None, None, *grads, *ctx.rest             # f and size have no gradient


def gelu(x):
    """GELU in its tanh form, elementwise."""
    if torch.compiler.is_compiling():
        # the same, since (1 + tanh y) / 2 = sigmoid(2 y): it compiles to faster code
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3))
    return F.gelu(x, approximate="tanh")


class Linear(nn.Linear):
    """nn.Linear that adds its bias in an operation of its own when it is compiled:
    otherwise the bias is first copied to all rows, which on a CPU takes longer than the
    addition."""

    def forward(self, x):
        if torch.compiler.is_compiling() and self.bias is not None:
            y = F.linear(x, self.weight)
            # under autocast y is bfloat16, the bias still float32
            return y + self.bias.to(y.dtype)
        return super().forward(x)
