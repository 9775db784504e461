"""`inn settings`: what a server that starts here now would be set to, and where each value comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from innkeeper.cli.options import Config, Json
from innkeeper.cli.printing import print_json, print_table
from innkeeper.cli.serve import read_settings


def settings(
    ctx: typer.Context,
    home: Annotated[Path | None, typer.Option(help="State directory.", show_default="/var/lib/innkeeper")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Show the settings that a server started here takes, and where each comes from. Secrets are hidden.

    Checks them too: the exit status is 2 when one is unknown or wrong.
    """
    from innkeeper.settings_sources import ENV_PREFIX, shown

    origin = read_settings(ctx, home, config)
    rows = []
    for name in type(origin.settings).model_fields:
        value = getattr(origin.settings, name)
        rows.append(
            (
                ENV_PREFIX + name.upper(),
                None if value in (None, "") else shown(value),
                origin.sources.get(name, "default"),
            )
        )
    if json:
        print_json([{"name": name, "value": value, "source": source} for name, value, source in rows])
    else:
        print_table(("SETTING", "VALUE", "FROM"), rows)
