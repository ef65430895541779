"""Work spread over processes: launching, the data of each, what they send each other, and training together."""
