from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from transfercache.backbones import available, choice
from transfercache.backbones.available import auto_engine
from transfercache.commands import doctor as doctor_module
from transfercache.commands.doctor import Diagnosis, doctor
from transfercache.environment import processor_name


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CPU of no special units, and without OpenVINO."""
    doctor()  # what it loads, torch's decoders among it, is not to be loaded by a torch that is patched
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for module in (available, choice):
        monkeypatch.setattr(module, "is_openvino_installed", lambda: False)
    monkeypatch.setattr(available, "processor_flags", lambda: {"avx2"})


def text_of(diagnosis: Diagnosis) -> list[str]:
    return str(diagnosis.render()).splitlines()


@pytest.mark.usefixtures("plain")
def test_doctor__of_a_plain_machine__names_what_is_missing() -> None:
    found = doctor()
    assert found.devices == [{"device": "cpu", "name": processor_name(), "engine": "eager", "computes": ["fp32"]}]
    assert (found.device, found.bf16_units, found.advice) == ("cpu", (), None)
    assert [(engine["engine"], engine["devices"]) for engine in found.engines] == [
        ("eager", ["cpu"]),
        ("openvino", []),
        ("compile", []),
    ]
    lines = text_of(found)
    assert [decoder["decode"] for decoder in found.decoders] == ["pillow", "fast", "draft"]
    assert "decode pillow: can be loaded" in lines
    assert f"device cpu (auto): {processor_name()}; engine eager (auto); precisions fp32" in lines
    assert "engine openvino: --engine openvino: it is not installed; install it with: pip install " in "\n".join(lines)
    assert found.next_command == ("tlc", "extract-features", "my_photos/")


@pytest.mark.usefixtures("plain")
def test_doctor__of_a_machine_with_amx__says_that_bf16_would_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "processor_flags", lambda: {"avx2", "amx_bf16", "avx512_bf16"})
    found = doctor()
    assert found.bf16_units == ("AMX", "AVX-512 BF16")
    assert found.devices[0]["computes"] == ["fp32", "bf16"]
    assert found.advice is not None
    assert found.advice in text_of(found)
    assert found.next_command == ("tlc", "extract-features", "my_photos/", "--compute", "bf16")


def test_doctor__of_this_machine__has_versions_and_the_engine_of_auto() -> None:
    document = json.loads(json.dumps(doctor().to_json()))
    assert document["versions"]["torch"] == metadata.version("torch")
    assert document["machine"]["processor"] == processor_name()
    (cpu,) = [device for device in document["devices"] if device["device"] == "cpu"]
    assert cpu["engine"] == auto_engine("cpu")
    assert document["device"] in [device["device"] for device in document["devices"]]


def test_doctor__says_what_a_missing_decoder_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    for module in [name for name in sys.modules if name.startswith(("torchcodec.", "transfercache.images.fast"))]:
        monkeypatch.delitem(sys.modules, module)
    found = doctor()
    reasons = {decoder["decode"]: decoder["reason"] for decoder in found.decoders}
    assert (reasons["pillow"], reasons["draft"]) == (None, None)
    assert "install it: pip install 'transfercache[fast]'" in reasons["fast"]
    assert f"decode fast: {reasons['fast']}" in text_of(found)


def test_doctor__says_which_folders_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("TRANSFERCACHE_DIR", str(tmp_path / "taken" / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not/yet"))
    found = {folder["what"]: folder for folder in doctor().folders}
    assert list(found) == ["caches", "models", "weights", "data and converted networks"]
    assert found["caches"] == {"what": "caches", "path": f"{tmp_path}/taken/cache", "is_writable": False}
    assert found["models"]["path"] == f"{tmp_path}/models"
    assert found["weights"]["path"] == f"{os.environ['TORCH_HOME']}/hub/checkpoints"
    kept = found["data and converted networks"]
    assert kept == {**kept, "path": f"{tmp_path}/not/yet/transfercache", "is_writable": True}
    assert not (tmp_path / "not").exists()  # looking makes nothing
    assert f"caches: {tmp_path}/taken/cache (cannot be written)" in text_of(doctor())


def test_command_line__prints_the_same(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from transfercache.cli.main import app

    ended = CliRunner().invoke(app, ["doctor", "--json"])
    assert ended.exit_code == 0
    assert json.loads(ended.stdout) == json.loads(json.dumps(doctor_module.doctor().to_json()))
    assert ended.stderr.startswith("next: tlc extract-features my_photos/")
