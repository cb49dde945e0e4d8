"""One stage of training: weights, their moving average, the optimiser, and the time it has had.

Called by the two training stages. A stage can be saved after any step and resumed exactly, by any number of ranks.
The learning rate follows the share of the planned seconds that has passed, so a stage that is cut into
several runs ends as it would have in one.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from demo.ranks import ALONE, Ranks

WARM_UP_STEPS = 300


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, which replaces the former one at once."""
    partial = path.with_suffix(".partial")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
    partial.replace(path)


class Stage:
    """Trains `modules` for `planned_s` seconds in all, together with the stages of the other ranks.

    All ranks start from equal weights and update at the same times; each draws batches of its own.
    """

    def __init__(
        self,
        modules: nn.ModuleDict,
        *,
        peak_lr: float,
        ema_decay: float,
        planned_s: float,
        warm_up_steps: int = WARM_UP_STEPS,
        ranks: Ranks = ALONE,
    ) -> None:
        self.modules = modules
        self.peak_lr = peak_lr
        self.ema_decay = ema_decay
        self.planned_s = planned_s
        self.warm_up_steps = warm_up_steps
        self.ranks = ranks
        self.step = 0
        self.seconds = 0.0
        self._begun_s = self._before_s = self._ends_s = 0.0
        self._compiles = False
        self.params = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        decayed = [p for p in self.params.values() if p.ndim >= 2]
        plain = [p for p in self.params.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        fused = next(iter(self.params.values())).is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=fused)

    @property
    def finished(self) -> bool:
        return self.seconds >= self.planned_s

    def begin(self, run_s: float) -> None:
        """Start the clock of a run of so many seconds at most."""
        self._begun_s, self._before_s, self._ends_s = time.monotonic(), self.seconds, self.seconds + run_s
        self._compiles = True

    @property
    def goes_on(self) -> bool:
        """Whether neither the plan nor the run is at its end, by the last `count_time`."""
        return not self.finished and self.seconds < self._ends_s

    def count_time(self) -> None:
        """Take the time up to now, rank 0's; call it when the device has done what it was given.

        All ranks call it at the same steps, and so end at the same one.
        """
        self.seconds = self.ranks.first(self._before_s + time.monotonic() - self._begun_s)

    def learning_rate(self) -> float:
        """Linear warm-up, a constant half, then a cosine down to a fiftieth."""
        warm = min(1.0, (self.step + 1) / self.warm_up_steps)
        fall = max(0.0, min(1.0, (self.seconds / self.planned_s - 0.4) / 0.6))
        return self.peak_lr * warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * fall)))

    def update(self) -> None:
        """Take one optimiser step with the mean of all ranks' gradients, and move the average."""
        self.ranks.average([p.grad for p in self.params.values() if p.grad is not None])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.params.values()], 1.0 - decay)
        if self._compiles:  # A run's first step does: that is time of the run, and none of the plan's.
            self._compiles = False
            self._ends_s -= self.ranks.first(time.monotonic() - self._begun_s)
            self._begun_s = time.monotonic()

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average into the modules; training cannot go on from there."""
        for name, param in self.params.items():
            param.copy_(self.ema[name])

    def save(self, path: Path) -> None:
        """Write everything needed to go on; the file replaces the former one at once."""
        tensors = {f"param/{name}": p.detach() for name, p in self.params.items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.items()}
        for name, param in self.params.items():
            for key, value in self.optimizer.state[param].items():
                tensors[f"{key}/{name}"] = value
        save_tensors(tensors, path, {"step": str(self.step), "seconds": repr(self.seconds)})

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Go on from a saved file of the same modules."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            for name, param in self.params.items():
                param.copy_(file.get_tensor(f"param/{name}"))
                self.ema[name].copy_(file.get_tensor(f"ema/{name}"))
            saved = set(file.keys())
            for name, param in self.params.items():
                if f"exp_avg/{name}" in saved:
                    state = {key: file.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                    counter = state.pop("step")
                    # In the weight's own layout: the fused optimiser takes no other.
                    moments = {key: torch.empty_like(param).copy_(value) for key, value in state.items()}
                    fused = bool(self.optimizer.defaults["fused"])
                    self.optimizer.state[param] = {
                        "step": counter.to(param.device) if fused else counter,
                        **moments,
                    }
