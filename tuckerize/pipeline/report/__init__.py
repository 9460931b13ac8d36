"""The `report` command: one page on a Tucker checkpoint."""

from tuckerize.pipeline.report.command import ReportRequest, write_report

__all__ = ["ReportRequest", "write_report"]
