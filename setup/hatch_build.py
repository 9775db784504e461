"""What a wheel holds beside the package: the guest agent and the image recipes, below innkeeper/shipped."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = "innkeeper/shipped"


class ShippedParts(BuildHookInterface[Any]):
    """Builds the agent and puts the parts into the wheel. An editable installation finds them in the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See BuildHookInterface. Fails where the agent is neither built nor can be."""
        if version == "editable":
            return
        root = Path(self.root)
        subprocess.run([root / "setup" / "build_agent.sh"], check=True)
        build_data["force_include"] |= {
            str(root / "build" / "inn-agent"): f"{SHIPPED}/inn-agent",
            str(root / "images"): f"{SHIPPED}/images",
        }
        # The agent is a program for one kind of processor; any Python will do.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
