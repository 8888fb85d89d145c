"""What a worker asks of the process that makes a report."""

from pydantic import BaseModel


class OtherFile(BaseModel):
    """Another file of the project: its rows' digests are in the folder's others/ID. `has_lines`: whether the numbers
    with them are those of today's reports."""

    id: str
    name: str
    has_lines: bool = True


class Order(BaseModel):
    """`compares`: the folder has a file `against`. `base`: the name of the model whose texts are in `base` there.
    `benchmark`: where the general benchmark lies. `columns`: see `FileShape`."""

    compares: bool = False
    base: str | None = None
    max_tokens: int = 2048
    benchmark: str | None = None
    others: list[OtherFile] = []
    columns: dict[str, str] = {}
