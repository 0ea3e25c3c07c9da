"""Recipe -> prepared data set: tasks, workers, parts, merge, commit."""
