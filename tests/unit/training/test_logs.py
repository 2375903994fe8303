"""A log that cannot be written warns and the run goes on; one that nobody watches on a terminal is never silent."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsmoe.errors import RunFolderError
from dsmoe.training.metrics import AppendedFile, LineWriter, MetricsWriter, read_lines
from dsmoe.training.progress import TrainingProgress


def test_a_full_disk_is_said_once_a_minute_and_counted():
    said: list[str] = []
    log = AppendedFile(Path("/dev/full"), said.append)
    for _ in range(5):
        log.write("{}")
    assert len(said) == 1 and "cannot write /dev/full (No space left on device): 1 line lost so far" in said[0]


def test_a_deleted_log_begins_anew(tmp_path):
    said: list[str] = []
    writer = LineWriter(tmp_path / "run" / "metrics.jsonl", 0, warn=said.append)
    writer.write({"step": 1})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run").rmdir()
    writer.write({"step": 2})
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 2}]
    assert said == [f"{tmp_path}/run/metrics.jsonl was deleted; a new one is started"]


def test_a_line_that_was_cut_short_is_ended_and_left_out(tmp_path, monkeypatch):
    log = AppendedFile(tmp_path / "log", lambda text: None)
    import os

    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    log.write(json.dumps({"step": 1}))
    monkeypatch.setattr(os, "write", write)
    log.write(json.dumps({"step": 2}))
    assert read_lines(tmp_path / "log") == [{"step": 2}]


def test_a_monitor_that_fails_is_left_out_and_the_file_goes_on(tmp_path):
    def fails(events):
        raise FileNotFoundError("events.out.tfevents")

    said: list[str] = []
    writer = MetricsWriter(tmp_path, 0, SimpleNamespace(enabled=True, write_events=fails), warn=said.append)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(said) == 1 and "monitor" in said[0] and "events.out.tfevents" in said[0]


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"5\n[]\n", b'{"step": "two"}\n{"no": 1}\n', b"{\n" * 3])
def test_a_damaged_log_is_continued_without_the_damage(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content + b'{"step": 1}\n')
    MetricsWriter(tmp_path, 0, first_step=1).write({"step": 2})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_log_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFolderError, match="cannot continue .*metrics.jsonl: Is a directory"):
        MetricsWriter(tmp_path, 0)


def test_a_run_without_a_terminal_has_a_line_at_least_every_minute(capsys):
    metrics = {"loss": 1.0, "experts_per_token": 1.0, "tokens_per_second": 1.0}
    with TrainingProgress(100_000, 0, active=True, silence=0.3) as progress:
        for step in range(1, 21):
            time.sleep(0.05)
            progress.update(step, metrics)
        often = capsys.readouterr().out.splitlines()
        time.sleep(1.0)
        long_step = capsys.readouterr().out.splitlines()
    assert 4 <= len(often) <= 12 and all("loss 1.000" in line for line in often)
    assert 2 <= len(long_step) <= 4 and "step 20/100000 is done, the next is under way" in long_step[0]


def test_other_ranks_stay_silent(capsys):
    with TrainingProgress(10, 0, active=False, silence=0.05):
        time.sleep(0.3)
    assert capsys.readouterr().out == ""
