"""Everything that a slice can say, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modelpress.reduce.named import Answers, ByName, Points, Sensitivities, Unnamed

AnyPartial = Annotated[Unnamed | Answers | ByName | Points | Sensitivities, Field(discriminator="kind")]
