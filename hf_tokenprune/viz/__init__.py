"""Pictures: which words survived which pruning site, and accuracy over arithmetic."""

from .kept_words import DocumentView, document_views, render_page, write_page
from .plots import OperatingPoint, accuracy_over_macs, comparison_picture


__all__ = [
    "DocumentView",
    "OperatingPoint",
    "accuracy_over_macs",
    "comparison_picture",
    "document_views",
    "render_page",
    "write_page",
]
