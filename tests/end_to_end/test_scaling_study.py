"""The command of scaling studies, with real runs of two processes under DeepSpeed's launcher, and its report."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import yaml
from browser import OVERFLOW, SIZES, visit
from commands import forked, metrics
from PIL import Image

TOOL = "tools/scaling_study.py"


def test_a_study_runs_and_reports(place, config):
    study = {
        "title": "Two sizes",
        "question": "Does it run?",
        "config": str(config),
        "set": {"training.steps": 3, "training.eval_interval": 0, "parallel.expert_parallel": 2, "logging.trace": 0},
        "ranks": 2,
        "seeds": [1],
        "compute": {"experts": 1, "width": 16},
        "x": "model.num_experts",
        "axes": {"model.num_experts": [2, 4]},
        "arms": [{"name": "topk", "set": {"router.name": "topk"}}],
        "limits": ["communication"],
    }
    path, out = place / "study.yaml", place / "runs" / "study"
    path.write_text(yaml.safe_dump(study))
    ran = forked(TOOL, "run", str(path), "--out", str(out), loaded=True)
    assert ran.code == 0, ran.output
    folder = out / "topk" / "num_experts-4" / "seed-1"
    assert json.loads((folder / "cell.json").read_text())["ranks"] == 2
    assert len(metrics(folder)) == 3 and all(line["all_to_all_bytes"] > 0 for line in metrics(folder))
    reported = forked(TOOL, "report", str(out), "--target", str(place / "report"))
    assert reported.code == 0, reported.output
    text = (place / "report" / "report.md").read_text()
    assert "2 of 2 runs finished" in text and "all-to-all per token" in text
    assert (place / "report" / "index.html").read_text().endswith("</html>\n")
    carried_on = ["--out", str(place / "runs" / "elsewhere"), "--reported", str(place / "report" / "study")]
    second = forked(TOOL, "run", str(path), *carried_on)
    assert second.code == 0 and "2 of 2 cells are in" in second.output, second.output
    about = place / "report" / "study" / "about.json"
    data = json.loads(about.read_text())["data"]
    assert list(data) == [yaml.safe_load(config.read_text())["data"]["path"]]
    about.write_text(json.dumps({"data": {path: "100 tokens (abc)" for path in data}}))
    refused = forked(TOOL, "run", str(path), *carried_on)
    assert refused.code == 2 and "expected 100 tokens (abc), which the cells before" in " ".join(refused.output.split())


PICTURES = """() => [...document.querySelectorAll("figure svg")].filter((svg) => svg.checkVisibility()).map((svg) => {
  const box = svg.getBoundingClientRect(), card = svg.closest(".card").getBoundingClientRect();
  const text = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  return { inside: box.left >= card.left && box.right <= card.right,
           smallest: Math.min(...text.map((box) => box.height)),
           cut: text.filter((text) => text.left < card.left || text.right > card.right).length };
})"""


# Of every text outside pictures, with what it stands on; 4.5 is what WCAG asks for.
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((x) => x / 255)
      .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return numbers(colour)[3] === 0 && element.parentElement ? ground(element.parentElement) : colour;
  };
  const texts = [...document.body.querySelectorAll("*:not(svg *)")].filter((element) =>
    element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((element) => {
    const [high, low] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_report_in_a_browser(browser, place, size, scheme):
    """Of the study above: every picture is on the page once and whole, with text that can be read, at any width."""
    seen = visit(browser, place / "report" / "index.html", size, scheme)
    contrasts = seen.page.evaluate(CONTRASTS)
    assert len(contrasts) > 20 and min(contrasts) >= 4.5
    shown = seen.page.locator("figure svg:visible").first.screenshot()
    assert (np.median(np.asarray(Image.open(io.BytesIO(shown)).convert("L"))) < 100) == (scheme == "dark")
    pictures = seen.page.evaluate(PICTURES)
    assert len(pictures) == seen.page.locator("figure").count() > 3
    assert all(picture["inside"] and picture["smallest"] > 8 and not picture["cut"] for picture in pictures), pictures
    assert seen.page.evaluate(OVERFLOW) == 0 and not seen.complaints and len(seen.requests) == 1
    seen.page.context.close()


def test_mistakes_of_a_study_end_with_a_message(place, config):
    path = place / "bad_study.yaml"
    path.write_text(yaml.safe_dump({"title": "Bad", "question": "?", "config": str(config), "seeds": [1], "arms": [
        {"name": "topk", "set": {"router.name": "topq", "model.num_experts": 4}}]}))  # fmt: skip
    result = forked(TOOL, "run", str(path), "--out", str(place / "runs" / "bad"))
    assert result.code == 2 and "did you mean 'topk'" in result.output and "Traceback" not in result.output
    assert not (place / "runs" / "bad").exists()
