import pytest

from innkeeper import shipped
from innkeeper.settings import Settings


@pytest.fixture
def places(tmp_path, monkeypatch):
    package, checkout = tmp_path / "package", tmp_path / "checkout"
    monkeypatch.setattr(shipped, "PACKAGE", package)
    monkeypatch.setattr(shipped, "CHECKOUT", checkout)
    return package / "shipped", checkout


@pytest.mark.parametrize(
    ("find", "setting", "name", "in_checkout"),
    [
        (shipped.agent_binary, "agent_binary", "inn-agent", "build/inn-agent"),
        (shipped.recipes, "images_dir", "images", "images"),
    ],
)
def test_the_operators_then_the_packages_then_the_checkouts(places, tmp_path, find, setting, name, in_checkout):
    package, checkout = places
    assert find(Settings()) is None
    (checkout / in_checkout).mkdir(parents=True)
    assert find(Settings()) == checkout / in_checkout
    (package / name).mkdir(parents=True)
    assert find(Settings()) == package / name
    chosen = Settings(**{setting: tmp_path / "mine"})
    assert find(chosen) is None
    (tmp_path / "mine").mkdir()
    assert find(chosen) == tmp_path / "mine"


def test_ready_images_are_where_a_package_puts_them_or_the_operator_says(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "READY_IMAGES", tmp_path / "package")
    assert shipped.ready_images(Settings()) is None
    (tmp_path / "package").mkdir()
    assert shipped.ready_images(Settings()) == tmp_path / "package"
    # What the operator names is not replaced by what is there.
    assert shipped.ready_images(Settings(ready_images_dir=tmp_path / "mine")) is None


def test_a_kernel_that_was_brought_along_is_debians_package_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "READY_KERNEL", tmp_path / "kernel")
    assert shipped.ready_kernel() is None
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "copyright").touch()
    assert shipped.ready_kernel() is None
    (tmp_path / "kernel" / "linux-image-6.1.deb").touch()
    assert shipped.ready_kernel() == tmp_path / "kernel" / "linux-image-6.1.deb"
