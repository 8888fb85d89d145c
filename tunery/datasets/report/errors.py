"""What can keep a report from being made."""

from tunery.errors import Rejected


class ReportUnavailable(Rejected):
    """A report needs packages that are not installed ('{package}' is missing). Install them:
    pip install 'tunery[report]'."""

    code = "report_unavailable"
