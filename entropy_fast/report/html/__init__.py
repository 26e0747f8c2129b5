"""A report for a browser: what a run left as one HTML file that can be passed on."""

from entropy_fast.report.html.writing import report_html, write_report

__all__ = ["report_html", "write_report"]
