"""The socket mechanisms of Linux: filters, steering, and the threads that read steered sockets."""
