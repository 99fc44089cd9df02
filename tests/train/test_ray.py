"""`veneer train --launcher ray`: what it refuses without Ray, and runs on Ray whose workers die."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import Run
from tests.support.commands import refused
from tests.support.extras import needs
from tests.support.launched import steps, train, wait_for_all
from tests.support.runs import same_folders
from tests.train.test_elastic import CHANGES

from veneer.cli import run
from veneer.cli.train import _check_flags
from veneer.errors import ConfigError, TrainingError, VeneerError
from veneer.train import checkpoint
from veneer.train.run import fit

Make = Callable[..., Any]


class Driver:
    """`veneer train run.yaml --launcher ray --workers 2`, given in the folder of run.yaml, on a Ray
    of its own."""

    def __init__(self, config: Any, folder: Path, temporary: Path, *flags: str) -> None:
        file = folder / f"{config.output.name}.yaml"
        file.write_text(yaml.safe_dump({**config.content(), "output": config.output.name}))
        line = [sys.executable, "-W", "ignore", "-m", "veneer.cli", "train", file.name]
        own = {
            "RAY_ADDRESS": "local",
            "RAY_worker_niceness": "0",
            "RAY_TMPDIR": str(temporary),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.log = folder / f"{config.output.name}-{time.monotonic_ns()}.txt"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*line, "--launcher", "ray", "--workers", "2", *flags],
                cwd=folder, stdout=out, stderr=subprocess.STDOUT,
                env={**os.environ, **own, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not happened():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.002)

    def workers(self) -> list[Any]:
        import psutil

        return [
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if "RayTrainWorker" in one.name()
        ]

    def wait(self) -> int:
        return self.process.wait(300)


@pytest.fixture
def run_on_ray(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Driver]]:
    """`run_on_ray(config)`: starts a `Driver`, which does not outlive the test."""
    import tempfile

    drivers: list[Driver] = []
    with tempfile.TemporaryDirectory(
        prefix="ray", ignore_cleanup_errors=True
    ) as temporary:  # a socket's path is short

        def start(config: Any, *flags: str) -> Driver:
            drivers.append(Driver(config, tmp_path, Path(temporary), *flags))
            return drivers[-1]

        yield start
        for driver in drivers:
            driver.process.kill()
            driver.wait()


#: each refused before anything is read; what is wrong, and what the error says of it
REFUSED = {
    "--launcher ray": "--launcher ray without --workers",
    "--workers 2": "--workers without --launcher",
    "--max-restarts 0": "--max-restarts without --launcher",
    "--launcher ray --workers 2 --dry-run": "--dry-run with --launcher ray",
    "--launcher ray --workers 2 --find-rate": "--find-rate with --launcher ray",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_do_not_go_together(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "no-such-file.yaml", *flags.split()]) == 2
    refused(Run(2, *capsys.readouterr()), REFUSED[flags])


def test_without_ray_it_says_what_to_install(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.content()))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "veneer.train.ray", raising=False)
    assert run(["train", str(tmp_path / "run.yaml"), "--launcher", "ray", "--workers", "2"]) == 2
    refused(Run(2, *capsys.readouterr()), r"pip install 'veneer\[cluster\]'")
    assert not config.output.exists()


def test_two_launchers() -> None:
    with pytest.raises(
        ConfigError, match="--launcher ray in 2 processes that another launcher started"
    ):
        _check_flags(2, False, False, "ray", 2, None)


@pytest.mark.parametrize("asked_at", [4, None])
def test_a_run_can_be_told_to_stop(make: Make, whole: Any, asked_at: int | None) -> None:
    config, asked = make("stopped"), []
    stopped = fit(
        config, quiet=True, stop_order=lambda: asked.append(None) or len(asked) == asked_at
    )
    assert stopped.interrupted is (asked_at is not None)
    assert stopped.steps == (asked_at or whole.steps)
    assert len(asked) == stopped.steps
    assert stopped.losses == whole.losses[: stopped.steps]
    if asked_at:
        assert checkpoint.newest(config.output) == (stopped.checkpoint, asked_at)


def elsewhere() -> ConfigError:
    error = ConfigError("On rank 1: no")
    error.reported_elsewhere = True
    return error


def gone() -> TrainingError:
    try:
        raise TrainingError("a process that is gone") from RuntimeError("Connection closed by peer")
    except TrainingError as error:
        return error


class ForeignError(Exception):
    """One that cannot be made anew from its text."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


# : what a worker raises, whether Ray is to start again after it, and what the driver raises if it
# did so in vain
ERRORS: dict[str, tuple[Exception, bool, type[Exception]]] = {
    "setting": (ConfigError("no"), False, ConfigError),
    "not finite": (TrainingError("the loss is nan"), False, TrainingError),
    "disk": (OSError(28, "No space left on device"), False, OSError),
    "bug": (KeyError("x"), False, KeyError),
    "bug of others": (ForeignError(1, 2), False, RuntimeError),
    "device": (RuntimeError("out of memory"), True, RuntimeError),
    "gone": (gone(), True, TrainingError),
    "elsewhere": (elsewhere(), True, TrainingError),
}


@needs("ray")
@pytest.mark.slow
@pytest.mark.parametrize("case", ERRORS)
def test_what_is_tried_again(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ControllerError, WorkerGroupError

    from veneer.train import ray as bridge

    raised, again, expected = ERRORS[case]
    said: list[str] = []

    class Context:
        get_world_rank = staticmethod(lambda: 1)

    class Line:
        class say:
            remote = staticmethod(said.append)

    def work(asked: Any) -> None:
        raise raised

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bridge, "get_context", Context)
    monkeypatch.setattr(bridge.ray, "get", lambda value: value)
    with pytest.raises((VeneerError, OSError, KeyError, RuntimeError)) as found:
        bridge._run_worker({"work": work, "channel": None, "folder": str(tmp_path)})
    error = pickle.loads(pickle.dumps(found.value))  # as it reaches the controller
    watch = bridge.WatchFailures(Line, 2)
    if again:
        watch.after_exception(None, {1: error})
        assert "Worker 1 of 2 failed" in said[0]
        end: Exception = WorkerGroupError("", {1: error})
    else:
        with pytest.raises(type(error)) as stopped:
            watch.after_exception(None, {0: RuntimeError("not yet told"), 1: error})
        end = ControllerError(stopped.value)
    with pytest.raises(expected) as last:
        bridge._raise_failure(end, 3)
    assert type(last.value) is expected
    assert ("ForeignError: 1 and 2" in str(last.value)) is (case == "bug of others")
    assert any("test_ray.py" in note for note in getattr(last.value, "__notes__", [])) is (
        case in ("bug", "bug of others", "device")
    )


@needs("ray", "psutil")
@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(
    make: Make, tmp_path: Path, run_on_ray: Callable[..., Driver]
) -> None:
    whole, config = (make(name, **CHANGES) for name in ("whole", "killed"))
    wait_for_all(train(whole, tmp_path, 2))
    driver, moments = run_on_ray(config), random.Random(time.time())
    target = moments.randint(6, 25)
    driver.until(lambda: steps(config.output) >= target)
    time.sleep(moments.random() * 0.03)
    moments.choice(driver.workers()).send_signal(signal.SIGKILL)
    assert driver.wait() == 0, driver.said
    same_folders(config.output, whole.output)
    said = driver.said
    assert "of 2 died. All start again" in said
    assert "Resuming from step" in said
    assert said.count("Done     30 steps") == said.count("Next:") == 1
    assert "Traceback" not in said
    again = run_on_ray(config)  # refused by the workers, which are not started again
    assert again.wait() == 2, again.said
    assert "All start again" not in again.said
    assert again.said.count("holds a finished run") == again.said.count("Error:") == 1
    assert "Traceback" not in again.said


@needs("ray", "psutil")
@pytest.mark.slow
def test_ctrl_c_ends_with_a_checkpoint(
    make: Make, tmp_path: Path, run_on_ray: Callable[..., Driver]
) -> None:
    changes = {**CHANGES, "max_steps": 400, "save_every": 300}
    whole, config = (make(name, **changes) for name in ("whole", "stopped"))
    wait_for_all(train(whole, tmp_path, 2))
    driver = run_on_ray(config)
    driver.until(lambda: steps(config.output) >= 10)
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait() == 130, driver.said
    assert (
        driver.said.count("Stopping after this step") == driver.said.count("Stopped at step") == 1
    )
    assert "To go on:  veneer train stopped.yaml --launcher ray --workers 2" in driver.said
    assert "Traceback" not in driver.said
    newest = checkpoint.newest(config.output)
    assert newest is not None
    assert 10 <= newest[1] < 300
    wait_for_all(train(config, tmp_path, 2))  # whoever started it
    same_folders(config.output, whole.output)
