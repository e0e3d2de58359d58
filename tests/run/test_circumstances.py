"""What a run notes of the machine, which no run is refused for."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether
from bettertogether.run.asked import accelerator, machine, processor


def test_the_machine_is_named_by_its_processor_and_by_a_gpu_that_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: False, get_device_name=lambda: "NVIDIA H100")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert machine().keys() == {"platform", "python", "cpus", "processor"}
    assert accelerator() == {}
    cuda.is_initialized = lambda: True
    assert accelerator() == {"accelerator": "NVIDIA H100"}
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: AMD EPYC\n")
    assert processor(cpuinfo) == "AMD EPYC"
    assert processor(tmp_path / "missing") == (platform.processor() or platform.machine())


def test_a_run_goes_on_on_another_machine_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = parity_program(parity_engine(learner))
    for name in ("first", "second"):
        monkeypatch.setattr("bettertogether.run.asked.processor", lambda name=name: name)
        compiled = BetterTogether(parity_match).compile(
            program, trainset=numbers(6), valset=numbers(6), strategy="p", run_dir=tmp_path / "run", progress=False
        )
    assert "machine.processor: the directory has 'first', this call has 'second'" in caplog.text
    assert compiled.report.machine["processor"] == "second"
