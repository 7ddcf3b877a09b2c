"""Units in files of other tools, read and written."""
