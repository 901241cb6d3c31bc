"""The batch job and the container file: what they say is done here, with a launcher in place of Slurm's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from transfercache.cache.reader import open_cache
from transfercache.cli.main import app

REPOSITORY = Path(__file__).resolve().parents[1]
JOB = REPOSITORY / "scripts" / "extract_job.sbatch"
# What the job itself adds to the user's words.
ADDED = ["--part", "1/8", "--workers", "8"]

Submit = Callable[..., "subprocess.CompletedProcess[str]"]


def write_program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Runs the job in tmp_path as one task of Slurm's, whose srun and scontrol are stood in for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs / "srun", 'exec "$@"')
    write_program(programs / "scontrol", 'echo "$@" >>requeued')

    def run(*words: str, tlc: str, **slurm: str) -> subprocess.CompletedProcess[str]:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "TLC": tlc, "SLURM_JOB_ID": "7", **slurm}
        return subprocess.run(
            ["bash", str(JOB), *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_job__its_parts_and_the_gathering__make_one_cache(submit: Submit, tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / "photos").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i:02}.png")
    words = ("photos", "--backbone", "mobilenet_v3_small", "--weights", "random")
    tlc = str(Path(sys.executable).with_name("tlc"))
    for task in ("1", "2"):
        array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": "2"}
        done = submit(*words, tlc=tlc, **array)
        assert done.returncode == 0, done.stderr
        assert f"{(32, 8)[int(task) - 1]} computed" in done.stdout
    done = submit(*words, tlc=tlc, SLURM_CPUS_PER_TASK="2")
    assert done.returncode == 0, done.stderr
    assert "0 computed, 40 reused" in done.stdout
    cache = open_cache(tmp_path / done.stdout.splitlines()[0])
    assert cache.table().features.shape == (40, 1024)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("code", "array", "requeued"),
    [
        (143, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "8"}, "requeue 5_3\n"),
        (143, {}, "requeue 7\n"),
        (3, {}, None),
    ],
)
def test_job__is_queued_again_where_it_was_told_to_end(
    submit: Submit, tmp_path: Path, code: int, array: dict[str, str], requeued: str | None
) -> None:
    write_program(tmp_path / "ended", f"exit {code}")
    assert submit("photos", tlc=str(tmp_path / "ended"), **array).returncode == code
    found = tmp_path / "requeued"
    assert (found.read_text() if found.exists() else None) == requeued


def test_job__the_commands_it_shows_are_those_of_the_command_line() -> None:
    text = JOB.read_text()
    shown = re.findall(r"^# .*sbatch .*scripts/extract_job\.sbatch ([^)\n]+)", text, flags=re.MULTILINE)
    assert len(shown) == 2
    command = typer.main.get_command(app).commands["extract-features"]
    for words in shown:
        given = command.make_context("extract-features", [*shlex.split(words), *ADDED]).params
        assert (given["data"], given["device"], given["compute"], given["part"]) == ("photos/", "cuda", "bf16", "1/8")
    # A signal that reaches the step, and early enough to commit.
    assert re.search(r"^#SBATCH --signal=TERM@\d+$", text, flags=re.MULTILINE)


def test_container__installs_what_there_is() -> None:
    text = (REPOSITORY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE):
        assert all((REPOSITORY / name).exists() for name in line.split()[:-1])
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    (extras,) = re.findall(r'"/src\[(.*?)\]"', text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert {project["readme"], *project["license-files"]} <= set(text.split())
    assert 'ENTRYPOINT ["tlc"]' in text
    assert "tlc" in project["scripts"]
