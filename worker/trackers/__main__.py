"""`python -m worker.trackers`: sends one run's measurements to one experiment tracker. See docs/decisions/0029.

Standard input: a line with the `Order` as JSON, then one line for each measurement, and a last line with the outcome;
none means interrupted. Keys and addresses are in the environment, under the names that the tracker's own library reads.
Standard output: the class of the error, if there is one, without its text, which may hold an address with a password.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Measures = dict[str, float]

_JOB = "tunery.job"
"""The tag by which a later attempt finds the run."""
_MOST_PARAM = 500
"""Characters of a parameter that every MLflow store accepts."""


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, step: int | None, measures: Measures) -> None:
        """Sends measurements of a step, or of the whole run if `step` is None."""

    def end(self, outcome: str) -> None:
        """Ends the run. `outcome`: succeeded, failed, or interrupted, from which another attempt resumes."""


def open_wandb(order: dict[str, Any]) -> Tracker:
    """Opens, or resumes, the Weights & Biases run whose id is the job's."""
    import wandb

    asked = order["wandb"]
    Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=asked["project"],
        name=asked.get("name") or order["job"],
        entity=asked.get("entity"),
        tags=asked.get("tags") or None,
        id=order["job"],
        resume="allow",
        config=order["config"],
        save_code=False,
        settings=wandb.Settings(console="off", disable_git=True, init_timeout=30),
    )
    return _Wandb(run)


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int | None, measures: Measures) -> None:
        if step is None:
            self._run.summary.update(measures)
        else:
            self._run.log(measures, step=step)

    def end(self, outcome: str) -> None:
        self._run.finish(exit_code=1 if outcome == "failed" else 0)


def open_mlflow(order: dict[str, Any]) -> Tracker:
    """Opens the experiment's MLflow run that has the job's tag, or a new one."""
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunTag

    client, asked = MlflowClient(), order["mlflow"]
    name = asked["experiment_name"]
    known = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name) if known is None else known.experiment_id
    found = client.search_runs([experiment], f"tags.`{_JOB}` = '{order['job']}'", max_results=1)
    if found:
        return _Mlflow(client, found[0].info.run_id)
    run = client.create_run(experiment, run_name=asked.get("run_name") or order["job"]).info.run_id
    params = [Param(param, str(value)[:_MOST_PARAM]) for param, value in order["config"].items()]
    client.log_batch(run, params=params, tags=[RunTag(_JOB, order["job"])])
    return _Mlflow(client, run)


class _Mlflow:
    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run

    def log(self, step: int | None, measures: Measures) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(name, value, now, step or 0) for name, value in measures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, outcome: str) -> None:
        if outcome != "interrupted":
            self._client.set_terminated(self._run, "FINISHED" if outcome == "succeeded" else "FAILED")


OPENERS: dict[str, Callable[[dict[str, Any]], Tracker]] = {"wandb": open_wandb, "mlflow": open_mlflow}


def main() -> int:
    """Returns 1 after any error, whose class is printed, and else 0."""
    # Libraries print to standard output, which must have nothing but this program's answer.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _tell(sys.stdin)
    except Exception as error:  # noqa: BLE001 (whatever a library raises, its class is the answer)
        said.write(type(error).__name__)
        said.close()
        return 1
    return 0


def _tell(lines: Any) -> None:
    order = json.loads(next(lines))
    tracker, outcome = OPENERS[order["type"]](order), "interrupted"
    for line in lines:
        entry = json.loads(line)
        if "outcome" in entry:
            outcome = entry["outcome"]
        else:
            tracker.log(entry["step"], entry["measures"])
    tracker.end(outcome)


if __name__ == "__main__":
    sys.exit(main())
