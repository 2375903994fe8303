"""dsmoe inspect: files that agree with each other, mistakes that are named, and a page that works in a real browser.

The browser is Debian's Chromium, driven by Playwright; where there is none, its tests say so and are skipped.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from browser import OVERFLOW, SIZES, visit
from commands import forked

DSMOE = "dsmoe/__main__.py"
PROSE = "The router of 3 is expert.\nThe gradient of 14 is token."
CODE = "expert[3] = token + 14"


@dataclass(frozen=True)
class Inspected:
    """What one command wrote."""

    folder: Path
    output: str

    @property
    def page(self) -> Path:
        return self.folder / "page.html"

    def report(self) -> dict:
        return json.loads((self.folder / "report.json").read_text())

    def table(self, name: str) -> list[dict[str, str]]:
        with open(self.folder / "csv" / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


def inspect(folder: Path, *arguments: str) -> Inspected:
    folder.mkdir()
    targets = ["--out", str(folder / "page.html"), "--json", str(folder / "report.json"), "--csv", str(folder / "csv")]
    done = forked(DSMOE, "inspect", *arguments, *targets, "--plain")
    assert done.code == 0, done.output
    return Inspected(folder, done.output)


@pytest.fixture(scope="module")
def one(alone, tmp_path_factory) -> Inspected:
    """A run of two checkpoints on two texts, with its sweep."""
    folder = tmp_path_factory.mktemp("inspected") / "one"
    return inspect(folder, str(alone[0]), "--text", PROSE, "--text", CODE, "--windows", "3", "--sweep")


@pytest.fixture(scope="module")
def two(alone, of_two, tmp_path_factory) -> Inspected:
    """Beside another run that has the same tokenizer."""
    folder = tmp_path_factory.mktemp("inspected") / "two"
    return inspect(folder, str(alone[0]), "--text", PROSE, "--compare", str(of_two), "--windows", "3")


@pytest.fixture(scope="module")
def hosted(corpus, tmp_path_factory) -> Inspected:
    """A model of transformers with a fixed k, whose first layer is dense, with the tokenizer of the corpus."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=24, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
        mlp_only_layers=[0], max_position_embeddings=32, initializer_range=0.2, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hosted")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "a model of the hub")
    shutil.copyfile(corpus / "tokenizer.model", folder / "a model of the hub" / "tokenizer.model")
    texts = ["--text", PROSE, "--text", CODE, "--windows", "3", "--sweep"]
    return inspect(folder / "inspected", str(folder / "a model of the hub"), *texts)


def test_a_model_of_transformers(hosted):
    """Layers have the numbers that they have in the model; every token has k experts, whose weights sum to 1."""
    (model,) = hosted.report()["models"]
    assert (model["kind"], model["architecture"], model["router"]) == ("huggingface", "qwen3_moe", "topk")
    assert (model["k"], model["layers"]) == (2, [1, 2])
    tokens, routes = hosted.table("tokens"), hosted.table("routes")
    assert "".join(row["token"] for row in tokens) == PROSE + CODE and len(routes) == len(tokens) * 2 * 2
    weights = {}
    for row in routes:
        key = row["layer"], row["token"]
        weights[key] = weights.get(key, 0.0) + float(row["weight"])
    assert len(weights) == len(tokens) * 2 and list(weights.values()) == pytest.approx([1.0] * len(weights), abs=1e-4)
    assert {row["layer"] for row in hosted.table("experts")} == {"1", "2"}
    sweep = hosted.table("sweep")
    assert {row["setting"] for row in sweep} == {"k"}
    assert [float(row["experts_per_token"]) for row in sweep[:2]] == [2.0, 1.0]
    assert "effective experts" in hosted.output and "a model of the hub" in hosted.output


def test_files_agree(one):
    """JSON and CSV of one command hold the same numbers. What it inspects may have to be trained first."""
    report = one.report()
    (model,) = report["models"]
    assert [text["name"] for text in report["texts"]] == ["text 1", "text 2"] and report["comparison"] is None
    assert "".join(model["per_token"]["token"]) == PROSE + CODE and model["step"] == 6
    assert [entry["step"] for entry in model["saturation"]] == [3]
    tokens = one.table("tokens")
    assert [row["token"] for row in tokens] == model["per_token"]["token"]
    routes = one.table("routes")
    assert len(routes) == sum(map(sum, model["per_token"]["experts"]))
    for layer in range(2):
        counts = [0] * 4
        for row in routes:
            counts[int(row["expert"])] += int(row["layer"]) == layer
        assert counts == model["load"][layer]["counts"]
        assert counts == [int(row["tokens"]) for row in one.table("experts") if row["layer"] == str(layer)]
    losses = [float(row["next_loss"]) for row in tokens if row["next_loss"]]
    assert model["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    sweep = one.table("sweep")
    assert sweep[0]["trained"] == "1" and float(sweep[0]["loss"]) == model["loss"]
    assert float(sweep[-1]["experts_per_token"]) < float(sweep[0]["experts_per_token"])
    assert {path.stem for path in (one.folder / "csv").iterdir()} == {
        "tokens", "routes", "layers", "experts", "by_kind", "by_position", "deciles", "correlations", "together",
        "pairs", "saturation", "sweep",
    }  # fmt: skip


def test_a_pipe_gets_numbers_for_colours(one):
    """A token's mean number of experts stands behind it."""
    (model,) = one.report()["models"]
    assert "\x1b" not in one.output and "token{experts, mean over layers}" in one.output
    experts = model["per_token"]["experts"]
    first = model["per_token"]["token"][0]
    assert f"\n{first}{{{(experts[0][0] + experts[1][0]) / 2:.1f}}}" in one.output
    assert f"wrote {one.page}" in one.output and "experts by kind of token" in one.output


def test_two_runs(two):
    """A comparison beside its models. Three model loads, and perhaps two trainings first."""
    report = two.report()
    first, second = report["models"]
    actual = report["comparison"]
    assert actual["same_tokens"] and (first["step"], second["step"]) == (6, 3)
    assert actual["loss_difference"]["mean"] == pytest.approx(second["loss"] - first["loss"], abs=1e-4)
    assert actual["experts_difference"]["mean"] == pytest.approx(
        second["experts_per_token"] - first["experts_per_token"], abs=1e-4
    )
    assert "minus" in two.output


def test_mistakes_are_named_at_once(alone, tmp_path):
    """Seven commands, each a process of its own."""
    run = str(alone[0])
    for arguments, message in (
        ([str(tmp_path / "none"), "--text", "a b"], "does not exist; expected a run folder"),
        ([run, "--text", "a b", "--compare", str(tmp_path / "none")], "does not exist; expected a run folder"),
        ([run, "--text", "a b", "--out", str(tmp_path / "no" / "page.html")], "lies in a folder that does not exist"),
        ([run, "--text", "a b", "--step", "5"], "has no checkpoint of step 5; there are: 3, 6"),
        ([run, "--text", " "], "--text: text is empty"),
        ([run, "--text", PROSE * 9], "more than the context of 32; give less, or --windows"),
    ):
        done = forked(DSMOE, "inspect", *arguments)
        assert done.code == 2 and message in done.output and "Traceback" not in done.output, done.output
    done = forked(DSMOE, "inspect", run, "--text", "a b", processes=2)
    assert done.code == 2 and "in one process; start it without a launcher" in done.output, done.output


# ---- in a browser


SHAPES = """() => [...document.querySelectorAll("svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  return { name: svg.getAttribute("aria-label"), shapes: svg.querySelectorAll("rect, circle, polyline").length,
           width: box.width, height: box.height, broken: /NaN|undefined|Infinity/.test(svg.outerHTML) };
})"""
CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map((x) => x / 255)
      .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(...[...document.querySelectorAll(".text span")].map((span) => {
    const style = getComputedStyle(span);
    if (style.backgroundColor === "rgba(0, 0, 0, 0)") return 21;
    const [high, low] = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  }));
}"""
COLOURS = "() => [...document.querySelectorAll('.text span')].map((span) => getComputedStyle(span).backgroundColor)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_in_a_browser(browser, one, size, scheme):
    """Chromium takes some seconds to start where the cores are busy."""
    (model,) = one.report()["models"]
    seen = visit(browser, one.page, size, scheme)
    page = seen.page
    # it draws, and fits
    titles = page.locator("h2").all_text_contents()
    assert titles[:2] == ["The text", "Do harder tokens take more experts?"] and len(titles) == 10
    charts = page.evaluate(SHAPES)
    assert len(charts) >= 10
    for chart in charts:
        assert chart["shapes"] and not chart["broken"], chart
        assert 100 < chart["width"] <= SIZES[size][0] and chart["height"] > 20, chart
    assert page.evaluate(OVERFLOW) <= 0
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 150) == (scheme == "dark")
    # the text, coloured and legible
    shown = "".join(page.locator("#text-0 span").all_text_contents())
    assert shown.replace("↵", "").replace("⋯", "") == PROSE
    means = page.evaluate(COLOURS)
    assert len(set(means)) > 1 and page.evaluate(CONTRAST) > 4.5
    # the slider: layers have colours of their own, tokens with as many experts the same
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-name").text_content() == "layer 0"
    by_layer = page.evaluate(COLOURS)
    count = {}
    for colour, experts in zip(by_layer, model["per_token"]["experts"][0]):
        count.setdefault(experts, set()).add(colour)
    assert all(len(colours) == 1 for colours in count.values()) and len(set(by_layer)) == len(count)
    assert page.evaluate(CONTRAST) > 4.5
    # a token: hover with a mouse, tap with a finger
    token = page.locator("#text-0 span").nth(4)
    token.tap() if size == "phone" else token.hover()
    details = page.locator("#details-0").text_content()
    for expert, weight in model["per_token"]["routes"][0][4]:
        assert f"expert {expert}{weight:.2f}" in details
    assert f"{model['per_token']['loss'][4]:.2f} nats" in details and "layer 0" in details
    # another text, another colour
    page.select_option("#which", "1")
    assert "".join(page.locator("#text-0 span").all_text_contents()) == CODE
    page.select_option("#mode", "loss")
    assert page.evaluate(CONTRAST) > 4.5
    # every choice of layer draws
    for choice in page.locator("select[aria-label=layer]").all():
        choice.select_option("0")
    assert not any(chart["broken"] for chart in page.evaluate(SHAPES))
    assert page.evaluate(OVERFLOW) <= 0
    assert seen.complaints == [] and seen.requests == [one.page.as_uri()]
    page.screenshot(path=str(one.folder / f"{size} {scheme}.png"), full_page=True)
    page.context.close()


def test_arrow_keys_walk_through_the_text(browser, one):
    """The page can be used without a mouse."""
    page = visit(browser, one.page, "desktop", "light").page
    page.locator("#text-0").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#text-0 .chosen").get_attribute("data-token") == "2"
    page.keyboard.press("ArrowLeft")
    assert "position 1;" in page.locator("#details-0").text_content()
    page.context.close()


@pytest.mark.parametrize("size", SIZES)
def test_two_models_side_by_side_in_a_browser(browser, two, size):
    """Columns on a wide page, one below the other on a phone; one slider for both."""
    seen = visit(browser, two.page, size, "light")
    page = seen.page
    boxes = [page.locator(f"#text-{place}").bounding_box() for place in (0, 1)]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (size == "desktop")
    assert page.locator("h2").first.text_content() == "The two side by side"
    first, second = two.report()["models"]
    assert f"{first['loss']:.4f}" in page.content() and f"{second['loss']:.4f}" in page.content()
    assert page.evaluate(OVERFLOW) <= 0 and not any(chart["broken"] for chart in page.evaluate(SHAPES))
    assert seen.complaints == [] and seen.requests == [two.page.as_uri()]
    page.screenshot(path=str(two.folder / f"{size}.png"), full_page=True)
    page.context.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_model_with_a_fixed_k_in_a_browser(browser, hosted, size):
    """Effective experts take the place of experts, whose number says nothing; layers have the model's numbers."""
    (model,) = hosted.report()["models"]
    seen = visit(browser, hosted.page, size, "light")
    page = seen.page
    claim = page.locator(".claim").first.text_content()
    assert claim.startswith("Every token has 2 experts, so their number cannot follow the loss. Effective experts")
    assert page.locator("#mode").input_value() == "effective" and len(set(page.evaluate(COLOURS))) > 2
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-name").text_content() == "layer 1" and len(set(page.evaluate(COLOURS))) > 10
    token = page.locator("#text-0 span").nth(4)
    token.tap() if size == "phone" else token.hover()
    details = page.locator("#details-0").text_content()
    for expert, weight in model["per_token"]["routes"][0][4]:
        assert f"expert {expert}{weight:.2f}" in details
    assert page.locator("#details-0 .scroll").evaluate("(part) => part.scrollWidth <= part.clientWidth")
    charts = page.evaluate(SHAPES)
    names = [chart["name"] for chart in charts]
    assert {"effective experts by layer", "effective experts by kind", "sweep of k"} <= set(names)
    assert not any(chart["broken"] or not chart["shapes"] for chart in charts) and page.evaluate(OVERFLOW) <= 0
    text = page.locator("body").inner_text()
    assert not any(words in text for words in ("inside kinds of tokens", "bars are standard errors"))
    assert seen.complaints == [] and seen.requests == [hosted.page.as_uri()]
    page.screenshot(path=str(hosted.folder / f"{size}.png"), full_page=True)
    page.context.close()


def test_a_text_with_markup_stays_text(browser, alone, tmp_path):
    """Nothing in a text ends the page's script or becomes an element. Reads a model once more."""
    evil = "</script><img src=x onerror=alert(1)> @title@ <!-- expert"
    actual = inspect(tmp_path / "evil", str(alone[0]), "--text", evil, "--windows", "9", "--checkpoints", "0")
    seen = visit(browser, actual.page, "desktop", "light")
    shown = "".join(seen.page.locator("#text-0 span").all_text_contents())
    assert shown == evil and seen.page.locator("img").count() == 0
    assert seen.complaints == [] and seen.requests == [actual.page.as_uri()]
    seen.page.context.close()
