"""Results of slices of the data, and how they become one: each slice counts once, and no order changes a bit.

`partials` and `judged` are what a slice can say, `ledger` keeps who has spoken, `exact` adds without rounding.
"""

from __future__ import annotations

from modelpress.reduce.exact import Exact
from modelpress.reduce.judged import Confusion, PairedScores, Ranking
from modelpress.reduce.kinds import AnyPartial
from modelpress.reduce.ledger import Cut, Ledger, Part, Reduced, deal, deal_by_cost, merge_all
from modelpress.reduce.named import Answers, ByName, Piece, Points, Sensitivities, Sensitivity, Variants
from modelpress.reduce.partials import ChannelMoments, Extremes, Histogram, Moments, Partial, WeightedMean

__all__ = [
    "Answers",
    "AnyPartial",
    "ByName",
    "ChannelMoments",
    "Confusion",
    "Cut",
    "Exact",
    "Extremes",
    "Histogram",
    "Ledger",
    "Moments",
    "PairedScores",
    "Part",
    "Partial",
    "Piece",
    "Points",
    "Ranking",
    "Reduced",
    "Sensitivities",
    "Sensitivity",
    "Variants",
    "WeightedMean",
    "deal",
    "deal_by_cost",
    "merge_all",
]
