"""Everything that a slice can say, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modelpress.reduce.named import Answers, ByName, Points, Sensitivities, Variants
from modelpress.reduce.partials import (
    ChannelMoments,
    Confusion,
    Extremes,
    Histogram,
    Moments,
    PairedScores,
    Ranking,
    WeightedMean,
)

AnyPartial = Annotated[
    WeightedMean
    | Moments
    | ChannelMoments
    | Extremes
    | Histogram
    | Confusion
    | Ranking
    | PairedScores
    | Answers
    | ByName
    | Points
    | Sensitivities
    | Variants,
    Field(discriminator="kind"),
]
