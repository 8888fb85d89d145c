"""Answers of several models to the same prompts, as the API spells them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.base import Answers, Body, ResponseBody

_ASK: dict[str, Any] = {
    "models": ["ft:SmolLM2-135M-Instruct:tunery:banking:Ab12Cd34"],
    "prompts": ["Where is my card?"],
    "max_completion_tokens": 32,
}
_COMPARED: dict[str, Any] = {
    "object": "model.comparison",
    "models": ["SmolLM2-135M-Instruct", "ft:SmolLM2-135M-Instruct:tunery:banking:Ab12Cd34"],
    "data": [
        {
            "object": "model.comparison.prompt",
            "index": 0,
            "messages": [{"role": "user", "content": "Where is my card?"}],
            "answers": [
                {
                    "model": "SmolLM2-135M-Instruct",
                    "content": "I'm sorry to hear that.",
                    "finish_reason": "stop",
                    "prompt_tokens": 14,
                    "completion_tokens": 8,
                },
                {
                    "model": "ft:SmolLM2-135M-Instruct:tunery:banking:Ab12Cd34",
                    "content": "card_arrival",
                    "finish_reason": "stop",
                    "prompt_tokens": 14,
                    "completion_tokens": 4,
                },
            ],
            "same": False,
        }
    ],
}
ANSWER: Answers = {200: {"content": {"application/json": {"example": _COMPARED}}}}
Prompt = str | list[dict[str, Any]]


class AskComparison(Body):
    """Which models answer what. A fine-tuned model alone is compared with its base."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ASK]})

    models: list[str] = Field(min_length=1, max_length=4, description="Ids, aliases or hub ids of the models")
    prompts: list[Prompt] = Field(
        min_length=1, max_length=32, description="Each is a user's text or the messages of a chat"
    )
    system: str | None = Field(None, description="A system message for each prompt that is a text")
    max_completion_tokens: int = Field(256, ge=1, description="Token limit of an answer")
    temperature: float = Field(0, ge=0, le=2, description="0: always the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, description="Used for every answer")

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Returns the chat that a prompt stands for."""
        if not isinstance(prompt, str):
            return prompt
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]

    def sampling(self) -> dict[str, Any]:
        """Returns the fields of every chat completion that are the same."""
        names = {"max_completion_tokens", "temperature", "top_p", "seed"}
        return self.model_dump(include=names, exclude_none=True)


class ComparedAnswer(ResponseBody):
    """One model's answer."""

    model: str
    content: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class ComparedPrompt(ResponseBody):
    """A prompt and its answers, in the order of `models`."""

    object: Literal["model.comparison.prompt"] = "model.comparison.prompt"
    index: int
    messages: list[dict[str, Any]]
    answers: list[ComparedAnswer]
    same: bool = Field(description="Whether all answers are identical")


class Comparison(ResponseBody):
    """Every model's answer to every prompt."""

    object: Literal["model.comparison"] = "model.comparison"
    models: list[str] = Field(
        description="The models in the given order; if the base was not named, its id comes first"
    )
    data: list[ComparedPrompt]
