"""GET /dashboard: one self-contained web page, which reads /v1/admin/status and /metrics."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def routes() -> APIRouter:
    """Return the route. The page needs no API key: it asks its user for one when its own requests are refused."""
    router = APIRouter(tags=["admin"])
    html = (files("shoal.server.operations.dashboard") / "page.html").read_text("utf-8")
    headers = {"Content-Security-Policy": _policy(html), "Cache-Control": "no-cache"}

    @router.get("/dashboard", summary="A web page that shows replicas, ranks and requests", response_class=HTMLResponse)
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return router


def _policy(html: str) -> str:
    """Return a policy by which the browser runs only the page's own script, and lets it reach only this server."""
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
