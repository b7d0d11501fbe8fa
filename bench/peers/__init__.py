"""The peers: one small server a file, each the way its own documentation broadcasts.

Those written here read events as lines from a local TCP connection, and send each line as one
message to all clients. They print ``{"port": ..., "feed": ...}`` once they listen.
"""
