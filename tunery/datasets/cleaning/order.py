"""The order for a cleaning: an action for each kind of finding, rows to drop, and a held-out part."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tunery.errors import InvalidValue
from tunery.spec import Columns, Float, Int

ActionName = Literal["drop", "keep_one", "redact", "fix"]


class _Possible(NamedTuple):
    """The possible actions for a kind of finding, the recommended one, and the minimum score for it."""

    actions: tuple[ActionName, ...]
    recommended: ActionName | None = None
    min_score: float = 0.0


_DROP = _Possible(("drop",), "drop")
_ASK = _Possible(("drop",))
_KEEP_ONE = _Possible(("keep_one", "drop"), "keep_one")
_NOTHING = _Possible(())
_MEASURED = ("untrained", "answer_cut")
"""Kinds that need a base's tokenizer and chat template; `too_long` is estimated without."""
_NOT_COMPARED = "Leaks are found by comparison. Name the test or validation file in 'against'."
_NOT_MEASURED = "Tokens are counted by a base's tokenizer and chat template. Name the model in 'base'."
_NOT_UPLOADED = "The server knows what the rows are compared with. Upload the file, and clean it by its id."
_NOT_JUDGED = (
    "Only a report that was made with a base names implausible answers. Request the file's report with this 'base' and "
    "the same 'columns', and clean the file when the report is ready."
)
INVALID = "invalid_row"
IMPLAUSIBLE, TRUNCATED = "implausible_output", "truncated_output"
"""Kinds that a base judges: the first only in the report of an uploaded file, the other alone or with a base."""
_UPLOADED = ("repeated_elsewhere", "benchmark_overlap")
"""Kinds only for uploaded files: the server has the other files and the benchmark to compare with."""

ACTIONS: dict[str, _Possible] = {
    INVALID: _DROP,
    "wrong_roles": _Possible(("fix", "drop"), "fix"),
    "wrong_calls": _DROP,
    "empty_output": _DROP,
    TRUNCATED: _DROP,
    "too_long": _DROP,
    "untrained": _DROP,
    "answer_cut": _DROP,
    "pii": _Possible(("redact", "drop"), "redact"),
    "test_leak": _DROP,
    "repeated_elsewhere": _ASK,
    "benchmark_overlap": _DROP,
    "exact_duplicate": _KEEP_ONE,
    "near_duplicate": _KEEP_ONE,
    "contradiction": _DROP,
    # Below this score most rows are labelled correctly.
    "mislabelled": _Possible(("drop",), "drop", 0.5),
    "inconsistent_output": _DROP,
    "refusal": _ASK,
    "answer_is_prompt": _DROP,
    "dominant_answer": _ASK,
    "other_script": _ASK,
    "other_language": _ASK,
    IMPLAUSIBLE: _ASK,
    "low_diversity": _NOTHING,
    "label_imbalance": _NOTHING,
}
"""By kind. Without a recommended action a kind is left alone unless a person chooses one: its rows may be intended."""
OF_SEVERAL = ("contradiction", "near_duplicate", "exact_duplicate")
"""Kinds about several rows. They are handled after rows with other findings are dropped, so that a better one stays."""


class Action(BaseModel):
    """What is done with the rows that findings of one kind name."""

    model_config = ConfigDict(extra="forbid")

    kind: str = Field(description="Kind of finding, as in the report")
    action: ActionName
    min_score: Float = Field(0.0, ge=0, le=1, description="Findings with a lower score are ignored")


class RowChoice(BaseModel):
    """Rows that a person has chosen."""

    model_config = ConfigDict(extra="forbid")

    drop: list[Int] = Field([], description="Lines on which rows begin, as in the report")


class HeldOut(BaseModel):
    """Rows that are put into a file of their own."""

    model_config = ConfigDict(extra="forbid")

    share: Float = Field(0.1, gt=0, le=0.5, description="Approximate share of the remaining rows")
    seed: Int = Field(0, ge=0, description="The same seed holds out the same rows")


class Cleaning(BaseModel):
    """What a cleaning does."""

    model_config = ConfigDict(extra="forbid")

    actions: list[Action] = Field([], description="The action for each kind of finding")
    recommended: bool = Field(False, description="Apply the report's suggestion to kinds without an action")
    rows: RowChoice = Field(RowChoice(), description="Actions on single rows, by line")
    held_out: HeldOut | None = Field(None, description="Moves a fraction of the rows to a second file")
    max_tokens: Int = Field(2048, ge=1, description="Token limit of a row")
    columns: Columns | None = Field(None, description="The file's columns by part, if they have other names")

    def check(self, *, compared: bool, measured: bool, uploaded: bool, judged: bool) -> None:
        """Raises InvalidValue if an action is not possible, or nothing is to be done.

        `compared`: there is another file to find leaks in; `measured`: a base counts tokens; `uploaded`: the server's
        files and benchmark are available; `judged`: a base's report is available.
        """
        missing = {
            **({} if compared else {"test_leak": _NOT_COMPARED}),
            **({} if measured else dict.fromkeys(_MEASURED, _NOT_MEASURED)),
            **({} if uploaded else dict.fromkeys(_UPLOADED, _NOT_UPLOADED)),
            **({} if judged else {IMPLAUSIBLE: _NOT_JUDGED}),
        }
        for number, one in enumerate(self.actions):
            _check(one, f"actions.{number}")
            if one.kind in missing:
                raise InvalidValue(param=f"actions.{number}.kind", reason=missing[one.kind])
        if len({one.kind for one in self.actions}) < len(self.actions):
            raise InvalidValue(param="actions", reason="A kind has two actions. Choose one for each kind.")
        if any(line < 1 for line in self.rows.drop):
            raise InvalidValue(param="rows.drop", reason="Lines are counted from 1.")
        if not (self.actions or self.recommended or self.rows.drop or self.held_out):
            reason = "The request changes nothing. Set 'actions', 'recommended', 'rows' or 'held_out'."
            raise InvalidValue(param="actions", reason=reason)

    def chosen(self) -> Mapping[str, Action]:
        """Returns the action of each kind."""
        found = {one.kind: one for one in self.actions}
        if self.recommended:
            for kind, possible in ACTIONS.items():
                if possible.recommended and kind not in found:
                    found[kind] = Action(kind=kind, action=possible.recommended, min_score=possible.min_score)
        return found


def check_other(source: str, against: str) -> None:
    """Raises InvalidValue if a file, by its sha256, is compared with itself: every row would be a leak."""
    if source == against:
        reason = "It has the same content as the file that is cleaned. Name a test or validation file with other rows."
        raise InvalidValue(param="against", reason=reason)


def _check(one: Action, param: str) -> None:
    possible = ACTIONS.get(one.kind)
    if possible is None:
        kinds = ", ".join(kind for kind, known in ACTIONS.items() if known.actions)
        raise InvalidValue(param=f"{param}.kind", reason=f"No finding has the kind '{one.kind[:40]}'. Kinds: {kinds}.")
    if not possible.actions:
        reason = f"No action can correct '{one.kind}': the file needs other rows. Remove the action."
        raise InvalidValue(param=f"{param}.kind", reason=reason)
    if one.action not in possible.actions:
        reason = f"'{one.action}' is not an action for '{one.kind}'. Possible actions: {', '.join(possible.actions)}."
        raise InvalidValue(param=f"{param}.action", reason=reason)
