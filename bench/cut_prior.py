"""Makes `tunery/datasets/report/cut_prior.json`, which the classifier of truncated answers starts from:
`python -m bench.cut_prior ROWS.jsonl...`.

Each file has chat rows with free-form answers, which `bench.report` must not judge; functions of Tunery are one more
file. Their answers are cut as the report cuts those of a file, in groups as large as a small file, since the features
compare an answer with others of its file. The figures in use are of 1,650 rows of yizhongw/self-instruct
(data/finetuning/t0_train_50k, up to 14 a template, Apache-2.0) and 500 of GPTeacher's role play (MIT).
"""

import ast
import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from bench import service
from tunery.datasets.report import cut_model, dictionary, endings, rows
from tunery.datasets.report.rows import Row, Turn
from tunery.datasets.report.vocabulary import Vocabulary

GROUP, SHORTEST, LONGEST, FUNCTIONS = 340, 25, 2000, 500
PENALTY = 20.0
PRIOR = Path(cut_model.__file__).parent / "cut_prior.json"


def groups(paths: Sequence[str], dice: random.Random) -> Iterator[list[Row]]:
    """Yields rows of one file, and of all files mixed."""
    files = [[row for row in rows.read(Path(path)) if len(row.answer.strip()) >= SHORTEST] for path in paths]
    files.append(dice.sample(list(functions()), FUNCTIONS))
    for file in [*files, list(chain(*files))]:
        mixed = dice.sample(file, len(file))
        yield from (mixed[at : at + GROUP] for at in range(0, max(1, len(mixed) - GROUP // 2), GROUP))


def functions() -> Iterator[Row]:
    """Yields rows that ask for a function of Tunery."""
    for path in sorted((service.ROOT / "tunery").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            source = ast.get_source_segment(text, node) if isinstance(node, ast.FunctionDef) else None
            if source and len(source) < LONGEST:
                asked = ast.get_docstring(node) or f"Write {node.name}."
                yield Row(0, (Turn("user", asked), Turn("assistant", source)))


def ends(group: Sequence[Row], dice: random.Random) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields the class and the features of the group's answers and of parts of them."""
    known = Vocabulary(group, dictionary.of(row.answer for row in group))
    for at, row in enumerate(group):
        own = known.own(at, row.answer)
        for kind, text in [(cut_model.WHOLE, row.answer), *cut_model.cuts(row.answer, dice)]:
            yield kind, endings.describe(text, row.question, own, known)


def fit(examples: Sequence[tuple[int, dict[str, float]]]) -> dict[str, object]:
    """Returns each feature's mean, scale and coefficients, and the intercepts, relative to whole answers."""
    kinds = np.array([kind for kind, _ in examples])
    table = np.array([list(features.values()) for _, features in examples])
    scale = StandardScaler().fit(table)
    weights = (1 / np.bincount(kinds))[kinds] * (kinds == cut_model.WHOLE).sum()
    model = LogisticRegression(C=1 / PENALTY, max_iter=1000)
    model.fit(np.clip(scale.transform(table), -cut_model.EXTREME, cut_model.EXTREME), kinds, weights)
    coefficients, intercepts = model.coef_[1:] - model.coef_[0], model.intercept_[1:] - model.intercept_[0]
    columns = np.vstack([scale.mean_, scale.scale_, coefficients]).T.round(5)
    return {
        "intercepts": intercepts.round(5).tolist(),
        "features": dict(zip(examples[0][1], columns.tolist(), strict=True)),
    }


def main(*paths: str) -> int:
    dice = random.Random(0)
    made = list(groups(paths, dice))
    prior = fit([example for group in made for example in ends(group, dice)])
    lines = [f'  "{name}": {json.dumps(figures)}' for name, figures in prior["features"].items()]
    intercepts = json.dumps(prior["intercepts"])
    PRIOR.write_text(f'{{\n "intercepts": {intercepts},\n "features": {{\n' + ",\n".join(lines) + "\n }\n}\n", "utf-8")
    print(sum(map(len, made)), "answers in", len(made), "groups")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
