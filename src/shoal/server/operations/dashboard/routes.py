"""GET /dashboard: one page without anything from elsewhere, which reads /v1/admin/status and /metrics by itself."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def routes() -> APIRouter:
    """The page asks for the API key when it is refused, so it is itself given to anybody."""
    router = APIRouter(tags=["admin"])
    html = (files("shoal.server.operations.dashboard") / "page.html").read_text("utf-8")
    headers = {"Content-Security-Policy": _policy(html), "Cache-Control": "no-cache"}

    @router.get("/dashboard", summary="What the server is doing, as a web page", response_class=HTMLResponse)
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return router


def _policy(html: str) -> str:
    """The browser runs the page's own script, and lets it speak to this server alone."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_digests(html, 'script')}",
            f"style-src {_digests(html, 'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'self'",
        ]
    )


def _digests(html: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
