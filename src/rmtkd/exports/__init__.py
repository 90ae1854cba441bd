"""Exported networks: files that other runtimes run, checked against PyTorch on rows, and timed beside it.

A network is traced once, with batch and length dynamic. Each format of `formats` writes that trace and runs it again.
"""

from rmtkd.exports.exporting import check_free, export, table
from rmtkd.exports.formats import FORMATS, Format, find_format

__all__ = ["FORMATS", "Format", "check_free", "export", "find_format", "table"]
