"""Where the parts that come with the server lie: beside the package when it was installed, in the checkout otherwise."""

from __future__ import annotations

from pathlib import Path

from innkeeper.settings import Settings

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parents[1]
# Where the Debian package innkeeper-images puts them.
READY_IMAGES = Path("/usr/share/innkeeper/images")
# Where the Debian package innkeeper-kernel puts Debian's package of one.
READY_KERNEL = Path("/usr/share/innkeeper/kernel")


def agent_binary(settings: Settings) -> Path | None:
    """The guest agent, or None where it was not built."""
    return _first(settings.agent_binary, PACKAGE / "shipped" / "inn-agent", CHECKOUT / "build" / "inn-agent")


def recipes(settings: Settings) -> Path | None:
    """The folder with the recipes of the shipped images."""
    return _first(settings.images_dir, PACKAGE / "shipped" / "images", CHECKOUT / "images")


def ready_images(settings: Settings) -> Path | None:
    """The folder with shipped images that were built elsewhere, or None where there is none."""
    return _first(settings.ready_images_dir, READY_IMAGES)


def ready_kernel() -> Path | None:
    """The package of the kernel for microVMs that was brought along, or None where there is none."""
    return next(iter(sorted(READY_KERNEL.glob("linux-image-*.deb"))), None)


def _first(chosen: Path | None, *places: Path) -> Path | None:
    # What an operator names is taken or missed, never silently replaced.
    candidates = places if chosen is None else (chosen,)
    return next((path for path in candidates if path.exists()), None)
