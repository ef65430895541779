"""What stands before and behind a graph, as data: text to token ids, an image to floats, logits to named classes.

A pack that has it holds `processing.json` (`spec`) and the files that this names, a tokenizer or names of classes.
Nothing of it is code, and nothing is unpickled: what a description may say is what `spec` knows. `pipeline` does it.
"""

from modelpress.process.pipeline import Pipeline, features_of
from modelpress.process.spec import (
    PROCESSING_FILE,
    ImageInput,
    MeanPool,
    Normalize,
    Processing,
    Softmax,
    TextInput,
    TopK,
)
from modelpress.process.steps import Feature

__all__ = [
    "PROCESSING_FILE",
    "Feature",
    "ImageInput",
    "MeanPool",
    "Normalize",
    "Pipeline",
    "Processing",
    "Softmax",
    "TextInput",
    "TopK",
    "features_of",
]
