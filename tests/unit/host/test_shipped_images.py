"""Which images are missing, on their way or failed, with builds that follow a script."""

import asyncio
from types import SimpleNamespace

import pytest

from innkeeper.core.image import ImageStatus, ShippedImage
from innkeeper.host import shipped_images
from innkeeper.host.disks.image_build import ImageBuildFailed
from innkeeper.host.disks.image_recipe import RecipeInvalid
from innkeeper.host.shipped_images import MESSAGE_CHARACTERS, ShippedImages

pytestmark = pytest.mark.anyio


class World:
    def __init__(self, tmp_path, monkeypatch):
        self.ready, self.built, self.told = {"base"}, [], []
        self.faults, self.at_once, self.most_at_once = {}, 0, 0
        self.recipes = tmp_path
        self.store = SimpleNamespace(list=self.records)
        monkeypatch.setattr(shipped_images, "is_current", self.is_current)
        monkeypatch.setattr(shipped_images, "build_image", self.build_image)

    def records(self):
        return [
            SimpleNamespace(name=name, as_image=lambda name=name: ShippedImage(name, ImageStatus.READY))
            for name in sorted(self.ready)
        ]

    def is_current(self, recipe, store):
        if recipe.name == "broken":
            raise RecipeInvalid("no packages")
        return recipe.name in self.ready

    async def build_image(self, recipe, store, *, progress, ready_images):
        assert ready_images == self.recipes / "ready"
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        self.built.append(recipe.name)
        progress(f"building {recipe.name}")
        if recipe.name in self.faults:
            raise self.faults[recipe.name]
        self.ready.add(recipe.name)

    def images(self, *names):
        return ShippedImages(
            store=self.store,
            recipes=self.recipes,
            ready=self.recipes / "ready",
            names=names,
            on_change=lambda name, status: self.told.append((name, status.value)),
            progress=lambda line: None,
        )


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def shown(images):
    return {image.name: image.status.value for image in images.list()}


async def test_what_is_missing_is_built_in_order_and_one_at_a_time(world):
    images = world.images("node", "base", "python")
    assert (images.missing, shown(images)) == (
        ["node", "python"],
        {"base": "ready", "node": "missing", "python": "missing"},
    )
    await images.build_missing()
    assert (world.built, world.most_at_once) == (["node", "python"], 1)
    assert world.told == [("node", "building"), ("node", "ready"), ("python", "building"), ("python", "ready")]
    assert (images.missing, set(shown(images).values())) == ([], {"ready"})
    await images.build("node")
    assert len(world.built) == 2


@pytest.mark.parametrize(
    "fault",
    [ImageBuildFailed("x" * 9_000 + "end"), RecipeInvalid("end"), OSError("end")],
    ids=lambda fault: type(fault).__name__,
)
async def test_a_failure_is_kept_and_stops_no_other(world, fault):
    world.faults["node"] = fault
    images = world.images("node", "python")
    await images.build_missing()
    assert (shown(images)["node"], shown(images)["python"], images.missing) == ("failed", "ready", ["node"])
    (message,) = [image.message for image in images.list() if image.name == "node"]
    assert message.endswith("end")
    assert len(message) <= MESSAGE_CHARACTERS
    del world.faults["node"]
    await images.build("node")
    assert shown(images)["node"] == "ready"


async def test_an_image_that_is_renewed_stays_usable(world):
    images = world.images("broken")
    world.ready.add("broken")
    assert images.missing == ["broken"]
    assert shown(images)["broken"] == "ready"
