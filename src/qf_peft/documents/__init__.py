"""Facts from documents, written and checked by the model itself."""
