"""The loop: micro-steps, optimizer step, controller, metrics, evaluation, checkpoints, stopping."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.save import CheckpointSaver
from dsmoe.config import RunConfig
from dsmoe.errors import CheckpointError, TrainingError
from dsmoe.optim.registry import optimizer_class
from dsmoe.parallel.collectives import sum_over, traffic
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.runtime import supervision
from dsmoe.runtime.device import device_name, on_gpu, peak_memory_bytes
from dsmoe.runtime.phase import phase
from dsmoe.runtime.run_lock import RunLock
from dsmoe.runtime.signals import StopRequest
from dsmoe.runtime.step_timer import step_timer
from dsmoe.training.diagnose import first_bad_tensor
from dsmoe.training.evaluate import evaluate
from dsmoe.training.experts import ExpertLines, LoadScaledUpdates
from dsmoe.training.metrics import MetricsWriter, routing_metrics
from dsmoe.training.progress import TrainingProgress
from dsmoe.training.resume import Position
from dsmoe.training.schedule import learning_rate
from dsmoe.training.trace import StepTracer


class Ending(Enum):
    """Why a run ended."""

    REACHED = "training.steps or training.stop_at"
    SIGNAL = "a signal"


class Trainer:
    """Carries a run from where it is to its end.

    Args:
        stream: `batch(first, count)` gives the samples [first, first + count) as stacked tensors [count, S].
        held: held-out samples.
        bytes_per_token: of the held-out text, or None.
        position: where the run is.
        data: what checkpoints say about the data.
        lock: of the run folder, on rank 0.
    """

    def __init__(
        self, config: RunConfig, engine, groups: ParallelGroups, stream, held, bytes_per_token: float | None,
        position: Position, data: dict[str, Any] | None = None, lock: RunLock | None = None,
    ):  # fmt: skip
        self.config, self.engine, self.groups, self.lock = config, engine, groups, lock
        self.stream, self.held, self.bytes_per_token = stream, held, bytes_per_token
        self.step, self.samples, self.tokens = position.step, position.samples, position.tokens
        self.device = device_name()
        self.micro_batch = config.training.global_batch_size // (groups.dp_size * config.training.gradient_accumulation)
        step = position.step
        self.progress = TrainingProgress(config.training.steps, step, active=groups.dp_rank == 0)
        self.metrics = MetricsWriter(Path(config.logging.run_dir), groups.dp_rank, engine.monitor, step)
        self.expert_lines = ExpertLines(config, engine, groups, step)
        self.scaled_updates = None
        if config.training.expert_lr == "load":
            self.scaled_updates = LoadScaledUpdates(engine, optimizer_class(config.training).batch_exponent)
        self.saver = CheckpointSaver(engine, config, step or None, position.copied_experts, data)

    def run(self) -> tuple[Ending, dict[str, float]]:
        """Train to the end or until a signal. Returns why it ended, and the last evaluation."""
        training = self.config.training
        evaluation: dict[str, float] = {}
        self.engine.train()
        until = min(training.steps, training.stop_at or training.steps)
        with StopRequest() as stop, self.progress:
            while self.step < until:
                line, asked = self._one_step(stop)
                last = self.step == until
                if last or _due(self.step, training.eval_interval):
                    evaluation = self._evaluate()
                    line |= evaluation
                if "val_loss" in line or _due(self.step, self.config.logging.interval):
                    self.metrics.write(line)
                self.progress.update(self.step, line)
                if asked and not last:
                    self.saver.save(self.step, self.samples, self.tokens)
                    self.saver.finish()
                    self.progress.say(f"stopped by a signal at step {self.step}; the same command goes on from here")
                    return Ending.SIGNAL, evaluation
                if last or _due(self.step, self.config.checkpoint.interval):
                    self.saver.save(self.step, self.samples, self.tokens)
            self.saver.finish()
            if not evaluation:  # resumed with nothing left to do
                evaluation = self._evaluate()
            if self.step < training.steps:
                self.progress.say(f"stopped at step {self.step} (training.stop_at); without it the run goes on")
        self.metrics.close()
        self.expert_lines.close()
        return Ending.REACHED, evaluation

    def _one_step(self, stop: StopRequest) -> tuple[dict, bool]:
        """One optimizer step: its metrics, and whether any rank was asked to stop. Its routes, where they are due."""
        with ExitStack() as until_done:
            tracer = None
            if _due(self.step + 1, self.config.logging.trace):
                tracer = until_done.enter_context(StepTracer(self.engine.module.recorder.routers))
            line, asked = self._forward_backward_update(stop, tracer)
        if tracer is not None:
            tracer.write(Path(self.config.logging.run_dir), self.step, self.groups)
        return line, asked

    def _forward_backward_update(self, stop: StopRequest, tracer: StepTracer | None) -> tuple[dict, bool]:
        training = self.config.training
        started = time.perf_counter()
        phase.begin_step(self.step + 1)
        if self.config.logging.timings:
            step_timer.start()
        traffic.take()  # what an evaluation sent is not the step's
        lr = learning_rate(self.step, training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # Language-model loss, router loss, ranks asked to stop, ranks that have written their part of a checkpoint,
        # bytes sent, whether the run folder is lost, and the memory of each rank. In fp64, which is exact for bytes.
        sums = torch.zeros(6 + self.groups.dp_size, dtype=torch.float64, device=self.device)
        for part in range(training.gradient_accumulation):
            batch = self._batch(part)
            if tracer is not None:
                tracer.batch(batch["tokens"])
            loss, parts = self.engine(**batch)
            sums[0] += parts["lm"]
            sums[1] += loss.detach() - parts["lm"]
            with phase.within("backward pass"):
                self.engine.backward(loss)
            if part == training.gradient_accumulation - 1:
                sums[2] += stop.asked
                sums[3] += self.saver.done
                sums[4] += traffic.take()
                sums[5] += self.lock is not None and self.lock.lost
                sums[6 + self.groups.dp_rank] += peak_memory_bytes()
                # Before the optimizer moves: one transfer tells all ranks the same loss and whether to go on.
                lm_loss, router_loss, asked, written, sent, lost, *memory = sum_over(self.groups.dp, sums).tolist()
                self._check_finite(lm_loss + router_loss, "loss", batch)
                if lost:
                    raise TrainingError(f"another run has taken over {self.config.logging.run_dir}; this one ends")
                totals = self.engine.module.recorder.take()
                self.expert_lines.begin(self.step + 1)
                if self.scaled_updates is not None:
                    self.scaled_updates.follow(totals)
            with step_timer.within("optimizer"):
                self.engine.step()
        self.step += 1
        self.samples += training.global_batch_size
        self.tokens += training.global_batch_size * self.config.model.sequence_length
        if written == self.groups.dp_size:
            self.saver.finish()
        grad_norm = float(self.engine.get_global_grad_norm())
        self._check_finite(grad_norm, "gradient norm", batch)
        controller, revival = self.engine.module.controller, self.engine.module.revival
        if controller is not None:
            controller.update(totals)
        revived = {} if revival is None else {"revived_experts": revival.update(totals, self.step)}
        self.expert_lines.end(self.step, self.tokens, totals)
        parts = {"seconds_by_part": step_timer.stop()} if self.config.logging.timings else {}
        seconds = time.perf_counter() - started
        if supervision.current is not None:
            supervision.current.limits.note_step(seconds)
        summed = self.groups.dp_size * training.gradient_accumulation  # forward passes behind the two sums
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": lm_loss / summed,
            "router_loss": router_loss / summed,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": training.global_batch_size * self.config.model.sequence_length / seconds,
            **routing_metrics(totals, self.groups.ep_size),
            "all_to_all_bytes": int(sent),
            "peak_memory_bytes": int(max(memory)),
            "seconds": seconds,
            **parts,
            **revived,
        }
        if controller is not None:
            line |= {name: value.item() for name, value in controller.metrics().items()}
        return line, asked > 0

    def _batch(self, part: int) -> dict[str, torch.Tensor]:
        """This rank's sequences of one micro-step: the step's samples in order, cut by micro-step, then by rank."""
        per_part = self.micro_batch * self.groups.dp_size
        first = self.samples + part * per_part + self.groups.dp_rank * self.micro_batch
        batch = self.stream.batch(first, self.micro_batch)
        rows = {name: batch[name].pin_memory() if on_gpu() else batch[name] for name in ("tokens", "labels")}
        return {name: values.to(self.device, non_blocking=True) for name, values in rows.items()}

    def _check_finite(self, value: float, what: str, batch: dict[str, torch.Tensor]) -> None:
        """Stop all ranks, without a checkpoint, when a number they share is not finite."""
        if math.isfinite(value):
            return
        name = first_bad_tensor(self.engine.module, batch)
        step = self.step + (what == "loss")  # the optimizer has moved by the time it knows the norm
        try:
            self.saver.finish()  # begun when all was well
            saved = f"the last checkpoint (step {self.saver.step}) is untouched"
        except CheckpointError as error:
            saved = str(error)
        raise TrainingError(
            f"the {what} of step {step} is {value}; first tensor that is not finite: {name}; "
            f"{saved if self.saver.step else 'no checkpoint was written yet'}"
        )

    def _evaluate(self) -> dict[str, float]:
        phase.enter("evaluation")
        found = evaluate(self.engine, self.held, self.micro_batch, self.groups, self.bytes_per_token)
        bits = f"  {found['val_bpb']:.3f} bits per byte" if "val_bpb" in found else ""
        self.progress.say(f"step {self.step}  held-out loss {found['val_loss']:.4f}{bits}")
        return found


def _due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens now."""
    return interval > 0 and step % interval == 0
