"""A plugin of pytest: failures are printed as they happen, so that a run that is stopped at its
limit has said them. (`-p bench.instafail`; bench/first_light.sh uses it.)
"""

from __future__ import annotations


def pytest_runtest_logreport(report):
    if report.failed:
        text = report.longreprtext[-1500:]
        print(f"\nFAILED NOW {report.nodeid} ({report.when})\n{text}", flush=True)
