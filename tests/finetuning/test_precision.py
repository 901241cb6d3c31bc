from __future__ import annotations

import pytest
import torch

from transfercache.backbones.engines import autocast
from transfercache.errors import ResourceError
from transfercache.finetuning import precision
from transfercache.finetuning.precision import describe_compute, training_compute

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("units", "expected"),
    [(("AMX", "AVX-512 BF16"), "bf16"), (("AVX-512 BF16",), "fp32"), ((), "fp32")],
)
def test_training_compute__auto_takes_bf16_where_there_is_amx(
    monkeypatch: pytest.MonkeyPatch, units: tuple[str, ...], expected: str
) -> None:
    for module in ("finetuning.precision", "backbones.choice"):
        monkeypatch.setattr(f"transfercache.{module}.bf16_units", lambda: units)
    assert training_compute("auto", CPU) == expected
    assert training_compute("fp32", CPU) == "fp32"


def test_training_compute__auto_on_a_gpu_asks_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"has bf16": ("fp32", "bf16", "fp16"), "older": ("fp32", "fp16")}
    for computes in known.values():
        monkeypatch.setattr(precision, "available_computes", lambda device, computes=computes: computes)
        expected = "bf16" if "bf16" in computes else "fp32"
        assert training_compute("auto", torch.device("cuda")) == expected


def test_training_compute__what_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"^--compute fp16: .+ trains in fp32"):
        training_compute("fp16", CPU)
    monkeypatch.setattr("transfercache.backbones.choice.bf16_units", lambda: ())
    with pytest.raises(ResourceError, match=r"^--compute bf16: .+ trains in fp32$"):
        training_compute("bf16", CPU)


@pytest.mark.parametrize(("compute", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast__of_a_product(compute: str, dtype: torch.dtype) -> None:
    with autocast(compute, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_describe_compute__says_where_half_precision_ends() -> None:
    assert describe_compute("bf16", CPU).startswith("training in bf16 on ")
    assert describe_compute("bf16", CPU).endswith("; evaluation in fp32 (--compute fp32 trains in it too)")
    assert "evaluation" not in describe_compute("fp32", CPU)
