"""The last stage: the content of a run directory on one page that works offline, and as one picture.

Both read files of the run directory and nothing else, so that the report of any run can be made again at any time, by
anybody who was sent the directory. A run that is not finished still gets its page, which says what is missing.
"""

from limbeck.report.page import write_report
from limbeck.report.svg import write_picture

__all__ = ["write_picture", "write_report"]
