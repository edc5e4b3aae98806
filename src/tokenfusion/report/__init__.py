"""A run folder's results, or a comparison's, as one offline HTML file."""

from tokenfusion.report.comparison import write_comparison
from tokenfusion.report.pictures import thumbnails_of
from tokenfusion.report.run import write_figures, write_report

__all__ = ["thumbnails_of", "write_comparison", "write_figures", "write_report"]
