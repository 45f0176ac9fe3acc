"""The report of a run: HTML pages and their plots."""

from zoo.moved import names_of

#: Names of the former module, for one release.
__getattr__ = names_of(__name__, dict.fromkeys(("SHOWN", "Sections", "print_summary", "write"), "zoo.eval.report.html"))
