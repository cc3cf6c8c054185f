"""The curves of a run in the formats of trackers: the process that writes them, and a writer for each tracker."""
