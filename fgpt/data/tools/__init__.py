"""What can be done with prepared shards: inspect, verify, merge, import."""
