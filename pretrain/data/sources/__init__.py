"""What can be indexed: folders, lists, tars."""
