"""Everything that a slice can say, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modelpress.reduce.named import Answers, ByName, Points, Sensitivities, Unnamed, Variants

AnyPartial = Annotated[Unnamed | Answers | ByName | Points | Sensitivities | Variants, Field(discriminator="kind")]
