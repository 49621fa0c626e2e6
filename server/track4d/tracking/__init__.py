"""Where points go in the pictures: optical flow."""
