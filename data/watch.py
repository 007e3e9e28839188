"""What watches a training run: against numbers that are not finite, and for its speed."""
import math
import time

import torch
import torch.distributed as dist

from data.checkpoints import finite
from data.files import UserError


class Guard:
    """Stops a run when its loss, gradient or weights become NaN or infinite, before they
    are saved."""

    def __init__(self, config, procs, run):
        self.config, self.procs, self.run = config, procs, run
        # the number of the first step that was not finite; 0: none yet
        self.bad_step = torch.zeros((), device=procs.device)

    def record(self, loss, norm):
        """Remember the present step if its loss or the norm of its gradient, two scalars,
        is not finite."""
        fine = loss.isfinite() & norm.isfinite()     # a scalar, on the device
        newly_bad = ~fine & (self.bad_step == 0)
        # torch.where, because an if would wait for a GPU
        self.bad_step = torch.where(newly_bad, self.run.step + 1, self.bad_step)

    def check_losses(self):
        """Raises UserError, in all processes, if any of them has recorded a bad step."""
        bad = self.bad_step
        # of several processes, all learn of it
        if self.procs.world > 1:
            bad = bad.clone()
            dist.all_reduce(bad, dist.ReduceOp.MAX)  # 0 only if it is 0 everywhere
        if not bad:                                  # on a GPU this waits for it
            return
        # a sentence that says what is left, and what may help
        config, path = self.config, self.run.path
        kept = "no checkpoint was written yet"
        if path.exists():
            kept = f"{path} is as it was saved last"
        clip = "" if config.clip else ", or with --clip 1"
        raise UserError(f"{path.stem}: the loss or its gradient is no finite number at "
                        f"step {int(bad)} of {self.run.steps}; {kept}; begin anew in "
                        f"another --out with a lower --lr (it is {config.lr:g}) or a "
                        f"longer --warmup{clip}")

    def check_validation(self, value):
        """Call it after a step: this step, too, is bad if the weights or the validation
        loss `value` have become NaN or infinite."""
        if not (math.isfinite(value) and finite(self.run.model)):
            self.bad_step.fill_(self.run.step)       # the step is done by now
        self.check_losses()


class Clock:
    """The seconds that a run takes, over all its continuations, and its speed."""

    def __init__(self, config, run):
        self.run, self.first_step, self.spent = run, run.step, run.seconds
        # a step reads so many tokens
        self.tokens = config.batch * run.model.config.context
        self.began = time.time()

    def tick(self):
        """Put the time up to now into run.seconds; returns tokens per second."""
        seconds = time.time() - self.began                           # of this continuation
        self.run.seconds = self.spent + seconds                      # of all of them
        return (self.run.step - self.first_step) * self.tokens / seconds
