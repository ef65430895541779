"""One HTML page that tells all of a run, of two packs side by side, or of all models in a store.

A page is a single file: styles and plots are in it, nothing is fetched, nothing runs. The same input gives the same
bytes. What it shows comes from manifests, reports and logs that others may have written, so that every string in it
counts as hostile: it reaches the page through a template that escapes it, or through a plot that is parsed again.
"""

from modelpress.page.drawing import drawing
from modelpress.page.render import render
from modelpress.page.report import report_page
from modelpress.page.story import Story, read_beside, read_story, with_report

__all__ = ["Story", "drawing", "read_beside", "read_story", "render", "report_page", "with_report"]
