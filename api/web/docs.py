"""The documentation page. Its scripts and styles are served from here: these servers stand in closed networks."""

from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from api.request_errors import RouteNotFound

_HERE = Path(__file__).parent
# Swagger UI 5 as files; the package's own application class is not used.
_BUNDLE = Path(str(resources.files("fastapi_offline") / "static"))
ASSETS = {
    "swagger-ui.css": _BUNDLE / "swagger-ui.css",
    "swagger-ui-bundle.js": _BUNDLE / "swagger-ui-bundle.js",
    "docs.js": _HERE / "docs.js",
    "docs.css": _HERE / "docs.css",
}
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def install(app: FastAPI) -> None:
    """/docs, and what it loads. / leads there: it is what people open first."""
    page = (_HERE / "docs.html").read_text()

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/docs", include_in_schema=False)
    def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _POLICY})

    @app.get("/docs/{name}", include_in_schema=False)
    def asset(name: str) -> FileResponse:
        if name not in ASSETS:
            raise RouteNotFound(what=f"Invalid URL (GET /docs/{name}). The page is /docs.")
        return FileResponse(ASSETS[name], headers={"cache-control": "public, max-age=3600"})
