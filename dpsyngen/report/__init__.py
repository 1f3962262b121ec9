"""The report of a run: one self-contained HTML file, a full private copy and a publishable one."""
