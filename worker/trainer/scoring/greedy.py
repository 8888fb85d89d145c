"""Writes `greedy.jsonl`: the tuned model's answers to some of the test rows, token by token.

The model server, loaded with the run's files, has to give the same answers before the model is published.
"""

from tunery.trainer_protocol import GREEDY, GreedyAnswer
from worker.trainer import report
from worker.trainer.scoring import answers
from worker.trainer.training import Training

MOST_ROWS = 64


def keep(t: Training, asked: list[answers.Question], given: list[list[int]]) -> None:
    """Writes rows spread over the file, with the exact prompts and answers of the model."""
    if not t.ranks.is_main:
        return
    limit = answers.token_limit(t.plan.evaluation, asked)
    every = max(1, -(-len(asked) // MOST_ROWS))
    kept = [
        GreedyAnswer(
            row=question.row,
            messages=question.messages,
            tools=question.tools,
            prompt_ids=question.prompt_ids,
            ids=ids,
            limit=limit,
        )
        for question, ids in list(zip(asked, given, strict=True))[::every]
    ]
    report.write_lines(t.folder / GREEDY, [one.model_dump(exclude_none=True) for one in kept])
