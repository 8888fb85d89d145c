"""Workers start with a complete setup or exit; none runs without taking work."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_nvml
import pytest
from seaweed import Seaweed
from sqlalchemy import select
from workshop import ROOT, Workshop, training_rows

from tunery import processes
from tunery.jobs.model import HostDevice
from worker.app import app


def driver(workshop: Workshop, *gpus: dict[str, Any], fails: int = 0) -> dict[str, str]:
    """Returns the environment of a worker on a host with the driver library of tests/fixtures/fake_nvml.py."""
    file = workshop.folder / "driver.json"
    fake_nvml.write(file, gpus, fails=fails)
    fixtures = str(Path(fake_nvml.__file__).parent)
    return {"TUNERY_PLUGINS": "fake_nvml", "FAKE_NVML": str(file), "PYTHONPATH": fixtures}


def model_server(**settings: str) -> subprocess.CompletedProcess[str]:
    """Runs a model server with these settings, which must keep it from starting, to its end."""
    command, environment = [sys.executable, "-m", "worker.server"], {**os.environ, **settings}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("queue", ["io", "train"])
def test_a_worker_that_cannot_use_its_storage_ends_and_says_why(workshop: Workshop, queue: str) -> None:
    worker = workshop.start(queue, TUNERY_STORAGE_URL="ftp://nowhere")
    assert worker.wait(60) == 2
    assert "Error: TUNERY_STORAGE_URL should be file:///DIRECTORY" in processes.tail(
        workshop.folder / f"{queue}.log", 60
    )


def test_a_worker_whose_storage_refuses_it_ends_and_names_the_setting(workshop: Workshop, seaweed: Seaweed) -> None:
    worker = workshop.start("io", **seaweed.environment("x") | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"})
    assert worker.wait(60) == 2
    said = processes.tail(workshop.folder / "io.log", 60)
    assert "AWS_SECRET_ACCESS_KEY should be a key that this server issued." in said
    assert "Traceback" not in said


@pytest.mark.parametrize("queue", ["io", "train"])
def test_worker_without_its_plug_in_ends_and_names_it(workshop: Workshop, queue: str) -> None:
    worker = workshop.start(queue, TUNERY_PLUGINS="toy_that_is_nowhere")
    assert worker.wait(60) == 1
    assert "The plug-in 'toy_that_is_nowhere' cannot be" in processes.tail(workshop.folder / f"{queue}.log", 60)


@pytest.mark.usefixtures("settings")
def test_model_server_without_its_plug_in_ends_and_names_it() -> None:
    ran = model_server(TUNERY_PLUGINS="toy_that_is_nowhere")
    assert ran.returncode == 1
    assert "The plug-in 'toy_that_is_nowhere' cannot be" in ran.stderr


@pytest.mark.usefixtures("settings")
def test_model_server_without_its_gpu_ends_and_names_the_setting() -> None:
    ran = model_server(TUNERY_SERVE_GPU="93")
    assert ran.returncode == 2
    assert "Error: TUNERY_SERVE_GPU is 93, but CUDA finds no such GPU here" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_worker_whose_driver_fails_ends_and_says_what_to_do(workshop: Workshop) -> None:
    worker = workshop.start("train", **driver(workshop, fails=6))
    assert worker.wait(60) == 1
    assert "set CUDA_VISIBLE_DEVICES to an empty value" in processes.tail(workshop.folder / "train.log", 60)


def test_the_devices_are_looked_for_once_before_the_slots_start(workshop: Workshop) -> None:
    """A slot that waited as long as some drivers take would be killed as dead, and so would its successor."""
    worker = workshop.start("train", TUNERY_POLL_SECONDS="60", **driver(workshop, fake_nvml.gpu("GPU-aaaa")))
    workshop.until(lambda: _shown(workshop), "the device is shown")
    asked = (workshop.folder / "driver.asked").read_text().split()
    assert asked.count(str(worker.pid)) == 1
    assert app.conf.worker_proc_alive_timeout > 60, "the setup of a slot may still take long"


def test_a_worker_that_is_stopped_withdraws_its_devices(workshop: Workshop) -> None:
    worker = workshop.start("train", **driver(workshop, fake_nvml.gpu("GPU-aaaa")))
    workshop.until(lambda: _shown(workshop), "the device is shown")
    worker.terminate()
    worker.wait(60)
    with workshop.session() as session:
        (device,) = session.scalars(select(HostDevice))
    assert device.stopped_at is not None
    assert device.stopped_at > device.seen_at


_BROKEN = """
import worker.app

def start_pollers(*_):
    raise RuntimeError("for the test")

worker.app.start_pollers = start_pollers
worker.app.app.worker_main(["worker", "-Q", "io", "-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle"])
"""


@pytest.mark.usefixtures("workshop")
def test_a_slot_that_cannot_be_set_up_ends_its_worker_even_without_a_broker() -> None:
    ran = subprocess.run([sys.executable, "-c", _BROKEN], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "RuntimeError: for the test" in ran.stderr


def _shown(workshop: Workshop) -> list[str]:
    with workshop.session() as session:
        return [device.device for device in session.scalars(select(HostDevice)) if device.gpu_index == 0]


@pytest.mark.slow
def test_a_job_is_given_to_the_trainer_that_waits_for_it(workshop: Workshop) -> None:
    """The slot's first look starts a trainer, the job runs in it, and the next trainer starts after it."""
    workshop.start("io")
    workshop.start("train", TUNERY_PRELOAD_TRAINER="true")
    (waiting,) = workshop.until(workshop.trainers, "a process waits")
    assert waiting.cmdline()[-1] == "--wait"

    job = workshop.submit(workshop.file(training_rows(12)))
    workshop.until_state(job, "succeeded")

    recorded = workshop.attempts(job)[0].process
    assert recorded is not None
    assert recorded["pid"] == waiting.pid
    assert "memory plan: " in workshop.log(job)
    (following,) = workshop.until(lambda: [found for found in workshop.trainers() if found != waiting], "the next one")
    assert following.cmdline()[-1] == "--wait"
