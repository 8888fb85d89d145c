"""What only the model server refuses."""

from tunery.errors import Unavailable


class AnswerTooSlow(Unavailable):
    """The answer was not complete after {seconds:g} seconds, the longest time that this server gives one. Ask for fewer
    tokens with 'max_completion_tokens', or stream the answer and keep what came."""

    code = "answer_too_slow"
