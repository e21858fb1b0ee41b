# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs: what they write, how they judge, and every committed result."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tritool.training import load_config

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

bench = import_module("bench")
compare = import_module("compare")
gpu_test = import_module("gpu_test")
plots = import_module("plots")
report = import_module("report")
run = import_module("run")
suites = import_module("suites")
project_einsum = import_module("rivals.project").project_einsum
worker = import_module("worker")
triangulate_case = import_module("suites.triangulate").triangulate_case

Json = dict[str, Any]
calls = import_module("calls")
networks = import_module("networks")
studies = import_module("studies")
PAGE = ROOT / "docs" / "benchmarks.md"
COMMITTED = sorted((BENCHMARKS / "results").glob("*/ops*.json"))
COMMITTED_CALLS = sorted((BENCHMARKS / "results").glob("*/calls--*.json"))
COMMITTED_NETWORKS = sorted((BENCHMARKS / "results").glob("*/networks--*.json"))


# ---- made-up results ----


def times(median: float, ratio: float = 1.0) -> Json:
    return {
        "median_ms": median,
        "q1_ms": median * 0.99,
        "q3_ms": median * 1.01,
        "best_ms": median * 0.98,
        "rounds": 20,
        "ratio": ratio,
        "ratio_q1": ratio * 0.99,
        "ratio_q3": ratio * 1.01,
    }


def errors(p999: float) -> Json:
    return {"not_finite": 0, "median": p999 / 10, "p999": p999, "max": p999 * 2}


def row(name: str, kind: str, ratio: float, p999: float = 1e-4, accurate: bool = True) -> Json:
    return {
        "name": name,
        "kind": kind,
        "note": "",
        "error": errors(p999),
        "gradient_error": {"points": errors(1e-5)},
        "accurate": accurate,
        "times": {mode: times(2.0 * ratio, ratio) for mode in bench.MODES},
        "peak_memory_mib": {},
    }


def made_up() -> Json:
    case = {
        "op": "triangulate",
        "size": "N=7 C=4",
        "shape": {"N": 7, "C": 4},
        "dtype": "float32",
        "unit": "mm",
        "tolerance": 1.0,
        "headline": True,
        "variants": [
            row("tritool", "tritool", 1.0),
            row("wrong but fast", "pytorch", 0.1, p999=5e3, accurate=False),
            row("package", "package", 0.5),
            row("slow", "pytorch", 30.0),
            row("less slow", "pytorch", 12.0),
        ],
    }
    slower_than_a_rival = copy.deepcopy(case) | {"size": "N=1 C=4", "shape": {"N": 1, "C": 4}}
    slower_than_a_rival["variants"][4] = row("less slow", "pytorch", 0.4)
    broken = copy.deepcopy(case) | {"size": "N=9 C=4", "variants": [], "failure": "status -11"}
    return {
        "schema": run.SCHEMA,
        "suite": "ops",
        "quick": False,
        "machine": "example-cpu",
        "device": "cpu",
        "date": "2024-06-07T08:09:10Z",
        "settings": {
            "threads": 1,
            "seconds_per_case_and_mode": 8.0,
            "seed": 1,
            "malloc": {},
            "cold_l2": False,
            "bandwidth_gb_s": {"copy": 20.0, "sum": 15.0},
            "load_average": [0.1, 0.2],
        },
        "environment": {
            "cpu": "Example CPU",
            "cores": 2,
            "cores_allowed": 1,
            "memory_gib": 8,
            "system": "Linux",
            "python": "3.11",
            "torch": "2.13",
            "numpy": "2.0",
            "rivals": {},
            "tritool": {"tritool": "0.1.0", "paths": {"cpu": "native", "cuda": ""}},
            "git": {"commit": "0" * 40, "dirty": False, "library_older_than_sources": False},
        },
        "cases": [case, slower_than_a_rival, broken],
    }


# ---- the schema ----


def check_schema(result: Json) -> None:
    assert set(result) == set(made_up())
    assert result["schema"] == run.SCHEMA
    assert result["device"] in ("cpu", "cuda")
    assert set(result["settings"]) == set(made_up()["settings"])
    bandwidth = result["settings"]["bandwidth_gb_s"]
    assert set(bandwidth) == {"copy", "sum"}
    assert min(bandwidth.values()) > 0
    assert set(result["environment"]) - {"gpu"} == set(made_up()["environment"])
    assert ("gpu" in result["environment"]) == (result["device"] == "cuda")
    assert result["cases"]
    for case in result["cases"]:
        assert set(case) - {"failure", "operands_mib"} == set(made_up()["cases"][0])
        assert case["unit"] in ("px", "mm", "value")
        if "failure" not in case:
            check_case(case)


def check_case(case: Json) -> None:
    names = [row["name"] for row in case["variants"]]
    assert names[0] == "tritool"
    assert len(names) == len(set(names)) > 1
    for row in case["variants"]:
        assert row["kind"] in ("tritool", "pytorch", "compiled", "package")
        if "failure" in row:
            assert row["times"] == {}
            continue
        error = row["error"]
        assert row["accurate"] == (error["not_finite"] == 0 and error["p999"] <= case["tolerance"])
        assert "forward" in row["times"]
        for measured in row["times"].values():
            assert measured["rounds"] >= bench.MIN_ROUNDS
            assert 0 < measured["best_ms"] <= measured["q1_ms"] <= measured["median_ms"]
            assert measured["median_ms"] <= measured["q3_ms"]
            assert 0 < measured["ratio_q1"] <= measured["ratio"] <= measured["ratio_q3"]
    assert case["variants"][0]["accurate"], "tritool itself must be accurate"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results(path: Path) -> None:
    result = json.loads(path.read_text())
    check_schema(result)
    assert not result["quick"]
    assert path.stem == "--".join((result["suite"], result["machine"], result["device"]))
    assert path.parent.name == result["environment"]["tritool"]["tritool"]
    assert not any("failure" in case for case in result["cases"])
    names = [f"{case['op']} {case['size']}" for case in result["cases"]]
    assert len(names) == len(set(names))


@pytest.mark.skipif(not COMMITTED, reason="no results are committed")
def test_every_operation_has_a_committed_result() -> None:
    results = report.load(BENCHMARKS / "results")
    measured = next(r for r in results if (r["suite"], r["device"]) == ("ops", "cpu"))
    assert {case["op"] for case in measured["cases"]} == {spec.op for spec in suites.specs()}


def test_quick_run_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "quick.json"
    assert run.main(["--quick", "--only", "triangulate", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    check_schema(result)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]  # nothing half-written
    rows = {row["name"]: row for row in result["cases"][0]["variants"]}
    assert not rows["eigh of A^T A, float32"]["accurate"]
    assert rows["eigh of A^T A, float64"]["accurate"]
    assert set(rows["tritool"]["times"]) == set(bench.MODES)
    assert set(rows["tritool"]["peak_memory_mib"]) == set(bench.MODES)
    assert rows["tritool"]["gradient_error"]["weights"]["median"] < 1e-3
    readme = tmp_path / "README.md"
    readme.write_text(
        report.with_block(f"{report.BEGIN}{report.END}", report.readme_block([result]))
    )
    assert "`triangulate` | N=51 C=4" in readme.read_text()


def test_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no case contains 'nothing'"):
        run.main(["--quick", "--only", "nothing"])
    if not torch.cuda.is_available():
        assert run.main(["--quick", "--device", "cuda"]) == 1
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


# ---- cases and rivals ----


@pytest.mark.parametrize("spec", suites.specs(quick=True), ids=lambda spec: spec.op)
def test_variants_agree_with_float64(spec: Any) -> None:
    case = spec.build("cpu")
    exact = bench.Exact(case)
    for variant in case.variants:
        measured = bench.accuracy(case, variant, exact)
        accurate = measured["error"]["p999"] <= spec.tolerance
        assert accurate == (variant.name != "eigh of A^T A, float32"), variant.name
        if variant.kind == "tritool":  # a rival's gradient may be poor; that is for the report
            for error in measured["gradient_error"].values():
                assert error["p999"] < 1e-3


def test_two_view_rivals_are_compared_without_weights() -> None:
    case = triangulate_case(40, 2, "cpu")
    exact = bench.Exact(case)
    unweighted = [variant for variant in case.variants if "weights" not in variant.uses]
    assert {variant.kind for variant in unweighted} >= {"tritool"}
    for variant in unweighted:
        assert bench.accuracy(case, variant, exact)["error"]["median"] < 0.1, variant.name
        assert "no weights" in variant.note
    uses = ("points", "projections")
    assert np.abs(exact.result(uses) - exact.result((*uses, "weights"))).max() > 0.1


def test_an_inaccurate_result_is_noticed() -> None:
    spec = next(spec for spec in suites.specs(quick=True) if spec.op == "project")
    case = spec.build("cpu")
    shifted = suites.Variant(
        "shifted", "pytorch", lambda **x: project_einsum(**x) + 1, ("points", "projections")
    )
    error = bench.accuracy(case, shifted, bench.Exact(case))["error"]
    assert error["median"] == pytest.approx(2**0.5, rel=1e-3)


def test_errors_that_are_not_finite_are_counted() -> None:
    spread = bench.spread_of_errors(np.array([1.0, np.nan, 3.0, np.inf]))
    assert spread == {"not_finite": 2, "median": 2.0, "p999": 2.998, "max": 3.0}
    assert bench.spread_of_errors(np.array([np.nan]))["median"] is None


def test_rivals_are_compiled_but_for_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    case = worker.with_compiled(triangulate_case(5, 4, "cpu"))
    names = [variant.name for variant in case.variants if variant.kind == "compiled"]
    assert "torch.compile(batched svd)" in names
    plain = [variant.name for variant in case.variants if variant.kind == "pytorch"]
    loops = [name for name in plain if name.startswith("loop")]
    assert loops
    assert len(names) == len(plain) - len(loops)


def test_times_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    measured = bench.time_calls(calls, "a", "cpu", seconds=0.01)
    assert measured["a"]["ratio"] == 1.0
    runs = [name for before, name in zip(["", *order], order, strict=False) if name != before]
    assert "".join(runs) == "abc" * (len(runs) // 3)
    assert len(runs) >= 3 * bench.MIN_ROUNDS


def test_peak_memory_counts_what_is_freed() -> None:
    """In a fresh process whose malloc gives pages back: 32 MiB that live only during the call."""
    if not bench.can_reset_peak():
        pytest.skip(reason="this system does not let a process reset the peak of its memory")
    program = (
        "import bench, torch\nprint(bench.peak_memory(lambda: torch.ones(8 << 20).sum(), 'cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=BENCHMARKS,
        env={**os.environ, **bench.RETURNED_PAGES},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 31 < float(done.stdout) < 36


def test_machine_slug_names_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, slug in {
        "AMD EPYC 9354 32-Core Processor": "amd-epyc-9354",
        "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz": "intel-xeon-e5-2680-v4",
    }.items():
        monkeypatch.setattr(bench, "cpu_model", lambda model=model: model)
        assert bench.machine_slug("cpu") == slug


# ---- compare ----


def test_compare_says_what_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = made_up(), made_up()
    rows = after["cases"][0]["variants"]
    rows[0]["times"]["forward"] = times(2.04)  # beyond the quartiles, but not by 5 %
    rows[0]["times"]["forward_backward"] = times(3.0)
    rows[3]["times"]["forward"] = times(40.0, 20.0)
    noisy = times(30.0, 12.0) | {"q1_ms": 20.0}  # by more than 5 %, but within the quartiles
    rows[4]["times"]["forward"] = noisy
    found = {(m.variant, m.mode): m.factor for m in compare.moves(before, after)}
    assert found == {
        ("tritool", "forward_backward"): pytest.approx(1.5),
        ("slow", "forward"): pytest.approx(40 / 60),
    }
    assert [m.variant for m in compare.moves(before, after, relative=True)] == ["slow"]
    assert list(compare.moves(before, before)) == []

    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, result in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(result))
    names = [str(path) for path in paths]
    assert compare.main(names) == 0
    assert compare.main([*names, "--fail"]) == 1
    assert compare.main([*names[::-1], "--fail"]) == 0
    assert "slower    1.50x" in capsys.readouterr().out


# ---- report ----


def test_report_prints_losses_and_leaves_out_the_inaccurate() -> None:
    block = report.readme_block([made_up()])
    assert "wrong but fast" not in block
    assert "package" not in block
    assert (
        "| `triangulate` | N=7 C=4 | forward | less slow | 2 | 24 | 12x | 1.0e-04 / 1.0e-04 mm |"
        in block
    )
    assert "| less slow | 2 | 0.8 | 0.4x |" in block
    assert "N=9" not in block  # a case that failed has no figures
    assert "Example CPU, 1 thread; 2024-06-07; tritool 0.1.0, commit 0000000000" in block
    assert "CUDA kernels have not been timed" in block
    page = report.docs_page([made_up()], "images")
    assert "wrong but fast (*not accurate*)" in page
    assert "Not measured: status -11." in page


def test_report_is_idempotent_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, readme, docs = tmp_path / "results", tmp_path / "README.md", tmp_path / "docs"
    for version, date in {"0.9.0": "1999-01-01", "0.10.0": "2024-06-07"}.items():
        (results / version).mkdir(parents=True)
        (results / version / "ops--example-cpu--cpu.json").write_text(
            json.dumps(made_up() | {"date": f"{date}T00:00:00Z"})
        )
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    options = ["--results", str(results), "--readme", str(readme), "--docs", str(docs)]
    assert report.main([*options, "--check"]) == 1
    assert "is not what the results say" in capsys.readouterr().err
    assert "old" in readme.read_text()

    assert report.main(options) == 0
    texts = [readme.read_text(), (docs / "benchmarks.md").read_text()]
    assert "2024-06-07" in texts[0]  # of the highest version, not of the last by name
    assert texts[0].startswith(f"before\n{report.BEGIN}\n")
    assert texts[0].endswith(f"{report.END}\nafter\n")
    pictures = sorted((docs / "images").iterdir())
    assert len(pictures) == 4
    assert all(picture.stat().st_size > 1000 for picture in pictures)
    assert all(f"images/{picture.name}" in texts[0] + texts[1] for picture in pictures)
    assert report.main([*options, "--check"]) == 0
    pictures[0].unlink()
    assert report.main([*options, "--check"]) == 1
    assert report.main(options) == 0
    assert texts == [readme.read_text(), (docs / "benchmarks.md").read_text()]

    readme.write_text(texts[0].replace("12x", "13x"))
    assert report.main([*options, "--check"]) == 1
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold"):
        report.main(options)


def test_every_sweep_has_sizes() -> None:
    """Of one thing, the others alike; or its panel would be empty, or show steps that are none."""
    cases = [
        {"op": spec.op, "size": spec.size, "shape": spec.shape, "variants": []}
        for spec in suites.specs()
    ]
    for sweep in plots.SWEEPS:
        found = sweep.cases({"cases": cases})
        sizes = [case["shape"][sweep.axis] for case in found]
        assert len(sizes) >= 2, sweep
        assert sizes == sorted(set(sizes)), sweep
        side = {"X", "Y", "Z"} if sweep.axis == "X" else {sweep.axis}
        assert len({str({**case["shape"], **dict.fromkeys(side, 0)}) for case in found}) == 1, sweep


def test_share_of_bandwidth() -> None:
    shape = {"N": 1000, "C": 4}
    own = row("tritool", "tritool", 1.0)  # 2 ms
    case = {"op": "project", "size": "N=1000 C=4", "shape": shape, "variants": [own]}
    forward = 12 * 1000 + 48 * 4 + 8 * 4000  # points and matrices in, pixels out
    share = plots.share_of_bandwidth(case, own, "forward", {"copy": 0.01, "sum": 0.02})
    assert share == pytest.approx(forward / 2e-3 / 0.02e9)
    both = plots.share_of_bandwidth(case, own, "forward_backward", {"copy": 0.02, "sum": 0.01})
    assert both / share == pytest.approx((2 * forward + 12 * 1000) / forward)


# ---- the GPU's program ----


def test_gpu_test_without_a_gpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    assert gpu_test.main(["--output", str(output)]) == 1
    assert "nothing was run" in capsys.readouterr().err
    assert not output.exists()


def test_gpu_test_claims_only_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    junit = tmp_path / "report.xml"
    junit.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><skipped/></testcase>"
        "<testcase name='c'><failure/></testcase></testsuite></testsuites>"
    )
    assert gpu_test.junit_counts(junit) == {"passed": 1, "failed": 1, "skipped": 1}
    skipped = {"passed": 0, "failed": 0, "skipped": 4}
    monkeypatch.setattr(
        gpu_test, "command", lambda *_: {"outcome": "passed", "status": 0, "detail": ""}
    )
    monkeypatch.setattr(gpu_test, "junit_counts", lambda _: skipped)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert gpu_test.cuda_tests()["outcome"] == "failed"
    monkeypatch.undo()

    monkeypatch.setattr(gpu_test, "find_sanitizer", lambda: None)
    assert gpu_test.sanitizer("memcheck")["outcome"] == "not run"


def test_cuda_smoke_skips_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip(reason="there is a GPU; gpu_test.py runs the script under compute-sanitizer")
    script = ROOT / "tests" / "native" / "cuda_smoke.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 77
    assert "nothing was run" in done.stdout


def check_networks(result: Json) -> None:
    assert (result["schema"], result["suite"]) == (networks.SCHEMA, "networks")
    for case in result["cases"]:
        names = [row["name"] for row in case["variants"]]
        assert names in (list(networks.VERSIONS), ["tritool"])
        for row in case["variants"]:
            assert 0 < row["times"]["q1_ms"] <= row["times"]["median_ms"] <= row["times"]["q3_ms"]
            assert row["peak_memory_mib"] >= 0
            shares = row.get("op_shares", {"all": 0.0})  # files of before there were any
            assert all(0 <= share < 1 for share in shares.values())
            assert sum(shares.values()) == pytest.approx(2 * shares["all"])
    section = report.networks_section(result)
    assert all(case["size"] in section for case in result["cases"])


@pytest.mark.parametrize("path", COMMITTED_NETWORKS, ids=lambda path: path.stem)
def test_committed_networks(path: Path) -> None:
    result = json.loads(path.read_text())
    check_networks(result)
    assert not result["quick"]
    assert {case["size"] for case in result["cases"]} == {s.name for s in networks.specs(False)}


def test_networks_quick_run_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "networks.json"
    arguments = ["--quick", "--only", "algebraic", "--output", str(output)]
    assert networks.main(arguments) == 0
    result = json.loads(output.read_text())
    check_networks(result)
    assert [case["network"] for case in result["cases"]] == ["algebraic"]
    rows = {row["name"]: row for row in result["cases"][0]["variants"]}
    assert "op_shares" not in rows["plain PyTorch"]
    shares = rows["tritool"]["op_shares"]
    assert {"tritool::triangulate", "tritool::triangulate_backward"} < shares.keys()
    assert min(shares.values()) > 0


@pytest.mark.parametrize("network", ["algebraic", "volumetric"])
def test_both_geometries_of_a_network_give_the_same_loss(network: str) -> None:
    spec = next(s for s in networks.specs(True) if s.network == network)
    losses = []
    for version in networks.VERSIONS:
        step = networks.training_step(spec, "cpu")
        with networks.geometry(version):
            losses.append(float(step()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_fast_layers_leave_the_geometry_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 changes the loss by no more than its rounding; what is compiled are the layers."""
    spec = next(s for s in networks.specs(True) if s.network == "volumetric")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda layers: compiled.append(type(layers)) or layers)
    exact, fast = (
        float(networks.training_step(spec, "cpu", fast=fast)()) for fast in (False, True)
    )
    assert [layers.__name__ for layers in compiled] == ["PoseResNet", "V2V"]
    assert fast != exact
    assert fast == pytest.approx(exact, rel=0.02)


# ---- studies ----


def test_studies_are_summed_up_and_written_into_pages(tmp_path: Path) -> None:
    made = {"one": {0: {"mm": 10.0}, 1: {"mm": 14.0}}, "other": {0: {"mm": 1.0}, 1: {"mm": 3.0}}}
    rows = studies.summary(made)
    assert rows[0]["mm"] == {"mean": 12.0, "least": 10.0, "greatest": 14.0}
    text = studies.table(rows, {"mm": "error mm"})
    assert text.splitlines()[2:] == [
        "| one | 12.0 (10.0 to 14.0) |",
        "| other | 2.0 (1.0 to 3.0) |",
    ]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study:a -->\nold\n<!-- study:end -->\nafter\n")
    studies.insert(page, "a", text)
    assert page.read_text() == (f"before\n<!-- study:a -->\n{text}\n<!-- study:end -->\nafter\n")
    studies.insert(page, "b", "not there")
    assert "not there" not in page.read_text()


def test_settings_of_all_studies_are_known() -> None:
    for arms in studies.STUDIES.values():
        for arm in (*arms, studies.START):
            load_config("small-weak", overrides=arm.settings)


def check_calls(result: Json) -> None:
    assert (result["schema"], result["suite"]) == (calls.SCHEMA, "calls")
    names = [row["name"] for row in result["calls"]]
    assert names == list(calls.functions("cpu"))
    assert names[0] == result["reference"]
    for row in result["calls"]:
        for mode in ("no_grad", "forward_backward"):
            assert 0 < row[mode]["q1_ms"] <= row[mode]["median_ms"] <= row[mode]["q3_ms"]
    section = report.calls_section(result)
    assert all(f"`{name}`" in section for name in names)


@pytest.mark.parametrize("path", COMMITTED_CALLS, ids=lambda path: path.stem)
def test_committed_calls(path: Path) -> None:
    result = json.loads(path.read_text())
    check_calls(result)
    assert not result["quick"]
    assert f"## Small calls: {report.processor(result)}" in PAGE.read_text()


def test_calls_quick_run_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "calls.json"
    assert calls.main(["--quick", "--output", str(output)]) == 0
    check_calls(json.loads(output.read_text()))


def test_targets_stand_beside_what_was_reached() -> None:
    """In bold where they were not; nothing where none of the sizes was measured."""
    row = lambda name, kind, ratio: {  # noqa: E731
        "name": name, "kind": kind, "accurate": True,
        "times": {"forward": times(ratio, ratio), "forward_backward": times(ratio, ratio / 2)},
    }  # fmt: skip
    variants = [row("tritool", "tritool", 1.0), row("a", "pytorch", 9.0), row("b", "package", 1.5)]
    shape = {"B": 4, "C": 4, "J": 17, "H": 96, "W": 96}
    case = {"op": "soft_argmax2d", "size": "4x4x17x96x96", "shape": shape, "variants": variants}
    settings = {"bandwidth_gb_s": {"copy": 10.0, "sum": 8.0}}
    lines = report.targets_section({"cases": [case], "settings": settings}).splitlines()
    # 10.03 MB each way: 1.003 ms of memory, and thrice that with the backward.
    size = "| `soft_argmax2d` | 4x4x17x96x96"
    assert f"{size} | forward | a | 5x | 9x | 9x |" in lines
    assert f"{size} | forward + backward | a | 5x | **4.5x** | 3x |" in lines
    other = {"cases": [case | {"size": "another"}], "settings": settings}
    assert report.targets_section(other) == ""


def test_memory_of_a_call_stands_beside_its_target() -> None:
    op, size, _ = report.MEMORY_TARGET
    own = {"name": "tritool", "peak_memory_mib": {"forward_backward": 15.0}}
    operands = {"inputs": 4.0, "outputs": 6.0}
    case = {"op": op, "size": size, "operands_mib": operands, "variants": [own]}
    (text,) = report.memory_target({"cases": [case]})
    assert "25 MiB" in text
    assert "1.25 times" in text


def test_the_committed_study_is_in_the_readme() -> None:
    (path,) = (BENCHMARKS / "results").glob("*/study-networks--*.json")
    rows = json.loads(path.read_text())["rows"]
    assert studies.table(rows, studies.NETWORK_MEASURES) in (ROOT / "README.md").read_text()
