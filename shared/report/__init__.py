"""Single-file HTML reports with tables and figures."""
