"""The loop: micro-steps, optimizer step, controller, metrics, evaluation, checkpoints, stopping."""

from __future__ import annotations

import time
from contextlib import ExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.save import CheckpointSaver
from dsmoe.config import RunConfig
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import CheckpointError, TrainingError
from dsmoe.optim.registry import optimizer_class
from dsmoe.parallel.collectives import sum_over, traffic
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers import get
from dsmoe.routers.recorder import RoutingTotals
from dsmoe.runtime import supervision
from dsmoe.runtime.device import device_name, on_gpu, peak_memory_bytes, read_later
from dsmoe.runtime.phase import phase
from dsmoe.runtime.run_lock import RunLock
from dsmoe.runtime.signals import StopRequest
from dsmoe.runtime.step_timer import step_timer
from dsmoe.training.bad_steps import BadSteps, error_of
from dsmoe.training.diagnose import summary
from dsmoe.training.ending import ending
from dsmoe.training.evaluate import evaluate
from dsmoe.training.experts import ExpertLines, LoadScaledUpdates
from dsmoe.training.history import RunHistory
from dsmoe.training.metrics import MetricsWriter, due, layer_metrics, routing_metrics, worst_layer
from dsmoe.training.monitor import FirstSequence, RoutingMonitor
from dsmoe.training.progress import TrainingProgress
from dsmoe.training.resume import Position
from dsmoe.training.schedule import learning_rate
from dsmoe.training.step_values import StepValues
from dsmoe.training.trace import StepTracer
from dsmoe.training.watch import ExchangeWatch, RoutingWatch

LOST = 7  # among the sums of a step: whether the run folder is lost


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
        tokenizer: of the data, for pictures of text.
    """

    def __init__(
        self, config: RunConfig, engine, groups: ParallelGroups, stream, held, bytes_per_token: float | None,
        position: Position, data: dict[str, Any] | None = None, lock: RunLock | None = None,
        tokenizer: Tokenizer | None = None,
    ):  # fmt: skip
        self.config, self.engine, self.groups, self.lock = config, engine, groups, lock
        self.stream, self.held, self.bytes_per_token = stream, held, bytes_per_token
        self.step, self.samples, self.tokens = position.step, position.samples, position.tokens
        self.device = device_name()
        self.micro_batch = config.training.global_batch_size // (groups.dp_size * config.training.gradient_accumulation)
        step = position.step
        run_dir, rank = Path(config.logging.run_dir), groups.dp_rank
        self.until = min(config.training.steps, config.training.stop_at or config.training.steps)
        controller, router_class = engine.module.controller, get(config.router.name)
        options = router_class.Options.model_validate(config.router.options)
        self.target_experts = options.target_experts_per_token(config.model)
        self.progress = TrainingProgress(
            config.training.steps, step, active=rank == 0, until=self.until,
            target_density=self.target_experts / config.model.num_experts,
            steered=() if controller is None else tuple(controller.metrics()),
        )  # fmt: skip
        self._last_line: dict[str, Any] = {}
        warn = self._warn
        self.history = RunHistory(run_dir, rank, step, position.seconds, warn)  # before metrics of lost steps go
        self._before = self.tokens, self.history.seconds  # this job
        self.metrics = MetricsWriter(run_dir, rank, engine.monitor, step, warn)
        self.monitor = RoutingMonitor(engine.monitor, rank, config.logging, tokenizer, warn)
        self.expert_lines = ExpertLines(config, engine, groups, step, warn)
        self.scaled_updates = None
        if config.training.expert_lr == "load":
            self.scaled_updates = LoadScaledUpdates(engine, optimizer_class(config.training).batch_exponent)
        self.saver = CheckpointSaver(engine, config, step or None, data)
        self.copied_experts = position.copied_experts
        self.bad_steps = BadSteps(engine, config.training, run_dir, rank, position.skipped_steps, step, warn)
        self.routing_watch, self.exchange_watch = RoutingWatch(), ExchangeWatch()
        self._steering = None if engine.module.controller is None else self._read_controller()

    def run(self) -> tuple[Ending, dict[str, float]]:
        """Train to the end or until a signal. Returns why it ended, and the last evaluation."""
        with StopRequest() as stop:
            with self.progress:
                evaluation = self._run(stop)
            self._close(evaluation)
        return Ending.REACHED if self.step >= self.until else Ending.SIGNAL, evaluation

    def _run(self, stop: StopRequest) -> dict[str, float]:
        training = self.config.training
        evaluation: dict[str, float] = {}
        self.engine.train()
        asked = False
        while self.step < self.until and not asked:
            line, asked = self._one_step(stop)
            last = self.step == self.until
            if last or due(self.step, training.eval_interval):
                evaluation = self._evaluate()
                line |= evaluation
            if "val_loss" in line or due(self.step, self.config.logging.interval):
                self.metrics.write(line)
            self.progress.update(self.step, line)
            self._last_line = line
            if last or asked or due(self.step, self.config.checkpoint.interval):
                self._save()
        self.saver.finish()
        if not evaluation and self.step >= self.until:  # resumed with nothing left to do
            evaluation = self._evaluate()
        return evaluation

    def _save(self) -> None:
        position = Position(
            self.step, self.samples, self.tokens, self.copied_experts, self.bad_steps.skipped,
            self.history.seconds,
        )  # fmt: skip
        self.saver.save(position)

    def _close(self, evaluation: dict[str, float]) -> None:
        why, text = "finished", f"done    step {self.step} of {self.config.training.steps}"
        if self.step < self.until:
            why, text = "signal", f"stopped by a signal at step {self.step}; the same command resumes there"
        elif self.step < self.config.training.steps:
            why, text = "stop_at", f"stopped at step {self.step} (training.stop_at); without it the run continues"
        self.progress.say(f"{text}; {self.history.end(self.step, why)}")
        seconds = self.history.seconds - self._before[1]
        speed = (self.tokens - self._before[0]) / seconds if seconds else None
        self.progress.say(ending(self.config, self.step, self._last_line | evaluation, speed, self.target_experts))
        for log in (self.metrics, self.expert_lines, self.bad_steps, self.history):
            log.close()

    def _warn(self, text: str) -> None:
        self.progress.warn(text)
        self.history.write("warning", self.step, text=text)

    def _one_step(self, stop: StopRequest) -> tuple[dict, bool]:
        """One optimizer step: its metrics, and whether any rank was asked to stop. Its routes, where they are due."""
        with ExitStack() as until_done:
            tracer = None
            if due(self.step + 1, self.config.logging.trace):
                tracer = until_done.enter_context(StepTracer(self.engine.module.recorder.routers))
            micro_steps: list = []
            line, asked, bad = self._forward_backward_update(stop, tracer, micro_steps)
        if bad is not None:
            self._handle_bad_step(bad, micro_steps)
        if tracer is not None:
            tracer.write(Path(self.config.logging.run_dir), self.step, self.groups, self._warn)
        return line, asked

    def _forward_backward_update(
        self, stop: StopRequest, tracer: StepTracer | None, micro_steps: list
    ) -> tuple[dict, bool, str | None]:
        """What a step gave, whether a rank was asked to stop, and what was wrong with the step, if anything was.
        `micro_steps` gets its batches with the samples in them."""
        training = self.config.training
        started = time.perf_counter()
        phase.begin_step(self.step + 1)
        summed = self.groups.dp_size * training.gradient_accumulation  # forward passes behind the sums of losses
        if self.config.logging.timings:
            step_timer.start()
        traffic.take()  # what an evaluation sent is not the step's
        lr = learning_rate(self.step, training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # Language-model loss, router loss, ranks asked to stop, ranks that have written their part of a checkpoint,
        # bytes sent, those of them between nodes, seconds in exchanges, whether the run folder is lost, and the memory
        # of each rank. In fp64, which is exact for bytes.
        sums = torch.zeros(8 + self.groups.dp_size, dtype=torch.float64, device=self.device)
        for part in range(training.gradient_accumulation):
            batch, samples = self._batch(part)
            micro_steps.append((batch, samples))
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
                own_traffic = traffic.take()
                for place, value in enumerate(own_traffic, 4):
                    sums[place] += value
                sums[LOST] += self.lock is not None and self.lock.lost
                sums[8 + self.groups.dp_rank] += peak_memory_bytes()
                sum_over(self.groups.dp, sums)
                totals = self.engine.module.recorder.take()
                values = StepValues(sums, totals)
                self.expert_lines.begin(self.step + 1)
                if self.scaled_updates is not None:
                    self.scaled_updates.follow(totals)
                # One transfer tells all ranks the same loss and whether to go on. It is read before the optimizer moves
                # and together with the gradient norm; nothing waits for the optimizer.
                self.bad_steps.before_update(partial(self._losses, values, summed), partial(self._accept, totals))
            with step_timer.within("optimizer"):
                self.engine.step()
        self.step += 1
        self.samples += training.global_batch_size
        self.tokens += training.global_batch_size * self.config.model.sequence_length
        bad = self.bad_steps.after_update()
        (lm_loss, router_loss, asked, written, sent, between_nodes, exchanging, _, *memory), counted = values.read()
        if written == self.groups.dp_size:
            self.saver.finish()
        revival = self.engine.module.revival
        revived = {} if revival is None or bad is not None else {"revived_experts": revival.update(totals, self.step)}
        self.expert_lines.end(self.step, self.tokens, counted)
        parts = {"seconds_by_part": step_timer.stop()} if self.config.logging.timings else {}
        seconds = time.perf_counter() - started
        if supervision.current is not None:
            supervision.current.limits.note_step(seconds)
        recovery = self.history.step_done(self.step, seconds)
        exchange_share = exchanging / self.groups.dp_size / seconds
        self._watch(counted, exchange_share)
        layers = layer_metrics(counted)
        self.monitor.after_step(self.step, counted, layers)
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": lm_loss / summed,
            "router_loss": router_loss / summed,
            "grad_norm": self.bad_steps.grad_norm,
            "lr": lr,
            "tokens_per_second": training.global_batch_size * self.config.model.sequence_length / seconds,
            **routing_metrics(counted, self.groups.ep_size),
            **worst_layer(layers),
            "all_to_all_bytes": int(sent),
            "between_nodes_bytes": int(between_nodes),
            "exchange_share": exchange_share,
            "peak_memory_bytes": int(max(memory)),
            "seconds": seconds,
            "effective_time": self.history.effective,
            **({} if recovery is None else {"recovery_seconds": recovery}),
            **({} if bad is None else {"skipped": 1}),
            **parts,
            **revived,
        }
        if shares := self.stream.shares(self.samples):
            line["data_shares"] = shares  # of a blend, of all samples so far
        if self._steering is not None:
            names, steering = self._steering
            line |= dict(zip(names, steering.tolist(), strict=True))
        return line, asked > 0, bad

    def _losses(self, values: StepValues, summed: int) -> tuple[float, float]:
        """Of language model and router, means over ranks and `summed` forward passes."""
        sums, _ = values.read()
        if sums[LOST]:
            raise TrainingError(f"another run has taken over {self.config.logging.run_dir}; this one ends")
        return sums[0] / summed, sums[1] / summed

    def _accept(self, totals: RoutingTotals) -> None:
        """A step is good, and the optimizer about to move."""
        if (controller := self.engine.module.controller) is not None:
            controller.after_step(totals)
            self._steering = self._read_controller()

    def _read_controller(self) -> tuple[list[str], Any]:
        """Names, and values on their way to the host."""
        metrics = self.engine.module.controller.metrics()
        stacked = torch.stack([value.double() for value in metrics.values()]) if metrics else torch.empty(0)
        return list(metrics), read_later(stacked)

    def _watch(self, totals: RoutingTotals, exchange_share: float) -> None:
        warnings = self.routing_watch.see(totals, self.step)
        if self.groups.dp_size > 1 and (slow := self.exchange_watch.see(exchange_share, self.step)):
            warnings.append(slow)
        for text in warnings:
            self._warn(f"step {self.step}: {text}")

    def _batch(self, part: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        """This rank's sequences of one micro-step, and which they are: the step's samples in order, cut by micro-step,
        then by rank."""
        per_part = self.micro_batch * self.groups.dp_size
        first = self.samples + part * per_part + self.groups.dp_rank * self.micro_batch
        batch = self.stream.batch(first, self.micro_batch)
        rows = {name: batch[name].pin_memory() if on_gpu() else batch[name] for name in ("tokens", "labels")}
        on_device = {name: values.to(self.device, non_blocking=True) for name, values in rows.items()}
        return on_device, list(range(first, first + self.micro_batch))

    def _handle_bad_step(self, what: str, micro_steps: list) -> None:
        """Find out where it comes from, and go on without the step, or end the run on all ranks."""
        phase.enter("diagnosis of a bad step")
        reports = self.bad_steps.diagnose(micro_steps)
        skips = self.bad_steps.decide(self.step, what, reports)
        where = summary(reports)
        self.history.write("bad_step", self.step, what=what, decision="skip" if skips else "stop")
        if skips:
            self._warn(f"step {self.step} is skipped: {what}; {where}; more in {self.bad_steps.path}")
            return
        try:
            self.saver.finish()  # begun when all was well
            saved = f"the last checkpoint (step {self.saver.step}) is untouched"
        except CheckpointError as error:
            saved = str(error)
        saved = saved if self.saver.step else "no checkpoint was written yet"
        raise error_of(self.step, what, where, saved, self.bad_steps.path, self.config.training)

    def _evaluate(self) -> dict[str, float]:
        phase.enter("evaluation")
        with ExitStack() as until_done:
            first = FirstSequence(self.engine.module.recorder.routers)
            if self.monitor.wants_text():
                until_done.enter_context(first)
            results = evaluate(self.engine, self.held, self.micro_batch, self.groups, self.bytes_per_token)
        if self.monitor.wants_text():
            self.monitor.text(self.step, self.held.batch(0, 1)["tokens"][0], first.experts_LS)
        bits = f"  {results['val_bpb']:.3f} bits per byte" if "val_bpb" in results else ""
        self.progress.say(f"step {self.step}  held-out loss {results['val_loss']:.4f}{bits}")
        return results
