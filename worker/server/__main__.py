"""`python -m worker.server`: the model server, on the host and port of TUNERY_SERVER_URL."""

import os
from urllib.parse import urlsplit

import uvicorn

from tunery import plugins
from tunery.settings import Settings, ending_if_wrong, make_folders, settings_or_exit
from tunery.storage import open_usable_storage
from worker.server.app import create_app
from worker.server.backends import backend


def choose_device(settings: Settings) -> str:
    """Returns the torch device, and hides other GPUs from CUDA: call it before torch is imported."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the driver's order, which Tunery uses too
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if settings.serve_gpu is None else str(settings.serve_gpu)
    return "cpu" if settings.serve_gpu is None else "cuda"


def name_of(device: str) -> str:
    """Returns the driver's name for a torch device, or cpu."""
    if device == "cpu":
        return device
    import torch  # sees only the chosen GPU

    return torch.cuda.get_device_name()


def main() -> None:
    settings = settings_or_exit()
    device = choose_device(settings)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local; a name in a config must not start a search for more
    plugins.load(settings.plugins, "server")
    url = urlsplit(settings.server_url)
    with ending_if_wrong():
        make_folders(settings, "models_dir")
        engine = backend.make(settings, open_usable_storage(settings), device)
    app = create_app(
        engine,
        places=settings.server_places,
        seconds=settings.server_seconds,
        device_name=name_of(device) if engine.device == device else None,
    )
    uvicorn.run(
        app,
        host=url.hostname or "127.0.0.1",
        port=url.port or 80,
        log_level=settings.log_level.lower(),
        access_log=False,
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
