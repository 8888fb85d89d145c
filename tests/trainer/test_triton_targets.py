"""Compiles every Triton kernel for cards that this host does not have: `make test-triton`."""

from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: make test-triton"),
]
KIBIBYTE = 1024
OF_E4M3 = {"_quantise_rows", "_unpack_nf4_to_e4m3"}
"""Kernels of the number format e4m3, which cards have from compute capability 8.9 on."""


@pytest.mark.parametrize(
    ("capability", "limit"),
    [
        pytest.param(80, 99, id="A100"),  # it has 163, but what fits into 99 fits into every card
        pytest.param(86, 99, id="A10G"),
        pytest.param(89, 99, id="RTX 4090"),
        pytest.param(90, 227, id="H200"),
    ],
)
def test_every_kernel_compiles_and_fits_into_the_shared_memory(
    capability: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton_launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = triton_launches.compiled(capability)

    wanted = triton_launches.launched_kernels()
    assert found.keys() == {kernel for kernel in wanted if capability >= 89 or kernel[1] not in OF_E4M3}
    assert {kernel: own.shared for kernel, own in found.items() if own.shared > limit * KIBIBYTE} == {}
    early = {name for (_, name), own in found.items() if own.starts_early}
    assert early == ({"_expand"} if capability >= 90 else set())
    for (module, name), own in sorted(found.items()):
        print(f"sm{capability} {module.rpartition('.')[2]}.{name}: {own.shared} bytes of shared memory")
