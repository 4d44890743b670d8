"""The parts of the page: its template, style sheets and scripts, joined into one file when a report is written."""
