"""Prints a job for `tunery jobs show`, and the next command."""

import time
from typing import Any

from rich.text import Text

from tunery.cli import output, quotes
from tunery.cli.routes import as_commands
from tunery.local.terminal import duration
from tunery.spec import Hyperparameters
from tunery.trainer_protocol import Served

_NEXT = {
    "validating_files": "tunery jobs watch {id}",
    "queued": "tunery jobs watch {id}",
    "running": "tunery jobs watch {id}",
    "paused": "tunery jobs resume {id}",
    "failed": "tunery jobs events {id}",
    "succeeded": "tunery jobs download {id}",
}


def print_job(job: dict[str, Any]) -> None:
    """Prints a job's fields, its warnings and the next command."""
    output.fields([("id", job["id"]), ("status", output.status(job["status"])), *_run(job), *_request(job)])
    output.warnings(job["warnings"])
    if job["status"] in _NEXT:
        output.hint(_NEXT[job["status"]].format(id=job["id"]))


def why_nothing(job: dict[str, Any]) -> str:
    """Returns why a job has not made what was asked for, as the end of a sentence."""
    reason = (job.get("error") or {}).get("message")
    text = f"it {job['status']}. {reason}" if reason else f"it is {job['status']}."
    return f"{text} `{_NEXT.get(job['status'], 'tunery jobs events {id}').format(id=job['id'])}` has the details."


def _run(job: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the progress, or what the job waits for."""
    progress, error, finish = job["progress"], job.get("error") or {}, job["estimated_finish"]
    total, loss = progress["total_steps"], progress.get("train_loss")
    return [
        ("error", Text(as_commands(error["message"]), style="red") if error.get("message") else None),
        ("waits for", job["waits_for"]),
        ("phase", job["phase"]),
        ("step", f"{progress['step']}/{total}" if total else None),
        ("loss", f"{loss:.3f}" if loss is not None else None),
        ("time left", duration(finish - time.time()) if finish else None),
    ]


def _request(job: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("model", job["model"]),
        ("base", job["base_model"] if job["base_model"] != job["model"] else None),
        ("tuned model", job["fine_tuned_model"]),
        ("runs again", job.get("rerun_of")),
        ("method", _method(job["method"])),
        ("technique", compact(job.get("technique"))),
        ("hyperparameters", compact(job["hyperparameters"])),
        ("training file", job["training_file"]),
        ("validation file", job["validation_file"]),
        ("test file", job["evaluation"]["test_file"]),
        ("trained tokens", f"{job['trained_tokens']:,}" if job["trained_tokens"] else None),
        ("created", f"{output.age(job['created_at'])} ago"),
        *quotes.fields(job),
        *_scorecard(job.get("scorecard")),
        ("gate", _gate(job.get("gate") or {})),
        ("served", _served(job.get("served"))),
        *_general((job.get("scorecard") or {}).get("general")),
    ]


def _gate(gate: dict[str, Any]) -> str:
    """Returns the gate's decision, or its requirements."""
    if gate.get("status") is None:
        return compact(gate, skip=("checks",))
    return f"{gate['status']}{_publishing(gate)} ({gate_reasons(gate)})"


def _served(served: dict[str, Any] | None) -> str | None:
    """Returns whether the model server gave the scorecard's answers, in words."""
    return None if served is None else f"{served['status']}{_publishing(served)} ({served_reason(served)})"


def served_reason(served: dict[str, Any]) -> str:
    """Returns what was compared, and the first difference."""
    return Served.model_validate(served).summary


def _publishing(verdict: dict[str, Any]) -> str:
    """Returns what a verdict withholds, and who has published it anyway."""
    kept = f", withholds {verdict['withheld_model']}" if verdict["withheld_model"] else ""
    by = verdict["published"]
    return kept + (f", published by {by['key']}: {by['reason']}" if by else "")


def gate_reasons(gate: dict[str, Any]) -> str:
    """Returns each limit and what was measured."""
    return "; ".join(
        f"{check['name']} {check['limit']:g}: {check['status']}"
        + ("" if check["value"] is None else f", {check['value']:.3f} ({check['low']:.3f} to {check['high']:.3f})")
        for check in gate["checks"]
    )


def _method(method: dict[str, Any]) -> str | None:
    """Returns a method other than supervised, with its own hyperparameters; those of every method stand apart."""
    knobs = (method.get(method["type"]) or {}).get("hyperparameters") or {}
    own = {name: value for name, value in knobs.items() if name not in Hyperparameters.model_fields}
    return None if method["type"] == "supervised" else f"{method['type']}  {compact(own)}".rstrip()


def _general(score: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Returns what base and tuned model can do besides the task."""
    if not score:
        return []
    names = {"base": "base_accuracy", "tuned": "tuned_accuracy", "gain": "change", "low": "change_low"}
    found = {name: score[key] for name, key in names.items()} | {"high": score["change_high"]}
    moved = score.get("forgetting")
    return [
        ("general", f"{_measure(found, 'change')} on {score['items']} questions of {score['benchmark']}"),
        ("forgetting", _forgetting(moved) if moved else None),
    ]


def _forgetting(moved: dict[str, Any]) -> str:
    """`KL 0.120 (0.101 to 0.143) nats per token, loss 2.310 -> 2.290 on 100 general prompts`"""
    low, high, before, after = (moved[name] for name in ("kl_low", "kl_high", "base_nll", "tuned_nll"))
    return (
        f"KL {moved['kl']:.3f} ({low:.3f} to {high:.3f}) nats per token, loss {before:.3f} -> {after:.3f} on "
        f"{moved['prompts']} general prompts"
    )


def print_scorecard(card: dict[str, Any]) -> None:
    """Prints both models' figures on the test rows and on the general benchmark."""
    output.fields([*_scorecard(card), *_general(card.get("general"))])


def _scorecard(card: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Returns the scorecard and its metrics, the primary one first."""
    if not card:
        return []
    metrics = sorted(card["metrics"].items(), key=lambda named: named[0] != card["primary"])
    parts = [f"{card['rows']} rows", card["task"] and f"task {card['task']}"]
    parts += [f"judged by {card['primary']}", card["scored_in"] and f"scored in {card['scored_in']}"]
    return [
        ("scorecard", ", ".join(filter(None, parts))),
        *((name, _measure(found)) for name, found in metrics),
        *_unquantised(card.get("unquantised"), card["primary"]),
    ]


def _unquantised(score: dict[str, Any] | None, primary: str) -> list[tuple[str, Any]]:
    """Returns the primary metric on the unquantised base, and the tuned model's difference from that on four bits."""
    if not score:
        return []
    if score["left_out"]:
        return [("unquantised", f"not scored: {score['left_out']}")]
    found = score["metrics"][primary]
    low, apart, high = (f"{100 * found[f'difference{end}']:+.1f}" for end in ("_low", "", "_high"))
    return [
        (f"in {score['scored_in']}", _measure(found)),
        ("difference", f"{apart} points ({low} to {high}) for the tuned model, from its {primary} above"),
    ]


def _measure(found: dict[str, Any], word: str = "gain") -> str:
    """`12.0 % -> 86.0 %, gain +74.0 points (+65.1 to +81.0)`"""
    low, gain, high = (f"{100 * found[name]:+.1f}" for name in ("low", "gain", "high"))
    return f"{found['base']:.1%} -> {found['tuned']:.1%}, {word} {gain} points ({low} to {high})"


def print_answers(rows: list[dict[str, Any]]) -> None:
    """Prints each row of a scorecard: question, reference, and both answers with a tick or a cross."""
    for row in rows:
        marks = {name: "✓" if row[f"{name}_right"] else "✗" for name in ("base", "tuned")}
        asked = str(row["messages"][-1].get("content") or "") if row["messages"] else ""
        output.console.print(Text(f"{row['number']}  {asked}"), soft_wrap=True)
        output.fields(
            [("   expected", row["wanted"])]
            + [(f" {mark} {name}", row[name] or "(nothing)") for name, mark in marks.items()]
        )
    if not rows:
        output.note("No such row.")


def compact(value: dict[str, Any] | None, skip: tuple[str, ...] = ()) -> str:
    """`name=value` of each that is known, on one line."""
    return "  ".join(f"{name}={short(v)}" for name, v in (value or {}).items() if name not in skip and v is not None)


def short(value: Any) -> str:
    """Formats a value, a number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
