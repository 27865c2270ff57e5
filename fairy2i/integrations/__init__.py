"""Where fairy2i meets other libraries."""
