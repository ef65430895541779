"""The registry as the page of all models reads it: joined with the store, in pages, and what is not there."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.fleet import registered
from modelpress import keys
from modelpress.errors import SetupError
from modelpress.page import render
from modelpress.page.fleet import fleet_page, read_fleet
from modelpress.page.registry import aliases
from modelpress.settings import Settings
from modelpress.store.local import LocalStore
from registry import fleet, promotion, runs, versions
from tests.databases import Databases
from tests.registry.shelf import Shelf


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Settings:
    folder = tmp_path_factory.mktemp("mlflow")
    return Settings(home=folder, tracking_uri=databases.mlflow(folder))


@pytest.fixture(scope="module")
def client(settings: Settings) -> MlflowClient:
    return runs.open_client(settings)


class Words(HTMLParser):
    """The text of a page, cell by cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


def plain(client: MlflowClient, name: str, count: int = 1) -> None:
    """A model of somebody else's, with versions that carry no pack."""
    client.create_registered_model(name)
    for _ in range(count):
        client.create_model_version(name, source="s3://elsewhere/model", tags={"team": "search"})


def test_it_joins_the_registry_with_the_store(client: MlflowClient, settings: Settings, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    digits, cells = (Shelf(store, client, tmp_path / name, name) for name in ("digits", "cells"))
    first, second, third = (digits.publish() for _ in range(3))
    assert promotion.promote(store, client, "digits", first, None).promote
    digits.click(second)  # the pointer stays
    store.delete(keys.manifest("digits", third))
    client.set_registered_model_alias("digits", "candidate", "3")
    only = cells.publish(quality=0.1)
    assert not promotion.promote(store, client, "cells", only, None).promote
    plain(client, "a search's model")
    versions.annotate(client, versions.carrying(client, "cells", only), {"team": "vision", "speedup": "fast"})
    client.set_model_version_tag("cells", "1", "undone.why", "the gate said fail")

    found = registered(settings)
    assert found.address == settings.mlflow_uri
    assert [(one.name, one.number, one.pack) for one in found.versions] == [
        ("a search's model", "1", ""),
        ("cells", "1", only),
        *(("digits", number, pack) for number, pack in (("3", third), ("2", second), ("1", first))),
    ]
    (of_cells,) = [one for one in found.versions if one.name == "cells"]
    assert (of_cells.verdict, of_cells.speedup, of_cells.tags) == ("fail", None, {"team": "vision"})
    assert of_cells.notes == ["taken back: the gate said fail"]
    joined = read_fleet(store)
    by_alias = {(one.name, one.alias): one for one in aliases(found, joined)}
    assert by_alias.keys() == {
        ("cells", "challenger"),
        *(("digits", one) for one in ("candidate", "challenger", "champion")),
    }
    assert by_alias["digits", "champion"].problem == (
        f"servers follow pack {first[:12]}, and the registry names version 2 of pack {second[:12]}"
    )
    assert {one.problem for key, one in by_alias.items() if key != ("digits", "champion")} == {""}
    text = Words(render(fleet_page(joined, found))).cells
    assert "1 registered versions carry packs that are not in this store." in " ".join(text)
    assert "1 aliases of the registry do not say what servers follow." in " ".join(text)
    assert f"pack {third[:12]} is not in this store, and was registered at /store/{third}" in text
    assert "Without a pack: a search's model." in " ".join(text)
    assert text.count("missing") == 2, "in the table of aliases, and in that of versions"


def test_aliases_that_name_nothing_are_told(client: MlflowClient, settings: Settings, tmp_path: Path) -> None:
    shelf = Shelf(LocalStore(tmp_path / "store"), client, tmp_path, "pages")
    first, second = shelf.publish(), shelf.publish()
    assert promotion.promote(shelf.store, client, "pages", first, None).promote
    client.delete_model_version("pages", versions.carrying(client, "pages", second).number)
    client.delete_registered_model_alias("pages", "champion")
    found, joined = registered(settings, ["pages"]), read_fleet(shelf.store)
    told = {one.alias: one.problem for one in aliases(found, joined)}
    assert told["champion"] == f"servers follow pack {first[:12]}, and the registry has no such alias"
    assert "1 of 2 published packs are carried by no version" in render(fleet_page(joined, found))


def test_pages_of_answers_are_one_registry(client: MlflowClient, settings: Settings) -> None:
    for number in range(7):
        plain(client, f"paged-{number}", 1 + number % 3)
    whole = fleet.read(client, "here")
    assert fleet.read(client, "here", page=2) == whole
    assert len([one for one in whole.versions if one.name.startswith("paged-")]) == 13
    assert fleet.read(client, "here", ["no such model"]).versions == []
    some = fleet.read(client, "here", ["paged-2", "no such model", "paged-1", "both\"kinds'of quotes"], page=1)
    assert some.models == ["paged-1", "paged-2"]
    assert [(one.name, one.number) for one in some.versions] == [
        *(("paged-1", "2"), ("paged-1", "1")),
        *(("paged-2", number) for number in "321"),
    ]


def test_a_registry_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"(?s)no database .*mlflow\.db.*MODELPRESS_TRACKING_URI"):
        registered(Settings(home=tmp_path))
    assert list(tmp_path.iterdir()) == [], "and none is made"
    with pytest.raises(SetupError, match=r"(?s)talking to MLflow at http://127\.0\.0\.1:9.*modelpress doctor"):
        registered(Settings(home=tmp_path, tracking_uri="http://somebody:secret@127.0.0.1:9"))
