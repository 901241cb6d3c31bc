from __future__ import annotations

import re

import pytest
import torch

from transfercache.backbones import available, choice
from transfercache.backbones.available import bf16_units, is_openvino_installed
from transfercache.backbones.choice import Choice, available_computes, choose_engine
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone
from transfercache.environment import processor_flags, processor_name
from transfercache.errors import ResourceError, TlcError, UsageError

CPU, CUDA, MPS = "cpu", "cuda", "mps"
AMX = {"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"}


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuda: bool = False,
    mps: bool = False,
    openvino: bool = False,
    flags: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Let this machine look like another."""
    monkeypatch.setattr(choice, "may_have_gpu", lambda: cuda or mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(available, "is_openvino_installed", lambda: openvino)
    monkeypatch.setattr(choice, "is_openvino_installed", lambda: openvino)
    monkeypatch.setattr(available, "processor_flags", lambda: set(flags))


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({}, Choice("eager", CPU, "fp32")),
        ({"openvino": True}, Choice("openvino", CPU, "fp32")),
        ({"openvino": True, "cuda": True}, Choice("eager", CUDA, "fp32")),
        ({"openvino": True, "mps": True}, Choice("eager", MPS, "fp32")),
    ],
)
def test_auto__takes_openvino_on_a_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, seen: dict[str, bool], expected: Choice
) -> None:
    machine(monkeypatch, **seen)
    assert choose_engine(device="auto") == expected


@pytest.mark.parametrize(
    ("seen", "words", "error", "message"),
    [
        ({}, ("egaer", "cpu", "auto"), UsageError, "unknown engine 'egaer' (did you mean eager?); known are eager, "),
        ({}, ("eager", "cpu", "int8"), UsageError, "unknown precision 'int8'; known are fp32, bf16, fp16"),
        ({}, ("compile", "auto", "auto"), UsageError, "--engine compile: torch.compile is for NVIDIA GPUs here, and"),
        (
            {},
            ("openvino", "auto", "auto"),
            ResourceError,
            "--engine openvino: it is not installed; install it with: pip install 'transfercache[openvino]'",
        ),
        (
            {"cuda": True, "openvino": True},
            ("openvino", "auto", "auto"),
            UsageError,
            "--engine openvino: computes on the CPU, not on cuda; pass --device cpu as well",
        ),
        (
            {},
            ("eager", "cpu", "bf16"),
            ResourceError,
            f"--compute bf16: {processor_name()} has no bfloat16 units (AMX or AVX-512 BF16) and would imitate them "
            "slowly; use fp32 here, whose embeddings have a cache of their own",
        ),
        ({"flags": AMX}, ("eager", "cpu", "fp16"), ResourceError, "--compute fp16: it needs an NVIDIA GPU, and this"),
        ({"mps": True}, ("eager", "mps", "bf16"), ResourceError, "--compute bf16: it needs an NVIDIA GPU, and this is"),
        (
            {"cuda": True},
            ("eager", "cuda", "bf16"),
            ResourceError,
            "--compute bf16: GeForce has no bfloat16 units and would imitate them slowly",
        ),
    ],
)
def test_what_cannot_be__is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    seen: dict[str, bool],
    words: tuple[str, str, str],
    error: type[TlcError],
    message: str,
) -> None:
    machine(monkeypatch, **seen)
    engine, device, compute = words
    with pytest.raises(error, match=re.escape(message)):
        choose_engine(engine, device=device, compute=compute)


def test_computes__are_those_of_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=True)
    assert available_computes(CPU) == ("fp32",)
    assert available_computes(CUDA) == ("fp32", "fp16")
    machine(monkeypatch, flags={"avx512_bf16"})
    assert (available_computes(CPU), bf16_units()) == (("fp32", "bf16"), ("AVX-512 BF16",))


def test_bf16_units__are_those_of_this_processor() -> None:
    assert ("AMX" in bf16_units()) == ("amx_bf16" in processor_flags())


def test_describe__says_what_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, openvino=True, flags=AMX)
    monkeypatch.setattr(choice, "n_cores", lambda: 2)
    start = f"on {processor_name()}, 2 cores"
    advice = "; this processor has AMX: --compute bf16 would be several times faster, its features within 1-2 % of the "
    assert choose_engine(device="cpu").describe() == f"engine openvino (fp32) {start}{advice}largest"
    assert choose_engine(device="cpu", compute="bf16").describe() == f"engine openvino (bf16) {start}"
    faster = "would be several times faster in bf16"
    eager = choose_engine("eager", device="cpu", compute="bf16")
    assert eager.describe() == f"engine eager (bf16) {start}; --engine openvino {faster}"
    machine(monkeypatch, flags=AMX)
    install = "(pip install 'transfercache[openvino]')"
    assert eager.describe() == f"engine eager (bf16) {start}; --engine openvino {install} {faster}"
    machine(monkeypatch, flags={"avx512_bf16"})  # without AMX nobody has measured what it is worth
    assert choose_engine(device="cpu").describe() == f"engine eager (fp32) {start}"
    machine(monkeypatch, cuda=True)
    assert choose_engine(device="auto").describe() == "engine eager (fp32) on GeForce"


@pytest.mark.parametrize(("device", "expected"), [(CPU, 32), (MPS, 32), (CUDA, 256)])
def test_batch_size__is_that_of_the_device(device: torch.device, expected: int) -> None:
    assert Choice("eager", device, "fp32").batch_size == expected


def test_build__makes_the_engine_of_that_name(resnet18: Backbone) -> None:
    assert type(choose_engine("eager", device="cpu").build(resnet18)) is EagerEngine
    if is_openvino_installed():
        assert type(choose_engine("openvino", device="cpu").build(resnet18)).__name__ == "OpenvinoEngine"
