# SPDX-License-Identifier: Apache-2.0
"""The words keep their promises: code runs, commands and files exist, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tritool
from tritool import losses, metrics, ops
from tritool.cli import build_parser
from tritool.training import Config, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TOOLS = [ROOT / "examples" / "unproject_images.py"]  # needs a recording with images
EXAMPLES = sorted(set(ROOT.glob("examples/*.py")) - set(TOOLS))
# They train for minutes.
LONG = [ROOT / "examples" / f"{name}.py" for name in ("weak_supervision", "train_in_pytorch")]
DOCTESTED = (
    "tritool.ops.project",
    "tritool.ops.rigid_align",
    "tritool.ops.robust",
    "tritool.ops.soft_argmax",
    "tritool.ops.soft_argmax25d",
    "tritool.ops.triangulate",
    "tritool.ops.unproject",
    "tritool.losses.heatmaps",
    "tritool.losses.joints",
    "tritool.losses.multi_view",
    "tritool.losses.volumes",
    "tritool.losses.weak",
    "tritool.metrics.poses",
    "tritool.metrics.report",
    "tritool.cameras",
    "tritool.grid",
    "tritool.data.synthetic.studio",
    "tritool.models.algebraic",
    "tritool.models.images",
    "tritool.models.pose_resnet",
    "tritool.models.ransac",
    "tritool.models.reconstruct",
    "tritool.models.v2v",
    "tritool.models.volumetric",
    "tritool.models.weak25d",
    "tritool.training.tasks",
)

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings as GitHub and mkdocs link to them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


# ---- Code ----


@page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"tritool": tritool}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page}, Python block {number}", "exec"), namespace)


def test_readme_block_does_what_its_comments_say() -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(block, namespace)
    assert namespace["pixels"].shape == (17, 2, 2)
    assert namespace["points"].shape == (17, 3)
    assert namespace["errors"].shape == (17, 2)
    assert namespace["errors"].isfinite().all()
    assert (namespace["heatmaps"].grad != 0).all()
    code = [line for line in block.splitlines() if line and "import" not in line]
    assert len(code) <= 8


@pytest.mark.parametrize("name", DOCTESTED)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    extra = {"torch": torch, "project": ops.project}
    failed, tried = doctest.testmod(module, extraglobs=extra)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("path", [*EXAMPLES, *TOOLS], ids=lambda path: path.stem)
def test_examples_stay_short_and_public(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < (300 if path in TOOLS else 80)
    assert not re.search(r"\btritool[\w.]*\._|import _", text)


def test_example_heatmaps_to_3d(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = load_example("heatmaps_to_3d").main(steps=60)
    assert before > 50
    assert after < before / 10
    assert f"{before:.2f} mm" in capsys.readouterr().out


def test_example_own_cameras() -> None:
    distances, errors = load_example("own_cameras").main()
    assert distances.max() < 6
    assert errors[0].isnan().tolist() == [False, True, False]
    assert errors[1, 2] > 80  # the wrong detection stands out
    assert errors[2:].max() < 2


def test_example_weak_supervision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("weak_supervision")

    def few(source: str, *, overrides: list[str], steps: int) -> Config:
        less = [
            "data.validation.length=3",
            "model.width=4",
            "training.batch_size=5",
            "data.images=4",
        ]
        return load_config(source, overrides=[*overrides, *less], steps=steps)

    monkeypatch.setattr(example, "load_config", few)
    errors = example.main(tmp_path, steps=(2, 1), images=2)
    assert all(math.isfinite(error) for error in errors)
    assert (tmp_path / "before_and_after.png").stat().st_size > 10_000
    settings = load_config(tmp_path / "and-unlabelled-views" / "config.yaml").model
    assert settings.backbone_from == str(tmp_path / "2D-labels-alone" / "best.safetensors")


def test_example_train_in_pytorch() -> None:
    before, after = load_example("train_in_pytorch").main(steps=20, unseen=12)
    assert after < 0.9 * before


def test_example_learn_weights() -> None:
    weights, equal, learned = load_example("learn_weights").main(steps=50)
    assert weights.argmin() == 2  # the noisy camera
    assert weights[2] < 0.3 * weights.median()
    assert learned < 0.4 * equal


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path not in LONG], ids=lambda path: path.stem
)
def test_example_runs_as_a_script(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


# ---- Commands ----


@page
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = "".join(blocks(page, "sh")).splitlines()
    lines += re.findall(r"`((?:make|tritool) (?!was)[^`]+)`", prose(page))
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words:
            continue
        command = Path(words[0]).name
        if command == "make":
            wanted = [word for word in words[1:] if "=" not in word]
            assert set(wanted) <= targets, line
        elif command == "tritool" and len(words) > 2:
            build_parser().parse_args(words[1:])
        elif command == "tritool":
            assert words[1] in {"demo", "triangulate", "train", "evaluate", "predict", "info"}, line
        elif command == "python":
            assert (ROOT / words[1]).is_file(), line
        else:
            assert command in {"pip", "pre-commit", "PYTHON=python3"}, line


# ---- Links and names ----


def test_signatures_are_those_of_the_code() -> None:
    text = "".join(path.read_text() for path in ROOT.glob("docs/ops/*.md"))
    written = dict(re.findall(r"^tritool\.ops\.(\w+)(\(.*\))$", text, re.MULTILINE))
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(written) == functions
    for name, signature in written.items():
        parameters = inspect.signature(getattr(ops, name)).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        code = str(inspect.Signature(bare)).replace("'", '"')
        assert signature == code, name


@page
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} leads nowhere"
        assert path.is_relative_to(ROOT / "docs") or page.parent == ROOT, f"{target} leaves docs/"
        if anchor:
            assert anchor in anchors(path), f"{target}: no such heading"


@page
def test_named_files_exist(page: Path) -> None:
    """Files of the repository in backticks are there; a <placeholder> is none."""
    folders = "csrc|tritool|tests|docs|benchmarks|examples"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", prose(page))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_source_comments_point_to_sections() -> None:
    """A docs page, and its section, that a comment in the code sends the reader to is there."""
    sources = [*ROOT.glob("csrc/**/*"), *ROOT.glob("tritool/**/*.py")]
    found = 0
    for source in sources:
        if source.suffix not in {".h", ".cpp", ".cu", ".cuh", ".py"}:
            continue
        pattern = r"(docs/[\w/]+\.md)(?:,? section (\d+))?"
        for name, section in re.findall(pattern, source.read_text()):
            found += 1
            assert (ROOT / name).is_file(), f"{source}: {name}"
            if section:
                heading = rf"^## {section}\. "
                assert re.search(heading, (ROOT / name).read_text(), re.MULTILINE), source
    assert found


def test_every_public_op_is_documented() -> None:
    text = "\n".join(path.read_text() for path in ROOT.glob("docs/**/*.md"))
    public = [*ops.__all__, *losses.__all__, *metrics.__all__, *tritool.__all__]
    missing = [name for name in public if not re.search(rf"\b{name}\b", text)]
    assert not missing
    for name in ops.__all__:
        function = getattr(ops, name)
        assert (function.__doc__ or "").strip(), f"{name} has no docstring"


def test_navigation_is_complete() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert listed == there


def test_picture_is_small() -> None:
    assert (ROOT / "docs" / "images" / "demo.png").stat().st_size < 300_000


# ---- Figures ----


def test_measured_tables_are_filled() -> None:
    """Every table that docs/measure.py knows stands in its page, once and not empty."""
    spec = importlib.util.spec_from_file_location("measure", ROOT / "docs" / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    for name, (page, table, _) in measure.TABLES.items():
        text = (ROOT / "docs" / page).read_text()
        pattern = rf"(?s)<!-- measured:{name} -->\n(.*?)\n<!-- measured:end -->"
        (body,) = re.findall(pattern, text)
        fresh = table({"mean": 32}.get(name, 8 if name.startswith("unprojection") else 300))
        # Small runs have other figures, but the same lines and columns.
        written = [line.split("|")[1] for line in body.splitlines()]
        assert written == [line.split("|")[1] for line in fresh.splitlines()]
