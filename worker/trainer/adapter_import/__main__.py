"""`python -m worker.trainer.adapter_import FOLDER`: checks an adapter that was trained elsewhere against its base.

FOLDER holds `import.json` (an `ImportOrder`), `base/` and `adapter.zip`. The adapter is written to `out/` in a job's
format, and the technique by which it is trained here to `technique.json`. For an adapter that cannot be used, it writes
one line to standard error and exits with 65.
"""

import json
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from tunery import digests
from tunery.planning.precision import decide
from tunery.spec import ImportOrder, Lora
from worker.trainer import commands, report
from worker.trainer.adapter_import import archive, config, tensors, texts
from worker.trainer.adapter_import.errors import UnusableAdapter
from worker.trainer.export import files

_SECONDS = 600
"""Time limit: regular expressions of an untrusted configuration are run here, and one may never end."""


def carry_out(folder: Path) -> Lora:
    """Writes `out/` from the folder's archive; returns the adapter's technique. Raises UnusableAdapter."""
    order = ImportOrder.model_validate_json((folder / "import.json").read_text())
    base, came, out = folder / "base", folder / "came", folder / "out"
    archive.unpack(order.source, folder / "adapter.zip", came)
    hashes = {path.name: digests.sha256(path) for path in sorted(came.iterdir()) if path.is_file()}
    adapter = config.read(order.source, came)
    scales = tensors.check(order.source, base, came, adapter)
    technique = config.technique(order.source, adapter, sorted(scales), order.trained_with)
    out.mkdir()
    template = texts.write(order.source, base, came, out)
    config.spell_out(adapter, scales)
    adapter.base_model_name_or_path = order.base_model
    adapter.save_pretrained(str(out))
    save_file(load_file(came / archive.WEIGHTS), out / archive.WEIGHTS, metadata={"format": "pt"})
    described = {
        "base_model": order.base_model,
        "job": None,
        "imported": {"source": order.source, "sha256": hashes},
        "plan": {"technique": technique.model_dump(mode="json")},
        "precision": asdict(decide(technique, "cpu")),
        "chat_template_sha256": template.sha256,
        "versions": report.versions(),
        "facts": order.facts | {"base_weights_sha256": files.weights_sha256(base)},
    }
    (out / "training_config.json").write_text(json.dumps(described, indent=2) + "\n")
    shutil.rmtree(came)
    return technique


def bring(folder: Path) -> None:
    """Writes `out/` and technique.json."""
    signal.alarm(_SECONDS)
    (folder / "technique.json").write_text(carry_out(folder).model_dump_json())


if __name__ == "__main__":
    sys.exit(commands.run("adapter_import", bring, UnusableAdapter))
