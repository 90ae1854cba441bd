"""Renderings of plans and records: terminal, notebook, model card, HTML. Nothing here computes a result."""

from rmtkd.reporting.card import model_card
from rmtkd.reporting.notebook import sizes_html, summary_html
from rmtkd.reporting.plans import floor_note, misfit_note, plan_notes, plan_table
from rmtkd.reporting.rows import quality_line, summary_rows, vocabulary_line
from rmtkd.reporting.terminal import sizes_table, sizes_text, summary, summary_table
from rmtkd.reporting.writing import write_report

__all__ = [
    "floor_note",
    "misfit_note",
    "model_card",
    "plan_notes",
    "plan_table",
    "quality_line",
    "sizes_html",
    "sizes_table",
    "sizes_text",
    "summary",
    "summary_html",
    "summary_rows",
    "summary_table",
    "vocabulary_line",
    "write_report",
]
