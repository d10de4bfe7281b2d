"""Reports: read records, compare configurations, write tables, plots and one page. Imports no torch."""
