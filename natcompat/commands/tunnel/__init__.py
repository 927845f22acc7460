"""``natcompat tunnel``: a tunnel with manual keys, described in a file.

`form` says what may stand in the file, `file` makes SAs and policies of it, `keys` reads key material,
`state` keeps sequence numbers across restarts, `reserve` takes them from there while the tunnel runs,
`run` brings it up and down, `display` tells of it, `command` is the command line.
"""
