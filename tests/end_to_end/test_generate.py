"""launch/generate.py on a run of a few steps: the text is nonsense, the command is not."""

from __future__ import annotations

from commands import forked

GENERATE = "launch/generate.py"


def test_a_prompt_is_continued(of_two):
    """The run is of two processes; generation is one."""
    result = forked(GENERATE, str(of_two), "--prompt", "The router", "--tokens", "6", "--temperature", "0")
    assert result.code == 0, result.output
    assert result.output.startswith("The router")
    assert len(result.output.strip()) > len("The router")
    assert "WARNING" not in result.output


def test_all_bad_arguments_are_named(of_two):
    result = forked(GENERATE, str(of_two), "--tokens", "0", "--temperature", "-1", "--top-p", "2")
    assert result.code == 2, result.output
    for option in ("--tokens: found 0", "--temperature: found -1", "--top-p: found 2"):
        assert option in result.output
    assert "Traceback" not in result.output
