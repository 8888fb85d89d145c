"""Writes the event texts about a model's measurements."""

from tunery import trainer_protocol as protocol


def general_message(score: protocol.GeneralScore) -> str:
    """Describes the general ability of the base and the tuned model in a sentence or two."""
    text = (
        f"General ability on {score.items} questions: {score.base_accuracy:.1%} before, {score.tuned_accuracy:.1%} "
        f"after; change {100 * score.change:+.1f} points (95 % interval {100 * score.change_low:+.1f} to "
        f"{100 * score.change_high:+.1f})"
    )
    moved = score.forgetting
    if moved is None:
        return text
    return (
        f"{text}. On {moved.prompts} general prompts: KL to the base {moved.kl:.3f} nats per token (95 % interval "
        f"{moved.kl_low:.3f} to {moved.kl_high:.3f}), loss {moved.base_nll:.2f} before, {moved.tuned_nll:.2f} after"
    )


def replay_message(replay: protocol.Replayed) -> str:
    """Describes the replay rows that are mixed into training against forgetting."""
    rows = f"{replay.rows_an_epoch} an epoch, {replay.share:.1%} of its rows"
    if replay.source != "self":
        return f"Replay of {replay.rows} of {replay.prompts} rows of {replay.source}: {rows}"
    return (
        f"Replay of {replay.rows} of the base's own answers: {rows}. It completed {replay.ended} of {replay.prompts} "
        "answers"
    )


_DEMANDS = {
    "min_task_gain": "gain on the task at least",
    "max_general_drop": "drop of general accuracy at most",
    "max_kl": "KL to the base at most",
}


def gate_message(verdict: protocol.Gated) -> str:
    """Describes the gate's decision and the figures behind it."""
    kept = "withheld" if verdict.withheld else "published"
    return f"Gate {verdict.status}, so the model is {kept}: {'; '.join(map(_check_message, verdict.checks))}"


def _check_message(check: protocol.GateCheck) -> str:
    demand = f"{_DEMANDS[check.name]} {check.limit:g}"
    if check.value is None:
        return f"{demand}: not measured ({check.status})"
    return f"{demand}: {check.value:.3f} (95 % interval {check.low:.3f} to {check.high:.3f}; {check.status})"
