# SPDX-License-Identifier: Apache-2.0
"""The report on compiled CUDA kernels reads PTX rightly; no compiler needed."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "native" / "check_ptxas.py"
spec = importlib.util.spec_from_file_location("check_ptxas", SOURCE)
assert spec is not None
assert spec.loader is not None
check_ptxas = importlib.util.module_from_spec(spec)
sys.modules["check_ptxas"] = check_ptxas  # dataclasses look their module up
spec.loader.exec_module(check_ptxas)

PTX = """
.visible .entry first(
\t.param .u64 first_param_0
)
{
\tld.param.u64 \t%rd1, [first_param_0];
\t@%p1 ld.global.nc.L2::128B.v4.f32 \t{%f1, %f2, %f3, %f4}, [%rd1];
\tld.global.u16 \t%rs1, [%rd1];
\tld.f32 \t%f5, [%rd2];
\tld.shared.v4.f32 \t{%f1, %f2, %f3, %f4}, [%r1];
\tred.global.add.noftz.f16x2 \t[%rd1], %r2;
\tatom.shared::cta.add.u32 \t%r3, [%r1], 1;
\t@!%p12 st.global.v2.b64 \t[%rd1], {%rd3, %rd4};
}
.visible .entry second(
)
{
\tst.global.f64 \t[%rd1], %fd1;
}
"""


def test_accesses_of_global_memory_are_counted_by_width() -> None:
    (first, body), (second, rest) = check_ptxas.entries(PTX)
    assert (first, second) == ("first", "second")
    traffic = check_ptxas.parse_traffic(first, body)
    # A pointer to anywhere counts; shared memory and parameters do not.
    assert traffic.loads == {2: 1, 4: 1, 16: 1}
    assert traffic.stores == {16: 1}
    assert traffic.atomics == {4: 1}
    # 32 lanes of 2, 4 and 16 bytes are 64, 128 and 512 bytes: 2, 4 and 16 sectors.
    assert traffic.sectors == {"loads": 22, "stores": 16, "atomics": 4}
    assert check_ptxas.parse_traffic(second, rest).stores == {8: 1}


@pytest.mark.parametrize(
    ("kernel", "width"),
    [
        ("moments_rows_kernel<Float16, true, 8>", 8),
        ("moments_backward_rows_kernel<double, 1>", 1),
        ("moments_rows_kernel<double, (Keep)2, 2>", 2),
        ("unproject_kernel<float, (Aggregation)2, 4>", 4),
        ("unproject_backward_kernel<BFloat16, (Aggregation)0, 8>", 8),
        ("unproject_features_kernel<float, true>", None),
        ("moments_lanes_kernel<float, true>", None),
        ("triangulate_kernel<float>", None),
    ],
)
def test_vector_kernels_are_known_by_name(kernel: str, width: int | None) -> None:
    found = [int(match[1]) for rule in check_ptxas.VECTOR_KERNELS if (match := rule.search(kernel))]
    assert found == ([] if width is None else [width])


def test_names_of_kernels_lose_namespaces_and_parameters() -> None:
    """As nvcc has them: anonymous namespaces by a hash, enumerators by their number."""
    if shutil.which("c++filt") is None:
        pytest.skip(reason="no c++filt here")
    unit = "_GLOBAL__N__8e7ab3ad_17_unproject_cuda_cu_2c8f40e1_30551"
    mangled = (
        f"_ZN7tritool{len(unit)}{unit}16unproject_kernelIfLNS_8baseline11AggregationE2ELi4EEEv"
        "NS_15UnprojectParamsIT_EENS0_6TilingE"
    )
    assert check_ptxas.demangle([mangled])[mangled] == "unproject_kernel<float, (Aggregation)2, 4>"
