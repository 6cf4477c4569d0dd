"""Pages in one file: no script, nothing fetched, everything that comes from data escaped."""

import base64
import hashlib
from pathlib import Path

import jinja2
import markupsafe

_ASSETS = Path(__file__).parent / "assets"


def filled_page(name: str, /, **values: object) -> str:
    """The template ``assets/NAME.html``, with the styles that all pages have and its own, ``NAME.css``.

    The page's Content-Security-Policy allows these styles, by their hash, and ``data:`` images, no more.
    """
    css = "".join((_ASSETS / file).read_text(encoding="utf-8") for file in ("page.css", f"{name}.css"))
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{name}.html").render(
        policy=f"{policy}form-action 'none'", style=markupsafe.Markup(css), **values
    )


def data_url(data: bytes, kind: str) -> str:
    """An address that holds a picture of this kind, "jpeg" or "png"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
