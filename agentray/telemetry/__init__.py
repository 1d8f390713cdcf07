"""What the system tells about itself: metrics, traces and logs."""
