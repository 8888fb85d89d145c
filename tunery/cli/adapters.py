"""Archives of adapters that were trained elsewhere."""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tunery.cli.client import ApiClient, Refused

_PATTERNS = (
    *("adapter_config.json", "adapter_model.*", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""What is sent of a folder: not the states of optimizers that a trainer left beside its adapter."""


def send(api: ApiClient, base: str, folder: Path, suffix: str | None, technique: str) -> dict[str, Any]:
    """Sends the adapter in `folder`; returns its model. Raises Refused."""
    if not (folder / "adapter_config.json").is_file():
        raise Refused(message=f"{folder} has no adapter_config.json. Give the folder that save_pretrained wrote.")
    with tempfile.TemporaryFile() as packed:
        with zipfile.ZipFile(packed, "w") as archive:
            for path in sorted(path for pattern in _PATTERNS for path in folder.glob(pattern)):
                archive.write(path, path.relative_to(folder))
        packed.seek(0)
        fields = {"base": base, "technique": technique, **({"suffix": suffix} if suffix else {})}
        name = f"{folder.resolve().name}.zip"
        return api.call("POST", "/models/adapters", data=fields, files={"file": (name, packed)}, timeout=3600)
