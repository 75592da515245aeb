# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page that compares training runs."""

from kdengine.report.page import write_report

__all__ = ["write_report"]
