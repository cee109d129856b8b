"""The training loop that both recipes share: stateless randomness, warm-up, constant rate, linear cool-down."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmsa import distributed
from dmsa.files import write_atomically

Recipe = tuple[nn.ModuleDict, Callable[[int, torch.Generator], dict[str, Tensor]], Callable[[int], None]]
"""What is trained; step number and generator → figures, `loss` among them; what follows a step."""
WARMUP = 200
"""Steps of linear warm-up, or a tenth of the training where that is less."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one step: resuming needs no generator state."""
    return torch.Generator().manual_seed((seed << 32) + step)


def learning_rate(step: int, steps: int, peak: float, cooldown: float) -> float:
    """Warm-up, plateau at ``peak``, then linearly towards zero over the last ``cooldown`` share of the steps."""
    warmup = max(min(WARMUP, steps // 10), 1)
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / max(cooldown * steps, 1))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and kernels, none for biases, norms, tokens and positions."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    free = [p for name, p in named if p.ndim < 2 or "pos_embed" in name or "cls_token" in name]
    free_ids = {id(p) for p in free}
    decayed = [p for _, p in named if id(p) not in free_ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def run(
    modules: nn.ModuleDict,
    loss_of_step: Callable[[int, torch.Generator], dict[str, Tensor]],
    after_step: Callable[[int], None],
    *,
    out: Path,
    steps: int,
    lr: float,
    weight_decay: float,
    cooldown: float,
    seed: int,
    settings: dict,
    checkpoint_minutes: float,
    log_every: int,
    stop_after: int | None = None,
) -> Iterator[dict[str, float]]:
    """Train ``modules``, resuming from ``out/last.pt``; yields the logged figures.

    Args:
        modules: Everything with parameters or buffers; what requires gradients is optimised (AdamW, clipped to 1).
        loss_of_step: Step number and generator → figures, ``"loss"`` among them.
        after_step: Called after each update with the step's number.
        out: Run folder.
        steps: Length of the training in optimiser steps.
        lr: Peak learning rate.
        weight_decay: For matrices and kernels.
        cooldown: Share of the training with a falling rate.
        seed: Seed of the steps' generators.
        settings: What a checkpoint must agree with; the length of the training may differ.
        checkpoint_minutes: Time between checkpoints.
        log_every: Steps between log lines.
        stop_after: Leave after this many steps in this process, with a checkpoint, as if interrupted.

    Raises:
        ValueError: The checkpoint was made with other settings (they are listed).
    """
    optimiser = torch.optim.AdamW(parameter_groups(modules, weight_decay), lr=lr, betas=(0.9, 0.98))
    step = 0
    last = out / "last.pt"
    state = distributed.on_main(lambda: _read(last, settings))
    if state is not None:
        modules.load_state_dict(state["modules"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]

    def checkpoint() -> None:
        state = {"modules": modules.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
        state["settings"] = settings
        write_atomically(last, lambda stream: torch.save(state, stream))

    parameters = [p for p in modules.parameters() if p.requires_grad]
    began = saved = time.monotonic()
    first = step
    with (out / "metrics.jsonl" if distributed.is_main() else Path(os.devnull)).open("a", encoding="utf-8") as log:
        while step < steps and (stop_after is None or step - first < stop_after):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, lr, cooldown)
            figures = loss_of_step(step, step_generator(seed, step))
            optimiser.zero_grad(set_to_none=True)
            figures["loss"].backward()
            distributed.average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            after_step(step)
            step += 1
            if step % log_every == 0 or step == steps:
                values = {name: round(value.item(), 4) for name, value in figures.items()}
                if not torch.isfinite(figures["loss"]):
                    raise FloatingPointError(f"the loss is {values['loss']} at step {step}; lower the learning rate")
                elapsed = time.monotonic() - began
                values |= {"step": step, "lr": optimiser.param_groups[0]["lr"], "seconds": round(elapsed, 1)}
                values["steps_per_second"] = round((step - first) / elapsed, 3)
                log.write(json.dumps(values) + "\n")
                log.flush()
                yield values
            if distributed.is_main() and time.monotonic() - saved > 60 * checkpoint_minutes:
                checkpoint()
                saved = time.monotonic()
    distributed.on_main(checkpoint)


def _read(path: Path, settings: dict) -> dict[str, Any] | None:
    """Return the checkpoint at `path`, None if there is none; it must have been made with `settings`."""
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    differing = {k: (state["settings"].get(k), v) for k, v in settings.items() if state["settings"].get(k) != v}
    if differing:
        raise ValueError(
            f"{path} was made with other settings (there, here): {differing}; choose another `out` or remove it"
        )
    return state
