"""A suite -> cells -> one process each -> a folder of records and a report."""
