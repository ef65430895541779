"""One registered model with packs in a store, and a person who clicks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from mlflow import MlflowClient

from modelpress import pointer, scores
from modelpress.checkpoint import Checkpoint
from modelpress.config import GateConfig, OptimizeConfig
from modelpress.scores import Scored
from modelpress.store.base import Store
from registry import reconcile, versions
from registry.reconcile import CHAMPION, Outcome
from tests.packs import Pack, make_pack, torch_checkpoint

GATE = GateConfig(min_compression_ratio=0, margin=0.3)
WORKLOAD = {"kind": "custom", "factory": "tests.integration.small_workloads:Small"}
CONFIG = OptimizeConfig.model_validate({"name": "x", "workload": WORKLOAD})


class Shelf:
    """A registered model; `folder` takes the shards while they are made."""

    def __init__(
        self,
        store: Store,
        client: MlflowClient,
        folder: Path,
        name: str,
        checkpoint: Callable[[int], Checkpoint] = torch_checkpoint,
        make: Callable[..., Pack] = make_pack,
    ) -> None:
        self.store, self.client, self.folder, self.name = store, client, folder, name
        self.made, self._checkpoint, self._make = 0, checkpoint, make

    def publish(self, quality: float = 1.0, **gate: object) -> str:
        """A registered pack of this quality on the same samples, whose own gate is `GATE` with these values."""
        self.made += 1
        checkpoint = self._checkpoint(self.made)
        vectors = {"candidate": np.full(50, quality), "source": np.ones(50)}
        scored = {who: Scored(vector, "the same", "accuracy") for who, vector in vectors.items()}
        file = {scores.SCORES_FILE: scores.dump(scored)}
        pack = make_pack(
            self.folder / str(self.made), replace(checkpoint, files=checkpoint.files | file), name=self.name
        )
        config = CONFIG.model_copy(update={"name": self.name, "gate": GATE.model_copy(update=gate)})
        manifest = pack.manifest.model_copy(update={"config": config.model_dump(mode="json")})
        published = replace(pack, manifest=manifest)
        published.publish(self.store)
        self.register(published.digest)
        return published.digest

    def register(self, pack: str) -> str:
        experiment = self.client.get_experiment_by_name(self.name)
        identity = experiment.experiment_id if experiment else self.client.create_experiment(self.name)
        run = self.client.create_run(identity).info.run_id
        version, _ = versions.register(
            self.client,
            self.name,
            pack=pack,
            uri=f"/store/{pack}",
            run_id=run,
            tags={},
            measured={},
            description="How it came to be.",
            log=lambda: self.client.create_logged_model(identity, name=self.name, source_run_id=run),
        )
        return version.number

    def click(self, pack: str, alias: str = CHAMPION) -> None:
        """As MLflow's UI does."""
        self.client.set_registered_model_alias(self.name, alias, versions.carrying(self.client, self.name, pack).number)

    def settle(self, alias: str = CHAMPION) -> Outcome:
        return reconcile.settle(self.store, self.client, self.name, alias)

    def differing(self) -> list[str]:
        return [found.alias for found in reconcile.look(self.store, self.client, self.name)]

    def named(self, alias: str = CHAMPION) -> str | None:
        found = versions.by_alias(self.client, self.name, alias)
        return found.pack if found else None

    def served(self, alias: str = CHAMPION) -> str | None:
        entry = pointer.current(self.store, self.name, alias)
        return entry.pack if entry else None

    def description(self, pack: str) -> str:
        number = versions.carrying(self.client, self.name, pack).number
        return str(self.client.get_model_version(self.name, number).description)

    def tags(self, pack: str) -> dict[str, str]:
        return dict(versions.carrying(self.client, self.name, pack).tags)
