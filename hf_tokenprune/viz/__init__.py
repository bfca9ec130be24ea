"""Pictures: what became of words and patches at each pruning site, and accuracy over arithmetic."""

from .explain import explain
from .kept_words import DocumentView, Picture, document_views, render_page, write_page
from .patches import draw_patches
from .plots import OperatingPoint, accuracy_over_macs, comparison_picture
from .profile_plots import draw_tokens
from .schedule_plot import schedule_picture


__all__ = [
    "DocumentView",
    "OperatingPoint",
    "Picture",
    "accuracy_over_macs",
    "comparison_picture",
    "document_views",
    "draw_patches",
    "draw_tokens",
    "explain",
    "render_page",
    "schedule_picture",
    "write_page",
]
