"""The report of a run, or of several side by side, as one HTML file that opens without a network.

Styles and pictures stand in the file itself, no script runs, and everything that comes from data or a model is text.
What a run does not have, such as truth ratios of records without wrong answers, is named in its place.
"""

from clue_fast.html_report.page import REPORT, describe_data, html_report, run_names, site_counts, write_report

__all__ = ["REPORT", "describe_data", "html_report", "run_names", "site_counts", "write_report"]
