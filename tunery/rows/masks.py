"""Decides which tokens of a chat are learned: all answers, the last answer, or everything without weight 0."""

from typing import NamedTuple, Self

from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example
from tunery.rows.turns import trained_turns
from tunery.spec import LossOn


class Mask(NamedTuple):
    """Which tokens are learned. `turns`: indexes of the assistant messages that are tokenised apart from the text
    around them; `unlearned`: the masked ones among them; `with_prompts`: whether the text around them is learned."""

    turns: tuple[int, ...] = ()
    unlearned: frozenset[int] = frozenset()
    with_prompts: bool = False

    @classmethod
    def of(cls, example: Example, loss_on: LossOn) -> Self:
        """Returns the mask of a row. Raises CannotRender if the row's weights leave nothing to learn."""
        trained = trained_turns(example)
        if loss_on == "assistant":
            return cls(trained)
        answers = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
        if loss_on == "all":
            return cls(tuple(answers), frozenset(answers) - frozenset(trained), with_prompts=True)
        if answers[-1] not in trained:
            raise CannotRender(
                reason=f"Message {answers[-1] + 1}, the last answer, has the weight 0, but loss_on 'last_assistant' "
                "trains on no other. Give it the weight 1, or leave loss_on out."
            )
        return cls((answers[-1],))

    def label_prompt(self, ids: list[int], ignored: int, start: int = 0) -> list[int]:
        """Returns the labels of tokens outside the turns, those before `start` left out."""
        return ids[start:] if self.with_prompts else [ignored] * (len(ids) - start)

    def label_answer(self, index: int, ids: list[int], ignored: int) -> list[int]:
        """Returns the labels of a turn's tokens."""
        return [ignored] * len(ids) if index in self.unlearned else ids


ANSWERS = Mask()
"""Learns only the tokens of the turns."""
