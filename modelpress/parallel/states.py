"""Where the ranks of a job keep the states of its trainings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class States(BaseModel):
    """`<prefix><number>` in a store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str
    """Its URI."""
    prefix: str
    """Of the keys."""
    seconds: float
    """See `modelpress.resume.Shelf.seconds`."""
    reuse: bool
    """Whether states that are there are taken up; else only those that this job has written."""

    @property
    def folder(self) -> str:
        """The place itself as a store's URI, for what else belongs to the job."""
        return f"{self.store}/{self.prefix}".rstrip("/")
