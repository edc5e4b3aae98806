"""A run folder's results as one offline HTML file."""

from tokenfusion.report.html import write_report
from tokenfusion.report.thumbnails import thumbnails_of

__all__ = ["thumbnails_of", "write_report"]
