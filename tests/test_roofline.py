# SPDX-License-Identifier: Apache-2.0
"""The roofline: its arithmetic, its reading of machine code, and its page."""

from __future__ import annotations

import json
import math
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

launches = import_module("launches")
report = import_module("report")
roofline = import_module("roofline")
sass = import_module("sass")

RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = sorted(RESULTS.glob("*/roofline--*.json"))
SIZES = list(roofline.sizes())
any_case = pytest.mark.parametrize(
    ("op", "size", "shape"), SIZES, ids=[f"{op} {size}" for op, size, _ in SIZES]
)


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("registers", "shared", "block", "warps"),
    [
        (24, 0, 256, 64),  # the most there are
        (32, 0, 256, 64),
        (33, 0, 256, 48),  # given out in eights: 40 registers, 12 warps in each of four files
        (64, 0, 128, 32),
        (255, 0, 128, 8),
        (128, 0, 1024, 0),  # a block needs 32 warps, 16 fit
        (16, 0, 32, 32),  # at most 32 blocks
        (16, 100 << 10, 256, 16),  # two blocks of shared memory
        (16, 228 << 10, 256, 0),  # no room for the driver's KiB
    ],
)
def test_resident_warps(registers: int, shared: int, block: int, warps: int) -> None:
    assert roofline.resident_warps(registers, shared, block) == warps


def test_floors_divide_work_by_rates() -> None:
    work = {"instructions": 33.5e12, "float64": 0.0, "special": 33.5e12 / 80, "load/store": 0.0}
    floors = roofline.floors_us(int(4.3e6), 0, work)
    assert floors["memory"] == pytest.approx(1)
    assert floors["instructions"] == pytest.approx(1e6)
    assert floors["special"] == pytest.approx(1e5)
    assert "L2" not in floors
    # The same operations in float64 take twice as long.
    double = roofline.floors_us(0, int(5.5e12), work | {"float64": 33.5e12})
    assert double["float64"] == pytest.approx(2 * double["instructions"])
    assert double["L2"] == pytest.approx(1e6)


def test_targets() -> None:
    floors = {"memory": 17.0, "L2": 40.0}
    assert roofline.target_us("soft_argmax3d", {}, "backward", floors) == pytest.approx(20)
    assert roofline.target_us("unproject", {}, "forward", floors) == 80
    assert roofline.target_us("unproject", {}, "backward", floors) is None
    four_views = {"N": 2_000_000, "C": 4}
    assert roofline.target_us("triangulate", four_views, "forward", floors) == pytest.approx(1000)
    assert roofline.target_us("triangulate", four_views | {"C": 8}, "forward", floors) is None
    assert roofline.target_us("project", four_views, "forward", floors) == 17


# ---- sizes and launches ----


def test_operand_bytes_are_those_that_were_measured() -> None:
    measured = next(r for r in report.load(RESULTS) if r["suite"] == "ops")
    found = 0
    for case in measured["cases"]:
        if (operands := case.get("operands_mib")) is None:
            continue
        counted = roofline.operand_bytes(case["op"], case["size"], case["shape"], "forward")
        for name, mib in operands.items():
            assert counted[name] / 2**20 == pytest.approx(mib, abs=0.006), (case["size"], name)
        found += 1
    assert found >= 7


def test_the_backward_reads_what_the_forward_did_and_its_gradient() -> None:
    shape = {"N": 10, "C": 4}
    forward = roofline.operand_bytes("triangulate", "", shape, "forward")
    backward = roofline.operand_bytes("triangulate", "", shape, "backward")
    assert forward == {"inputs": 10 * 4 * 12 + 4 * 48, "outputs": 120}
    assert backward == {"inputs": sum(forward.values()), "outputs": 10 * 4 * 12}


@any_case
def test_launches_cover_all_elements(op: str, size: str, shape: dict[str, int]) -> None:
    """Threads times trips are the elements, whatever blocks and splits there are."""
    for mode in ("forward", "backward"):
        calls = launches.launches_of(op, size, shape, mode)
        for call in calls:
            assert 0 < call.threads <= call.blocks * call.block
        if op.startswith("soft_argmax"):
            call, loads = calls[0], math.prod(shape.values()) / 4
            assert call.threads * call.trips["load_index < loads"] == pytest.approx(loads)
        elif op == "unproject":
            (main,) = (c for c in calls if "Aggregation" in c.kernel)
            vectors = math.prod(shape[axis] for axis in "BXYZ") * shape["K"] // 4
            rounds = main.trips["round < tiling.rounds"] * main.trips.get(
                "tile < tiling.per_item", 1
            )
            assert main.threads * rounds == vectors
        else:
            # Four points share a thread for each view.
            share = shape["C"] / 4 if op == "project" and mode == "forward" else 1
            assert calls[0].threads == math.ceil(shape["N"] * share)


def test_ten_times_the_paper_is_among_the_sizes() -> None:
    sizes = {(op, size) for op, size, _ in SIZES}
    assert {("soft_argmax3d", f"{n}x17x64x64x64") for n in (4, 40)} <= sizes
    assert {("soft_argmax2d", f"{n}x4x17x96x96") for n in (4, 40)} <= sizes


# ---- machine code ----

SOURCE = """\
// line 1
for (int n = 0; n < count; ++n) {
  sum += from[n];
}
if (given) sum = given[0];
to[0] = sum;
"""
# The loop with two copies of its body, one more behind it, and a slow path that calls.
SECTION = """\
kernel,"ax",@progbits
\t//## File "{file}", line 1
        /*0000*/                   MOV R1, RZ ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
\t//## File "{file}", line 3
        /*0020*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/                   LDG.E R2, desc[UR4][R4.64+0x4] ;
        /*0050*/                   FADD R1, R1, R2 ;
\t//## File "{file}", line 2
        /*0060*/                   VIADD R0, R0, 0x2 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/              @!P2 BRA `(.L_x_3) ;
\t//## File "{file}", line 3
        /*0090*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*00a0*/                   FADD R1, R1, R2 ;
.L_x_3:
\t//## File "{file}", line 5
        /*00b0*/              @!P3 BRA `(.L_x_4) ;
        /*00c0*/                   LDG.E R1, desc[UR4][R6.64] ;
.L_x_4:
\t//## File "{file}", line 6
        /*00d0*/               @P4 BRA `(.L_x_5) ;
        /*00e0*/                   CALL.REL.NOINC `($slow) ;
.L_x_5:
        /*00f0*/                   MUFU.RCP R3, R1 ;
        /*0100*/              @!P5 STG.E desc[UR4][R8.64], R1 ;
        /*0110*/                   EXIT ;
.L_x_6:
        /*0120*/                   BRA `(.L_x_6);
"""


@pytest.fixture
def code(tmp_path: Path) -> Any:
    source = tmp_path / "source.cu"
    source.write_text(SOURCE)
    return sass.Code(SECTION.replace("{file}", str(source)))


def test_loops_run_as_often_as_said(code: Any) -> None:
    trips = {"n < count": 10}
    counts = sass.count(code, trips)
    # Ten copies of the body of two in the loop, none in what is left over, which is for odd counts.
    assert counts["LDG.E"] == 10 + 1
    assert counts["FADD"] == 10
    assert counts["VIADD"] == 5
    assert counts["CALL.REL.NOINC"] == 0
    kinds = sass.by_kind(counts)
    assert kinds["float32"] == 10
    assert kinds["special"] == 1
    assert kinds["load/store"] == 12
    assert kinds["float64"] == 0
    # Before the loop 2, in it 6 a turn, behind it 1 + 2 + 1 + 3.
    assert kinds["instructions"] == 2 + 5 * 6 + 7
    assert sass.count(code, {"n < count": 20}).total() - counts.total() == 5 * 6


def test_code_that_does_not_run_is_left_out(code: Any) -> None:
    counts = sass.count(code, {"n < count": 10}, skip=["if (given)"])
    assert counts["LDG.E"] == 10
    assert counts["STG.E"] == 1
    # Under a predicate it takes its turn all the same, but goes to no memory.
    counts = sass.count(code, {"n < count": 10}, skip=["to[0] = sum"])
    assert counts["STG.E"] == 0
    assert counts["predicated off"] > 0


def test_a_loop_without_a_trip_count_is_refused(code: Any) -> None:
    with pytest.raises(LookupError, match="how often does this run"):
        sass.count(code, {"another < count": 10})


@pytest.mark.parametrize(
    ("inside", "outside", "copies"),
    [
        (7, 0, 1),  # no leftover: not unrolled
        (28, 7, 4),  # a loop for the rest
        (28, 21, 4),  # steps of two and one for the rest
        (12, 6, 2),
        (38, 4, 1),  # an access that two ways through the body share, doubled
        (11, 4, 1),
    ],
)
def test_unrolling_is_seen_by_what_it_leaves_over(inside: int, outside: int, copies: int) -> None:
    assert sass.unrolled(inside, outside) == copies


# ---- results ----


@pytest.mark.skipif(not COMMITTED, reason="no roofline is committed")
def test_the_page_is_what_the_json_says() -> None:
    result = json.loads(COMMITTED[-1].read_text())
    assert (ROOT / "docs" / "roofline.md").read_text() == roofline.page(result)
    counted = {(case["op"], case["size"], case["mode"]) for case in result["cases"]}
    assert counted == {(op, size, m) for op, size, _ in SIZES for m in ("forward", "backward")}


@pytest.mark.skipif(not COMMITTED, reason="no roofline is committed")
def test_floors_are_no_measurements() -> None:
    """The report on measured times does not take them for some."""
    assert all("roofline" not in result["suite"] for result in report.load(RESULTS))


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = SimpleNamespace(find_cuda=lambda: None, NVCC_PACKAGES="some-packages")
    monkeypatch.setattr(roofline.check_ptxas, "load_setup", lambda: setup)
    assert roofline.main([]) == 1
    captured = capsys.readouterr()
    assert captured.err == "roofline.py needs nvcc; type: pip install some-packages\n"
    assert not captured.out


def test_compiled_projection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuda = roofline.check_ptxas.load_setup().find_cuda()
    if cuda is None:
        pytest.skip(reason="no nvcc here")
    if roofline.find_nvdisasm(cuda) is None:
        pytest.skip(reason="no nvdisasm here")
    if shutil.which("c++filt") is None:
        pytest.skip(reason="no c++filt here")
    page = ROOT / "docs" / "roofline.md"
    before = page.read_text() if page.exists() else None
    assert roofline.main(["--only", "project", "--output", str(tmp_path / "roofline.json")]) == 0
    assert capsys.readouterr().out.startswith("# Roofline\n")
    assert (page.read_text() if page.exists() else None) == before
    result = json.loads((tmp_path / "roofline.json").read_text())
    forward, backward = (case for case in result["cases"] if case["size"] == "N=100000 C=4")
    (launch,) = forward["launches"]
    assert launch["kernel"] == "project_rig_kernel<float>"
    assert launch["threads"] == 100_000
    assert launch["spilled_bytes"] == 0
    assert 16 <= launch["registers"] <= 128
    assert 16 <= launch["resident_warps"] <= 64
    # Four points and a matrix come in, four pixels go out: 18 operations and two divisions each.
    assert launch["global_memory_by_width"]["loads"] == {"4": 24}
    assert launch["global_memory_by_width"]["stores"] == {"8": 4}
    assert launch["per_thread"]["load/store"] == 28
    assert launch["per_thread"]["special"] >= 4
    assert 4 * 18 <= launch["per_thread"]["float32"] <= 4 * 60
    assert launch["per_thread"]["instructions"] < 4 * 100
    assert forward["floors_us"]["memory"] == pytest.approx(4_400_192 / 4.3e6, rel=1e-3)
    assert forward["floors_us"]["float64"] == 0
    # Four views in turn: a gradient, and a matrix from shared memory, where 48 elements were put by
    # 128 threads. The gradient of shared matrices is not asked for.
    (launch,) = backward["launches"]
    assert launch["per_thread"]["load/store"] == 3 + 4 * (1 + 3) + 3 + 2 * 48 / 128
